"""Tasks, the stream they make, and the plan: which rows arrive in which batch, drawn from the stream's seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from perdure.data.examples import Examples, describe
from perdure.errors import DataError, UsageError
from perdure.registry import nearest
from perdure.seeding import Part, generator
from perdure.streams.transforms import Prepare
from perdure.tree import leaves

Scenario = Literal["task", "domain", "class", "online", "blurry"]
ANNOUNCED: tuple[str, ...] = ("task", "domain", "class")
HIDDEN: tuple[str, ...] = ("online", "blurry")
SCENARIOS: tuple[str, ...] = (*ANNOUNCED, *HIDDEN)


@dataclass(frozen=True)
class Task:
    """One part of a stream.

    Attributes
    ----------
    index, name
        Its position in the stream, from 0, and its name in tables.
    train, test
        Its examples; targets are class columns. `test` may be missing.
    classes
        Its class columns, consecutive in order of arrival; empty for regression.
    """

    index: int
    name: str
    train: Examples
    test: Examples | None
    classes: tuple[int, ...]


class Stream(Sequence[Task]):
    """A sequence of tasks that every method sees alike.

    Parameters
    ----------
    tasks
        In order of arrival.
    scenario
        "task" (the task is known when predicting), "domain" (same labels, new inputs) or "class" (new labels, one
        output for all); "online" (one pass, nobody is told where a task begins or which one a row belongs to) or
        "blurry" (neither, and every part holds rows of the others too). In the last two a task is a part of the stream
        after which it is evaluated, and no more.
    seed
        The seed of everything random about the stream.
    class_names
        The name of every column; default: its number.
    class_order
        The original label of every column. A domain-incremental split of a class data set shares its columns
        between tasks; there it is the order in which the labels arrive.
    columns
        The width of one head for all; default: what the tasks' classes need, for regression the targets' width.
    prepare
        Raw batch (stored dtype) to model inputs; default: `Prepare()`.
    options
        The JSON-able keyword arguments that built it.
    shuffle
        Whether every pass over a task is a new shuffle of its rows; otherwise they arrive in their own order.

    Raises
    ------
    UsageError
        If the scenario is unknown or there are no tasks.
    DataError
        If a task has no training examples.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        scenario: str,
        seed: int = 0,
        name: str = "stream",
        class_names: Sequence[str] | None = None,
        class_order: Sequence[int] | None = None,
        columns: int | None = None,
        prepare: Callable[[Any], Any] | None = None,
        options: dict[str, Any] | None = None,
        shuffle: bool = True,
    ) -> None:
        check_scenario(scenario)
        if not tasks:
            raise UsageError("a stream needs at least one task")
        for task in tasks:
            if not len(task.train):
                raise DataError(f"task {task.index} ('{task.name}') has no training examples")
        self.tasks = tuple(tasks)
        self.scenario = scenario
        self.seed = seed
        self.name = name
        self.columns = columns if columns is not None else _columns(self.tasks)
        self.class_names = tuple(class_names) if class_names is not None else tuple(map(str, range(self.columns)))
        self.class_order = tuple(class_order) if class_order is not None else tuple(range(self.columns))
        self.prepare = prepare if prepare is not None else Prepare()
        self.options = dict(options or {})
        self.shuffle = shuffle
        first, _ = self.tasks[0].train.gather(torch.zeros(1, dtype=torch.int64))
        self.input_shape: tuple[int, ...] = tuple(leaves(self.prepare(first))[0].shape[1:])

    def __len__(self) -> int:
        return len(self.tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Task, ...]: ...

    def __getitem__(self, index: int | slice) -> Task | tuple[Task, ...]:
        return self.tasks[index]

    def __repr__(self) -> str:
        return (
            f"Stream('{self.name}', {len(self)} tasks, scenario='{self.scenario}', {self.columns} columns, "
            f"seed={self.seed})"
        )

    @property
    def announced(self) -> bool:
        """Whether the learner is told where tasks begin and end."""
        return self.scenario in ANNOUNCED

    @property
    def shares_classes(self) -> bool:
        """Whether all tasks have the same columns: domain-incremental, or an online stream made of such tasks."""
        alike = all(task.classes == self.tasks[0].classes for task in self.tasks)
        return self.scenario == "domain" or (not self.announced and alike)

    def replace(self, tasks: Sequence[Task], **changes: Any) -> Stream:
        """The same stream with other tasks and whatever else `changes` gives, in the words of the constructor."""
        kept = ("scenario", "seed", "name", "class_names", "class_order", "columns", "prepare", "options", "shuffle")
        return Stream(tasks, **{name: getattr(self, name) for name in kept} | changes)

    def reordered(self, order: str | Sequence[int]) -> Stream:
        """The same tasks in another order: how much does a method depend on it?

        Where every task has columns of its own, they are numbered again in the new order of arrival.

        Parameters
        ----------
        order
            The tasks by number, such as `[2, 0, 1]`; or "random", drawn from the seed; or "easy_to_hard" or
            "hard_to_easy", by what `perdure.streams.difficulties` measures on the training data alone.

        Raises
        ------
        UsageError
            If the order is unknown, or does not name every task once.
        """
        from perdure.streams.order import reordered

        return reordered(self, order)

    def plan(
        self,
        task: Task,
        epochs: int = 1,
        batch_size: int = 32,
        drop_last: bool = False,
        steps: int | None = None,
    ) -> Iterator[Tensor]:
        """Yield one int64 index tensor a batch, on the CPU, into `task.train`.

        Every pass is a new shuffle of all rows, or all rows in order if the stream has `shuffle=False`; its last batch
        may be shorter unless `drop_last`. The draws depend on the stream's seed, the task's index and its number of
        rows alone, so they are the same at every call.

        Parameters
        ----------
        epochs, steps
            The number of passes, or instead the number of batches, over as many reshuffled passes as they need.

        Raises
        ------
        UsageError
            If a number is out of range, or `drop_last` leaves no batch.
        """
        return draw_plan(
            len(task.train),
            (self.seed, "plan", task.index),
            epochs=epochs,
            batch_size=batch_size,
            drop_last=drop_last,
            steps=steps,
            shuffle=self.shuffle,
        )

    def batches_per_pass(self, task: Task, batch_size: int = 32, drop_last: bool = False) -> int:
        """Return the number of batches of one pass over `task.train`.

        Raises
        ------
        UsageError
            If `batch_size` is not positive, or `drop_last` leaves no batch.
        """
        return count_batches(len(task.train), batch_size, drop_last)

    def fingerprint(self) -> str:
        """Return a short digest of the scenario, the seed and the content of all tasks."""
        parts = [self.scenario, self.seed, self.columns, self.class_order, describe(self.prepare)]
        parts += [] if self.shuffle else ["in order"]
        for task in self.tasks:
            test = None if task.test is None else task.test.fingerprint()
            parts += [task.name, task.classes, task.train.fingerprint(), test]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def check_scenario(scenario: str, allowed: Sequence[str] = SCENARIOS) -> None:
    """Raise a `UsageError` unless `scenario` is one of those allowed."""
    if scenario in allowed:
        return
    choice = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
    if scenario in SCENARIOS:
        raise UsageError(
            f"scenario '{scenario}' does not fit here; choose {choice}, and make it of that: perdure.streams.{scenario}"
        )
    raise UsageError(f"unknown scenario '{scenario}'{nearest(str(scenario), allowed) or ';'} choose {choice}")


def draw_plan(
    rows: int,
    seed: Sequence[Part],
    *,
    epochs: int = 1,
    batch_size: int = 32,
    drop_last: bool = False,
    steps: int | None = None,
    shuffle: bool = True,
) -> Iterator[Tensor]:
    """Yield the batches of `epochs` shuffled passes over `rows` rows, or the first `steps` of as many as they need.

    The draws come from a new generator seeded with `derive(*seed)`. Without `shuffle` every pass is the rows in order,
    made batch by batch, so that no number of rows takes memory.

    Raises
    ------
    UsageError
        If a number is out of range, or `drop_last` leaves no batch.

    >>> [len(batch) for batch in draw_plan(5, (0, "plan", 0), epochs=2, batch_size=2)]
    [2, 2, 1, 2, 2, 1]
    """
    for name, value in (("epochs", epochs), ("steps", steps)):
        if value is not None and value < 0:
            raise UsageError(f"{name}={value} should not be negative")
    per_pass = count_batches(rows, batch_size, drop_last)
    total = epochs * per_pass if steps is None else steps
    if not shuffle:
        return _in_order(rows, batch_size, per_pass, total)
    return _shuffles(rows, batch_size, per_pass, total, generator(*seed))


def count_batches(rows: int, batch_size: int, drop_last: bool) -> int:
    """Return the number of batches of one pass over `rows` rows.

    Raises
    ------
    UsageError
        If `batch_size` is not positive, or `drop_last` leaves no batch.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} should be at least 1")
    if drop_last and rows < batch_size:
        raise UsageError(
            f"drop_last leaves no batch of {batch_size} from {rows} examples; "
            f"use batch_size={rows} or less, or drop_last=False"
        )
    return rows // batch_size if drop_last else -(-rows // batch_size)


def _shuffles(rows: int, batch_size: int, per_pass: int, total: int, draw: torch.Generator) -> Iterator[Tensor]:
    while total > 0:
        batches = torch.split(torch.randperm(rows, generator=draw), batch_size)[: min(per_pass, total)]
        yield from batches
        total -= len(batches)


def _in_order(rows: int, batch_size: int, per_pass: int, total: int) -> Iterator[Tensor]:
    for step in range(total):
        start = step % per_pass * batch_size
        yield torch.arange(start, min(start + batch_size, rows))


def _columns(tasks: Sequence[Task]) -> int:
    classes = [column for task in tasks for column in task.classes]
    if classes:
        return 1 + max(classes)
    targets = tasks[0].train.targets
    return 1 if targets.ndim == 1 else int(targets.shape[1])
