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

EVALUATION_BATCH = 256


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
        correct = float("nan") if predicted is None else float((predicted == targets).double().mean())
        getattr(self, view).append(correct)
        self.predictions[view].append(None if predicted is None else predicted.to(torch.int16).numpy())

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
        for task in stream:
            if tasks is not None and task.index >= tasks:
                for view in result.predictions:
                    result.add(view, None, torch.empty(0))
                continue
            if task.test is None:
                raise DataError(f"task '{task.name}' has no test examples; give the stream a test set")
            open_view, restricted = _predictions(learner, stream, task)
            targets = task.test.targets
            if targets.is_floating_point():
                open_view = restricted = None  # a regression has no accuracy
            result.add("class_incremental", open_view, targets)
            result.add("task_restricted", restricted, targets)
    learner.forward.activate(learner.shown_task)
    return result


def _predictions(learner: Learner, stream: Stream, task: Task) -> tuple[Tensor | None, Tensor | None]:
    """Predicted columns [n] on the CPU in the class-incremental and the task-restricted view."""
    known = any(column in learner.classes.seen for column in task.classes)
    shared = stream.scenario == "domain"
    owner = learner.hooks["predict"]
    if not known and not shared and (owner or learner.forward.depends_on_task):
        return None, None
    wide: list[Tensor] = []
    narrow: list[Tensor] = []
    seen = () if shared and not known else learner.classes.seen
    columns = seen if shared else task.classes
    open_defined = (known or shared) and not (learner.forward.depends_on_task and not owner)
    assert task.test is not None
    for x, _, _ in task.test.ordered(EVALUATION_BATCH):
        learner.passes["forward_rows"] += len(_)
        if owner:
            wide.append(owner[0].predict(x, None))
            narrow.append(wide[-1] if shared else owner[0].predict(x, task.index))
            continue
        outputs = learner.forward(x, task.index if stream.scenario == "task" else None)
        if outputs.shape[1] <= max(task.classes, default=0):
            return None, None
        narrow.append(among(outputs, columns))
        if open_defined:
            wide.append(narrow[-1] if columns == seen else among(outputs, seen))
    if shared:
        return torch.cat(narrow).cpu(), torch.cat(narrow).cpu()
    return (torch.cat(wide).cpu() if open_defined and wide else None), torch.cat(narrow).cpu()
