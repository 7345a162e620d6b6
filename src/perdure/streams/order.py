"""The order of a stream's tasks, and how difficult each is on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.data.examples import Examples
from perdure.errors import UsageError
from perdure.models.mlp import MLP
from perdure.registry import nearest
from perdure.seeding import derive, generator
from perdure.streams.classes import hold_out
from perdure.streams.task import Stream, Task

ORDERS = ("easy_to_hard", "hard_to_easy", "random")

HELD_OUT = 0.25
MOST_ROWS = 4000
HIDDEN = 32
UPDATES = 100
BATCH = 32
RATE = 1e-3


class Difficulty(NamedTuple):
    """Of one task: error rate and mean cross-entropy, in nats, on the held-out part of its training data."""

    error: float
    loss: float


def difficulties(stream: Stream) -> list[Difficulty]:
    """How difficult every task is when it is learned alone, from nothing.

    A quarter of the task's training rows (of every class alike; of at most 4,000 rows drawn) is held out. A network
    with one hidden layer of 32, on the flattened inputs, makes 100 updates of Adam (rate 0.001, batch 32) on the rest,
    and is scored on what was held out: the higher its error rate, and at the same rate its loss, the harder the task.
    Weights, rows and batches are drawn from the stream's seed and the task's number. The test sets are not read.

    That is the difficulty for a small network that has little time, which is what fine-tuning on a short task is; what
    is hard for another model may be something else. Tasks with more classes are harder by that alone.

    Raises
    ------
    UsageError
        If the targets are no classes or the inputs no tensors.

    >>> import perdure
    >>> [round(task.error, 2) for task in difficulties(perdure.benchmarks.split_digits())]
    [0.0, 0.03, 0.02, 0.0, 0.05]
    """
    return [_difficulty(stream, task) for task in stream]


def reordered(stream: Stream, order: str | Sequence[int]) -> Stream:
    """See `Stream.reordered`."""
    numbers = _numbers(stream, order)
    tasks = [replace(stream[number], index=index) for index, number in enumerate(numbers)]
    arrived = [column for task in tasks for column in task.classes]
    options = {**stream.options, "order": order if isinstance(order, str) else numbers}
    if not arrived or len(set(arrived)) < len(arrived) or len(arrived) < stream.columns:
        return stream.replace(tasks, options=options, class_order=_regrouped(stream, numbers))
    columns = torch.empty(stream.columns, dtype=torch.int64)
    columns[arrived] = torch.arange(len(arrived))
    return stream.replace(
        [_renumbered(task, columns) for task in tasks],
        options=options,
        class_names=[stream.class_names[column] for column in arrived],
        class_order=[stream.class_order[column] for column in arrived],
    )


def _numbers(stream: Stream, order: str | Sequence[int]) -> list[int]:
    """The tasks by number, in the order."""
    count = len(stream)
    if isinstance(order, str):
        if order not in ORDERS:
            hint = nearest(order.replace("-", "_"), ORDERS) or ";"
            raise UsageError(f"unknown order '{order}'{hint} choose {', '.join(ORDERS)}, or numbers such as 1,0")
        if order == "random":
            drawn: list[int] = torch.randperm(count, generator=generator(stream.seed, "task_order")).tolist()
            return drawn
        measured = difficulties(stream)
        return sorted(range(count), key=lambda number: measured[number], reverse=order == "hard_to_easy")
    numbers = [int(number) for number in order]
    if sorted(numbers) != list(range(count)):
        raise UsageError(f"order={numbers} should name each of the tasks 0 to {count - 1} once")
    return numbers


def _renumbered(task: Task, columns: Tensor) -> Task:
    def moved(examples: Examples) -> Examples:
        return examples.with_targets(columns[examples.targets])

    return replace(
        task,
        train=moved(task.train),
        test=None if task.test is None else moved(task.test),
        classes=tuple(columns[list(task.classes)].tolist()),
    )


def _regrouped(stream: Stream, numbers: Sequence[int]) -> list[int]:
    """The labels in their new order of arrival, where tasks share columns and each has labels of its own."""
    labels = list(stream.class_order)
    if len(labels) != len(stream) * stream.columns:
        return labels
    return [label for k in numbers for label in labels[k * stream.columns : (k + 1) * stream.columns]]


def _difficulty(stream: Stream, task: Task) -> Difficulty:
    seed = (stream.seed, "difficulty", task.index)
    targets = task.train.targets
    if targets.is_floating_point() or targets.ndim != 1:
        raise UsageError("an order by difficulty needs classes, and the targets of this stream are none; give numbers")
    draw = generator(*seed)
    drawn = torch.randperm(len(targets), generator=draw)[:MOST_ROWS]
    examples = task.train.subset(drawn)
    inputs = stream.prepare(examples.gather(torch.arange(len(drawn)))[0])
    if not isinstance(inputs, Tensor):
        raise UsageError("an order by difficulty needs inputs that are one tensor; give the order as numbers")
    classes, y = torch.unique(examples.targets, return_inverse=True)
    x = inputs.flatten(1).float()
    rows, held = hold_out(y, HELD_OUT, draw)
    if not len(held):
        raise UsageError(f"task {task.index} ('{task.name}') has too few rows to hold some out; give order= as numbers")
    model = MLP(math.prod(x.shape[1:]), [HIDDEN], len(classes), seed=derive(*seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(UPDATES):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=draw)]
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x[batch]), y[batch]))
        optimizer.step()
    with torch.no_grad():
        outputs = model(x[held])
        error = (outputs.argmax(1) != y[held]).double().mean()
        return Difficulty(float(error), float(F.cross_entropy(outputs, y[held])))
