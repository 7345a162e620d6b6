"""Which label gets which column, and which columns make a task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perdure.errors import DataError, UsageError
from perdure.registry import nearest
from perdure.seeding import generator

ClassOrder = str | Sequence[int] | None


def order_classes(class_order: ClassOrder, labels: Tensor, seed: int) -> tuple[int, ...]:
    """Return the original label of every column.

    Parameters
    ----------
    class_order
        None or "natural" (ascending), "shuffled" (drawn from `(seed, "class_order")`), or the labels in order.
    labels
        The training labels int64 [N].

    Raises
    ------
    UsageError
        If the word is unknown or the list repeats a label.
    DataError
        If the data have labels outside the list, or none of a label in it.
    """
    present: list[int] = torch.unique(labels).tolist()
    if class_order is None or class_order == "natural":
        return tuple(present)
    if class_order == "shuffled":
        draw = torch.randperm(len(present), generator=generator(seed, "class_order"))
        return tuple(present[position] for position in draw.tolist())
    if isinstance(class_order, str):
        raise UsageError(
            f"unknown class_order '{class_order}'{nearest(class_order, ('natural', 'shuffled')) or ';'} "
            "choose natural, shuffled or a list of labels"
        )
    order = tuple(int(label) for label in class_order)
    if len(set(order)) != len(order):
        raise UsageError(f"class_order={list(order)} should name every label once")
    outside = sorted(set(present) - set(order))
    if outside:
        raise DataError(f"the data have the label {outside[0]}, which is not among the classes {sorted(order)}")
    absent = sorted(set(order) - set(present))
    if absent:
        raise DataError(f"class {absent[0]} of class_order has no training example; the data have {present}")
    return order


def to_columns(labels: Tensor, order: Sequence[int], what: str) -> Tensor:
    """Return the column int64 [N] of every label [N]: its position in `order`.

    Raises
    ------
    DataError
        If a label is not in `order`.
    """
    classes = torch.tensor(order)
    ascending, columns = classes.sort()
    positions = torch.searchsorted(ascending, labels).clamp_(max=len(classes) - 1)
    wrong = (ascending[positions] != labels).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"the {what} data have the label {int(labels[row])} in row {row}, which is not among the classes "
            f"{ascending.tolist()}"
        )
    return columns[positions]


def task_sizes(tasks: int | Sequence[int] | None, classes_per_task: int | None, classes: int) -> list[int]:
    """Return how many classes each task gets.

    Parameters
    ----------
    tasks
        The number of tasks, all of one size, or the size of each.
    classes_per_task
        The size of every task; instead of `tasks`, or agreeing with it.

    Raises
    ------
    UsageError
        If neither is given, they disagree, or they do not divide the classes.
    """
    if tasks is None and classes_per_task is None:
        raise UsageError(
            f"say how to split the {classes} classes: give tasks or classes_per_task "
            "(on the command line: --set stream.tasks=...)"
        )
    if classes_per_task is not None and classes_per_task < 1:
        raise UsageError(f"classes_per_task={classes_per_task} should be at least 1")
    if tasks is None:
        assert classes_per_task is not None
        tasks = [classes_per_task] * (classes // classes_per_task)
        if sum(tasks) != classes:
            raise UsageError(f"{classes} classes cannot be split into tasks of {classes_per_task}{_advice(classes)}")
    elif isinstance(tasks, int):
        if tasks > classes:
            raise UsageError(f"{tasks} tasks need at least {tasks} classes and there are {classes}; use fewer tasks")
        if tasks < 1 or classes % tasks:
            raise UsageError(f"{classes} classes cannot be split evenly into {tasks} tasks{_advice(classes)}")
        tasks = [classes // tasks] * tasks
    sizes = [int(size) for size in tasks]
    if not sizes or min(sizes) < 1 or sum(sizes) != classes:
        raise UsageError(f"tasks={sizes} should be positive sizes that add up to the {classes} classes")
    if classes_per_task is not None and set(sizes) != {classes_per_task}:
        raise UsageError(f"tasks={sizes} does not agree with classes_per_task={classes_per_task}; give one of them")
    return sizes


def _advice(classes: int) -> str:
    divisors = [size for size in range(1, classes + 1) if classes % size == 0]
    return f"; use one of {', '.join(map(str, divisors))}, or list the sizes, such as tasks=[{classes - 1}, 1]"


def hold_out(targets: Tensor, fraction: float, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the rows to train and to test on, each ascending; every class gives its share of test rows.

    A class of n >= 2 rows gives round(n * fraction) of them, but at least one and not all; one of a single row none.
    Float targets are split as if they were one class.

    Raises
    ------
    UsageError
        If `fraction` is not between 0 and 1.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"test_fraction={fraction} should be at least 0 and below 1")
    test = torch.zeros(len(targets), dtype=torch.bool)
    if fraction:
        by_class = targets.ndim == 1 and not targets.is_floating_point()
        groups = [(targets == label).nonzero().flatten() for label in torch.unique(targets)] if by_class else [None]
        for group in groups:
            rows = torch.arange(len(targets)) if group is None else group
            count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
            test[rows[torch.randperm(len(rows), generator=draw)[:count]]] = True
    return (~test).nonzero().flatten(), test.nonzero().flatten()
