"""Classes of different sizes: long-tailed, or as many examples as one says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from perdure.errors import UsageError
from perdure.registry import nearest
from perdure.seeding import generator
from perdure.streams.task import Stream, Task

ORDERS = ("ordered", "shuffled")
Size = Callable[[int, int], int]
"""From a column and the number of its rows: how many are kept."""


def imbalanced(
    stream: Stream,
    *,
    imbalance: float = 100.0,
    imbalance_order: str = "ordered",
    class_sizes: Sequence[int] | None = None,
) -> Stream:
    """The same stream with fewer training rows of some classes, drawn from the seed; the test sets stay as they are.

    Parameters
    ----------
    imbalance
        The ratio of the most frequent class to the rarest, at least 1. Of C classes the one of rank k keeps the share
        `imbalance ** (-k / (C - 1))` of its rows in every task, at least one: a long tail.
    imbalance_order
        "ordered": ranks are columns, so the classes that come first are the frequent ones. "shuffled": ranks are drawn
        from the seed.
    class_sizes
        Instead of both: how many rows to keep of every column in every task that has it.

    Source: Y. Cui, M. Jia, T.-Y. Lin, Y. Song, S. Belongie, Class-Balanced Loss Based on Effective Number of Samples,
    2019, arXiv:1901.05555; in class-incremental streams X. Liu et al., Long-Tailed Class Incremental Learning, 2022,
    arXiv:2210.00266 (there also "ordered" and "shuffled").

    Raises
    ------
    UsageError
        If a number is out of range, a class has fewer rows than asked for, or the targets are no classes.

    >>> import perdure
    >>> stream = imbalanced(perdure.benchmarks.split_digits(), imbalance=10)
    >>> [len(task.train) for task in stream]
    [230, 138, 84, 50, 29]
    """
    if imbalance_order not in ORDERS:
        hint = nearest(str(imbalance_order), ORDERS) or ";"
        raise UsageError(f"unknown imbalance_order '{imbalance_order}'{hint} choose {' or '.join(ORDERS)}")
    if not imbalance >= 1:
        raise UsageError(f"imbalance={imbalance} should be at least 1: the most frequent class over the rarest")
    if any(task.train.targets.is_floating_point() or task.train.targets.ndim != 1 for task in stream):
        raise UsageError("the targets of this stream are no classes, so classes cannot be made rare")
    if not stream.shuffle:
        raise UsageError("the rows of this stream arrive in an order of their own; make classes rare before that")
    columns = stream.columns
    if class_sizes is not None:
        if len(class_sizes) != columns or min(class_sizes) < 1:
            raise UsageError(f"class_sizes={list(class_sizes)} should be {columns} positive numbers, one a column")
        return _kept(stream, lambda column, rows: class_sizes[column])
    rank = torch.arange(columns)
    if imbalance_order == "shuffled":
        rank = torch.randperm(columns, generator=generator(stream.seed, "imbalance"))
    shares = [imbalance ** (-k / max(1, columns - 1)) for k in rank.tolist()]
    return _kept(stream, lambda column, rows: max(1, round(rows * shares[column])))


def _kept(stream: Stream, size: Size) -> Stream:
    tasks = []
    for task in stream:
        rows = [_some(task, column, size, stream.seed) for column in torch.unique(task.train.targets).tolist()]
        tasks.append(replace(task, train=task.train.subset(torch.cat(rows).sort().values)))
    return stream.replace(tasks)


def _some(task: Task, column: int, size: Size, seed: int) -> Tensor:
    """So many rows of a class of a task, int64."""
    rows = (task.train.targets == column).nonzero().flatten()
    wanted = size(column, len(rows))
    if wanted > len(rows):
        raise UsageError(
            f"class_sizes: column {column} should have {wanted} rows, but task {task.index} ('{task.name}') has "
            f"{len(rows)}"
        )
    draw = generator(seed, "imbalance", task.index, column)
    return rows[torch.randperm(len(rows), generator=draw)[:wanted]]
