"""A benchmark whose test sets and later tasks raise when anybody reads them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from perdure.streams.benchmarks import split_digits
from perdure.streams.task import Stream

READABLE = 3


class Forbidden:
    """Examples of which nothing but the number may be known."""

    def __init__(self, rows: int) -> None:
        object.__setattr__(self, "rows_there", rows)

    def __len__(self) -> int:
        return int(object.__getattribute__(self, "rows_there"))

    def __getattribute__(self, name: str) -> Any:
        if name in ("__class__", "__len__"):
            return object.__getattribute__(self, name)
        raise AssertionError(f"the search read '{name}' of what it must not see")


def guarded(*, scenario: str = "task", seed: int = 0, root: str | None = None, **options: Any) -> Stream:
    """Split digits of which the training data of the first tasks alone can be read."""
    whole = split_digits(scenario=scenario, seed=seed)
    tasks: list[Any] = []
    for task in whole:
        assert task.test is not None
        hidden: Any = Forbidden(len(task.train))
        test: Any = Forbidden(len(task.test))
        tasks.append(replace(task, test=test, train=task.train if task.index < READABLE else hidden))
    return whole.replace(tasks)
