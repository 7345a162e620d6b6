"""Tasks that come back, with new rows each time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from perdure.errors import UsageError
from perdure.registry import nearest
from perdure.seeding import generator
from perdure.streams.online import by_class
from perdure.streams.task import Stream, Task

VISITS = ("cycle", "shuffled")


def repeated(stream: Stream, *, repeats: int = 2, visits: str = "cycle") -> Stream:
    """Every task comes `repeats` times, each time with another part of its rows: its classes come back.

    A visit is a task of the new stream, with a name of its own, the columns of the task it was made of and its test
    set. The rows of every class are dealt out evenly to the visits, in an order drawn from the seed.

    Parameters
    ----------
    repeats
        Visits of every task.
    visits
        "cycle": round after round in the stream's order. "shuffled": the first round is, and every later one has an
        order of its own.

    Source: A. Cossu et al., Is Class-Incremental Enough for Continual Learning?, 2021, arXiv:2112.02925;
    H. Hemati et al., Class-Incremental Learning with Repetition, 2023, arXiv:2301.11396.

    Raises
    ------
    UsageError
        If a task has fewer rows than visits.

    >>> import perdure
    >>> stream = repeated(perdure.benchmarks.split_digits(tasks=2), repeats=2)
    >>> [task.name for task in stream]
    ['0, 1, 2, 3, 4', '5, 6, 7, 8, 9', '0, 1, 2, 3, 4 (visit 2)', '5, 6, 7, 8, 9 (visit 2)']
    """
    if repeats < 1:
        raise UsageError(f"repeats={repeats} should be at least 1: the visits of every task")
    if visits not in VISITS:
        raise UsageError(f"unknown visits '{visits}'{nearest(str(visits), VISITS) or ';'} choose {' or '.join(VISITS)}")
    if repeats == 1:
        return stream
    if not stream.shuffle:
        raise UsageError("the rows of this stream arrive in an order of their own; repeat its tasks before that")
    parts = [_dealt(task, repeats, stream.seed) for task in stream]
    tasks: list[Task] = []
    for visit in range(repeats):
        order = torch.arange(len(stream))
        if visits == "shuffled" and visit:
            order = torch.randperm(len(stream), generator=generator(stream.seed, "visits", visit))
        for number in order.tolist():
            task = stream[number]
            name = f"{task.name} (visit {visit + 1})" if visit else task.name
            tasks.append(replace(task, index=len(tasks), name=name, train=task.train.subset(parts[number][visit])))
    return stream.replace(tasks)


def _dealt(task: Task, repeats: int, seed: int) -> list[Tensor]:
    """The rows of a task, int64, in as many parts, each ascending."""
    if len(task.train) < repeats:
        raise UsageError(
            f"repeats={repeats}, but task {task.index} ('{task.name}') has {len(task.train)} training examples; every "
            "visit needs one"
        )
    draw = generator(seed, "repeats", task.index)
    rows = [own[torch.randperm(len(own), generator=draw)] for own in by_class(task.train.targets)]
    every = torch.cat(rows)
    return [every[visit::repeats].sort().values for visit in range(repeats)]
