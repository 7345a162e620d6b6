"""Streams without data: every row is a function of a seed and of its number, so no length takes memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perdure.data.generated import GeneratedExamples
from perdure.errors import UsageError
from perdure.streams.task import Stream, Task

MakeRows = Callable[[Tensor, int], tuple[Any, Tensor]]
"""From row numbers, int64 [b], and a seed to inputs [b, ...] and targets [b]: `perdure.seeding.uniforms` helps."""


def generated(
    make: MakeRows,
    *,
    rows: int,
    classes: int | Sequence[Sequence[int]],
    parts: int = 10,
    test_rows: int = 500,
    scenario: str = "online",
    seed: int = 0,
    name: str = "generated",
    **arguments: Any,
) -> Stream:
    """A stream of `rows` training rows in the order of their numbers, in `parts` after each of which it is evaluated.

    Parameters
    ----------
    make
        `(numbers, seed)` -> inputs and targets, the same for the same numbers and seed whatever else is in the batch.
        Time is the number: a stream changes because its rows do.
    rows
        Training rows in all.
    classes
        How many class columns every part has, or the columns of each part.
    test_rows
        Rows of every part that are held out: evenly spaced numbers, which never arrive.
    arguments
        `prepare`, `class_names` and `shuffle` of `Stream`; shuffling needs a number for every row of a part.

    Raises
    ------
    UsageError
        If there are fewer rows than parts, or not columns for every part.

    >>> from perdure.seeding import uniforms
    >>> def halves(numbers, seed):
    ...     x = uniforms(numbers, 2, seed)
    ...     return x, (x[:, 0] > 0.5).long()
    >>> stream = generated(halves, rows=10**9, classes=2)
    >>> stream, len(stream[0].train)
    (Stream('generated', 10 tasks, scenario='online', 2 columns, seed=0), 100000000)
    """
    if parts < 1 or rows < parts or test_rows < 0:
        raise UsageError(f"rows={rows}, parts={parts}, test_rows={test_rows}: every part needs a row to train on")
    columns = [tuple(range(classes))] * parts if isinstance(classes, int) else [tuple(own) for own in classes]
    if len(columns) != parts:
        raise UsageError(
            f"classes gives the columns of {len(columns)} parts, and there are parts={parts}; give one each"
        )
    tasks = []
    for index, own in enumerate(columns):
        start, stop = rows * index // parts, rows * (index + 1) // parts
        count, first = stop - start, start + index * test_rows
        train = GeneratedExamples(partial(_rows, make, seed, first, count, test_rows), count)
        test = GeneratedExamples(partial(_held_out, make, seed, first, count, test_rows), test_rows)
        tasks.append(Task(index, f"part {index}", train, test if test_rows else None, own))
    width = 1 + max((column for own in columns for column in own), default=0)
    arguments.setdefault("shuffle", False)
    options = {"rows": rows, "parts": parts, "test_rows": test_rows, "scenario": scenario, "seed": seed}
    arguments.setdefault("options", options)
    return Stream(tasks, scenario=scenario, seed=seed, name=name, columns=width, **arguments)


def _rows(make: MakeRows, seed: int, first: int, count: int, held: int, rows: Tensor) -> tuple[Any, Tensor]:
    """Training rows of a part, which skip the first number of each of `held` equal stretches."""
    if held:
        rows = rows + torch.minimum(rows // _stretch(count, held), torch.tensor(held - 1)) + 1
    return make(first + rows, seed)


def _held_out(make: MakeRows, seed: int, first: int, count: int, held: int, rows: Tensor) -> tuple[Any, Tensor]:
    return make(first + rows * (_stretch(count, held) + 1), seed)


def _stretch(count: int, held: int) -> int:
    """Training rows between two that are held out; what is left over comes at the end."""
    if count < held:
        raise UsageError(f"{held} test rows of a part that has {count} to train on; use fewer, or more rows")
    return count // held
