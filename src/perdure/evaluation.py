"""Scores on every task's test set: the class-incremental and the task-restricted view from the same forward passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from perdure.classes import among
from perdure.errors import DataError
from perdure.methods.side_passes import eval_mode
from perdure.streams.task import Stream, Task

if TYPE_CHECKING:
    from perdure.learner import Learner


@dataclass
class Evaluation:
    """Accuracies as fractions by task, NaN where a view is not defined, and the predictions behind them.

    Attributes
    ----------
    class_incremental
        The prediction is over all classes seen so far and no task is given.
    task_restricted
        The prediction is over the classes of the true task.
    predictions
        By view, one int16 array of predicted columns a task (None where not defined).
    """

    class_incremental: list[float] = field(default_factory=list)
    task_restricted: list[float] = field(default_factory=list)
    predictions: dict[str, list[np.ndarray | None]] = field(
        default_factory=lambda: {"class_incremental": [], "task_restricted": []}
    )

    def add(self, view: str, predicted: Tensor | None, targets: Tensor) -> None:
        """Append one task's predictions [n] and their accuracy to a view."""
        columns = None if predicted is None else predicted.numpy()
        correct = float("nan") if columns is None else np.count_nonzero(columns == targets.numpy()) / len(columns)
        getattr(self, view).append(correct)
        self.predictions[view].append(None if columns is None else columns.astype(np.int16))

    def scores(self, scenario: str) -> list[float]:
        """The view that belongs to a scenario."""
        return self.task_restricted if scenario == "task" else self.class_incremental


@torch.no_grad()
def evaluate(learner: Learner, stream: Stream, tasks: int | None = None) -> Evaluation:
    """Score the first `tasks` tasks of a stream (all by default); nothing of the learner changes.

    Where the forward pass depends on the task, each test set is a pass with its own task id, and the class-incremental
    view is defined only if a method predicts without being told.
    """
    result = Evaluation()
    with eval_mode(learner.model):
        batch_size = _batch_size(learner, stream)
        for task in stream:
            if tasks is not None and task.index >= tasks:
                for view in result.predictions:
                    result.add(view, None, torch.empty(0))
                continue
            if task.test is None:
                raise DataError(f"task '{task.name}' has no test examples; give the stream a test set")
            open_view, restricted = _predictions(learner, stream, task, batch_size)
            targets = task.test.targets
            if targets.is_floating_point():
                open_view = restricted = None  # a regression has no accuracy
            result.add("class_incremental", open_view, targets)
            result.add("task_restricted", restricted, targets)
    learner.forward.activate(learner.shown_task)
    return result


def _batch_size(learner: Learner, stream: Stream) -> int:
    first, forward = stream[0], learner.forward
    unknown = forward.depends_on_task and not _begun(learner, stream, first)
    if unknown or learner.hooks["predict"] or first.test is None or not len(first.test):
        return forward.widest_batch
    few, _ = first.test.gather(torch.arange(min(2, len(first.test))))
    return forward.batch_size(few, first.index if stream.scenario == "task" else None)


def _begun(learner: Learner, stream: Stream, task: Task) -> bool:
    """Whether the task may be asked for: its index has begun where tasks are told, else a class of it has come.

    A task that comes back has a new index, so its classes may be known before it begins.
    """
    if stream.scenario == "task":
        return task.index in learner.classes.by_task
    return any(column in learner.classes.seen for column in task.classes)


def _predictions(learner: Learner, stream: Stream, task: Task, batch_size: int) -> tuple[Tensor | None, Tensor | None]:
    """Predicted columns [n] on the CPU in the class-incremental and the task-restricted view."""
    known = any(column in learner.classes.seen for column in task.classes)
    shared = stream.shares_classes
    owner = learner.hooks["predict"]
    if not _begun(learner, stream, task) and not shared and (owner or learner.forward.depends_on_task):
        return None, None
    seen = () if shared and not known else learner.classes.seen
    columns = seen if shared else task.classes
    assert task.test is not None
    learner.passes["forward_rows"] += len(task.test)
    batches = (x for x, _, _ in task.test.ordered(batch_size))
    if owner:
        method, told = owner[0], None if shared or not stream.announced else task.index
        pairs = [(wide := method.predict(x, None), wide if told is None else method.predict(x, told)) for x in batches]
        wide, narrow = (torch.cat(predicted).cpu() for predicted in zip(*pairs, strict=True))
        return wide, narrow if shared or stream.announced else None  # who hides tasks cannot name them to the method
    answers: list[Tensor] = []
    for x in batches:
        answers.append(learner.forward(x, task.index if stream.scenario == "task" else None))
        if answers[-1].shape[1] <= max(task.classes, default=0):
            return None, None
    outputs = torch.cat(answers)
    narrow = among(outputs, columns).cpu()
    if shared:
        return narrow, narrow
    if not known or learner.forward.depends_on_task:
        return None, narrow
    return (narrow if columns == seen else among(outputs, seen).cpu()), narrow
