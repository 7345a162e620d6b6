"""Elastic Weight Consolidation: weights that the old tasks depend on are pulled back harder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from perdure.data.examples import Examples
from perdure.errors import DataError
from perdure.methods.base import check_choice, check_count, check_value
from perdure.methods.fisher import ESTIMATORS, diagonal_fisher
from perdure.methods.quadratic import AnchoredPenalty
from perdure.parameters import average_over_processes
from perdure.registry import register

if TYPE_CHECKING:
    from perdure.streams.task import Task


@register("ewc")
@dataclass
class EWC(AnchoredPenalty):
    """Pull weights back in proportion to their Fisher information on the old tasks.

    loss += strength / 2 * sum_k sum_i F_k,i (theta_i - theta_k,i)^2, where F_k,i is the mean over the samples of task
    k of the squared derivative of log p(y|x) with respect to weight i, taken sample by sample.

    Kirkpatrick et al. 2017, arXiv 1612.00796; online form: Schwarz et al. 2018, arXiv 1805.06370.

    Parameters
    ----------
    strength
        Factor of the penalty (it counts half). 1000 is a place to start; tune it.
    mode
        "separate": one term a task, merged exactly. "online": one running term with decay `gamma`.
    gamma
        Decay of the older importances in online mode, 0 to 1.
    fisher
        "rademacher" (unbiased, one backward pass), "exact" (one a class), "sample" (a drawn label), "empirical" (the
        true label) or "predicted". They differ by orders of magnitude on a converged network.
    n_samples
        Samples of the task to use, exactly so many: drawn at random, or the first that a loader gives. All by default.
    normalise
        Scale each task's importances to a maximum of 1.
    solver, exclude
        See `AnchoredPenalty`.
    """

    strength: float = 1000.0
    mode: str = "separate"
    gamma: float = 1.0
    fisher: str = "rademacher"
    n_samples: int | None = None
    normalise: bool = False

    summary: ClassVar[str] = "pull weights back in proportion to their Fisher information on old tasks"
    paper: ClassVar[str] = "Kirkpatrick et al. 2017, arXiv 1612.00796"
    use_when: ClassVar[str] = (
        "no old data may be kept and the task is known at test time, or inputs change under fixed labels; alone it "
        "fails on class-incremental streams"
    )
    cost: ClassVar[str] = "time: one vector operation a step, one pass over the task at its end; memory: 2 P"
    needs_task_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "mode", self.mode, ("separate", "online"))
        check_choice(self.name, "fisher", self.fisher, tuple(ESTIMATORS))
        check_value(self.name, "gamma", self.gamma, 0, 1)
        if self.n_samples is not None:
            check_count(self.name, "n_samples", self.n_samples, 1)

    def end_task(self, task: Task) -> None:
        fisher = self.estimate(self.learner.task_batches(self._sampled(task)))
        theta = self.parameters.theta
        if self.mode == "separate":
            self.absorb(fisher, theta)
        else:
            old = self.gamma * self.importance if self.importance is not None else 0.0
            self.replace(fisher + old, theta.clone())

    def _sampled(self, task: Task) -> Task:
        """The task with `n_samples` of its rows drawn at random: the first of sorted data are of one class."""
        data: Any = task.train
        if self.n_samples is None or not isinstance(data, Examples) or len(data) <= self.n_samples:
            return task
        rows = torch.randperm(len(data), generator=self.generator)[: self.n_samples].sort().values
        return replace(task, train=data.batches(torch.split(rows, 256)))  # type: ignore[arg-type]

    def estimate(self, batches: Iterator[tuple[Any, Tensor]]) -> Tensor:
        """The Fisher diagonal [P] at the current weights on prepared batches, over the columns of the training loss."""
        learner = self.learner
        learner.forward.activate(learner.shown_task)
        found = diagonal_fisher(
            learner.parameters.module,
            batches,
            estimator=self.fisher,
            samples=self.n_samples,
            columns=learner.loss_columns(),
            generator=self.generator,
            names={name: p for name, p in self.parameters.members.items() if p.requires_grad},
        )
        fisher = average_over_processes(learner.model, self.parameters.pack(found))
        if not bool(fisher.isfinite().all()):
            raise DataError(
                f"{self.name}: the Fisher information is not finite; training diverged or the data holds NaN"
            )
        return fisher / fisher.max().clamp_min(1e-30) if self.normalise else fisher
