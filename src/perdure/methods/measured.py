"""Anchored penalties whose importances are measured on a task's data when it ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from perdure.data.examples import Examples
from perdure.data.joined import own_examples
from perdure.errors import DataError, UsageError
from perdure.methods.base import check_choice, check_count, check_value
from perdure.methods.quadratic import AnchoredPenalty
from perdure.parameters import average_over_processes

if TYPE_CHECKING:
    from perdure.streams.task import Task

MODES = ("separate", "online")


@dataclass
class MeasuredPenalty(AnchoredPenalty):
    """Base of EWC and MAS, which differ in what they measure.

    Parameters
    ----------
    mode
        "separate": one term a task with an anchor of its own, merged exactly. "online": one running sum of importances,
        anchored where the last task left the weights.
    gamma
        Decay, 0 to 1, of what older tasks have gathered whenever a task ends. (Code that multiplies by gamma once more
        in the loss has a `strength` smaller by that factor.)
    n_samples
        Samples of the task to use, exactly so many: drawn at random, or the first that a loader gives. All by default.
    normalise
        Scale each task's importances to a maximum of 1.
    strength, solver, exclude
        See `AnchoredPenalty`.
    """

    mode: str = "separate"
    gamma: float = 1.0
    n_samples: int | None = None
    normalise: bool = False

    needs_task_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "mode", self.mode, MODES)
        check_value(self.name, "gamma", self.gamma, 0, 1)
        if self.n_samples is not None:
            check_count(self.name, "n_samples", self.n_samples, 1)

    def measure(
        self,
        batches: Iterable[tuple[Any, Tensor]],
        columns: slice | Tensor | None,
        names: Mapping[str, nn.Parameter],
    ) -> dict[str, Tensor]:
        """Importances, at least 0, of the named parameters on prepared batches and the active class columns."""
        raise UsageError(f"{type(self).__name__} has to say what it measures: def measure(self, batches, ...)")

    def end_task(self, task: Task) -> None:
        found = self.estimate(self.learner.task_batches(self._sampled(task)))
        theta = self.parameters.theta
        if self.mode == "online":
            old = self.gamma * self.importance if self.importance is not None else 0.0
            self.replace(found + old, theta.clone())
        else:
            if self.gamma != 1 and self.importance is not None:
                self.importance, self.constant = self.gamma * self.importance, self.gamma * self.constant
            self.absorb(found, theta)

    def _sampled(self, task: Task) -> Task:
        """The task with `n_samples` of its rows drawn at random: the first of sorted data are of one class."""
        data = own_examples(task.train)
        if self.n_samples is None or not isinstance(data, Examples) or len(data) <= self.n_samples:
            return task
        rows = torch.randperm(len(data), generator=self.generator)[: self.n_samples].sort().values
        return replace(task, train=data.batches(torch.split(rows, 256)))  # type: ignore[arg-type]

    def estimate(self, batches: Iterable[tuple[Any, Tensor]]) -> Tensor:
        """Importances [P] at the current weights on prepared batches, over the columns of the training loss."""
        learner = self.learner
        learner.forward.activate(learner.shown_task)
        names = {name: p for name, p in self.parameters.members.items() if p.requires_grad}
        packed = self.parameters.pack(self.measure(batches, learner.loss_columns(), names))
        found = self._in_scope(average_over_processes(learner.model, packed))
        if not bool(found.isfinite().all()):
            raise DataError(f"{self.name}: importances are not finite; training diverged or the data holds NaN")
        return found / found.max().clamp_min(torch.finfo(found.dtype).tiny) if self.normalise else found
