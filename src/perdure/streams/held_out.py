"""The beginning of a stream, tested on a part of its own training data: what hyper-parameters may be chosen on."""

from __future__ import annotations

import torch
from torch import Tensor

from perdure.data.examples import Examples
from perdure.errors import UsageError
from perdure.seeding import generator
from perdure.streams.classes import hold_out
from perdure.streams.task import Stream, Task

UNDECIDED, TRAINED_ON, HELD_OUT = 0, 1, 2


def held_out(stream: Stream, first: int = 3, fraction: float = 0.1) -> Stream:
    """The first tasks of a stream, whose test sets are parts of their training data that are not trained on.

    Neither the stream's test data nor its later tasks are read, and the new stream does not hold them. Its head keeps
    the width that all tasks need. A stored example that several tasks show, as they do where pixels are permuted, is
    held out of all of them or of none.

    Parameters
    ----------
    first
        How many tasks, from the beginning.
    fraction
        The share of every class that is held out, drawn from the stream's seed.

    Raises
    ------
    UsageError
        If there are not as many tasks, or the share leaves nothing to train or to test on.

    >>> import perdure
    >>> whole = perdure.benchmarks.split_digits(seed=5)
    >>> [(len(task.train), len(task.test)) for task in held_out(whole, first=2)], len(whole[0].train)
    ([(234, 26), (234, 26)], 260)
    """
    if not 1 <= first <= len(stream):
        raise UsageError(f"tasks is {first}, but {stream.name} has {len(stream)}; choose on 1 to {len(stream)} of them")
    if not 0 < fraction < 1:
        raise UsageError(f"held_out is {fraction}, it must be above 0 and below 1: the share of the training data")
    decided: dict[int, Tensor] = {}
    tasks = []
    for task in stream[:first]:
        rows, held = _split(task.train, fraction, stream.seed, decided)
        if not len(held) or not len(rows):
            raise UsageError(
                f"task {task.index} ('{task.name}') has {len(task.train)} training examples, too few to hold out "
                f"{fraction:g} of every class; use a larger share"
            )
        tasks.append(Task(task.index, task.name, task.train.subset(rows), task.train.subset(held), task.classes))
    return stream.replace(tasks, name=f"{stream.name}, held out")


def _split(examples: Examples, fraction: float, seed: int, decided: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows to train and to test on; what an earlier task decided about a stored example stands."""
    stored = torch.arange(len(examples)) if examples.rows is None else examples.rows
    size = int(stored.max()) + 1 if len(stored) else 0
    marks = decided.get(id(examples.x), torch.zeros(0, dtype=torch.int8))
    if len(marks) < size:
        marks = torch.cat([marks, torch.zeros(size - len(marks), dtype=torch.int8)])
    open_rows = (marks[stored] == UNDECIDED).nonzero().flatten()
    train, held = hold_out(examples.targets[open_rows], fraction, generator(seed, "held out"))
    marks[stored[open_rows[train]]] = TRAINED_ON
    marks[stored[open_rows[held]]] = HELD_OUT
    decided[id(examples.x)] = marks
    return (marks[stored] == TRAINED_ON).nonzero().flatten(), (marks[stored] == HELD_OUT).nonzero().flatten()
