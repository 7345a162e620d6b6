"""Synaptic Intelligence: importance is what each weight did for the loss along the path of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from perdure.errors import UsageError
from perdure.methods.base import check_choice
from perdure.methods.quadratic import AnchoredPenalty
from perdure.registry import register

if TYPE_CHECKING:
    from perdure.learner import Learner
    from perdure.streams.task import Task


@register("si")
@dataclass
class SI(AnchoredPenalty):
    """Pull weights back in proportion to what their movement contributed to the fall of the loss.

    Every step: w_i -= g_i (theta_i after - theta_i before), with the gradient g of the unpenalised loss before the
    step. At a task's end: Omega_i += max(0, w_i / ((theta_i - start_i)^2 + xi)); loss += strength / 2 * sum Omega
    (theta - anchor)^2, so strength is 2 c of the paper.

    Zenke et al. 2017, arXiv 1703.04200.

    Parameters
    ----------
    strength
        Factor of the penalty (it counts half): twice the paper's c.
    xi
        Keeps the importance of weights that hardly moved finite; more than 0.
    gradient
        Of what the path is the integral: "loss" (the paper: no penalty in it) or "total", the gradient with all
        penalties and projections before clipping, as in some published code.
    clamp
        Whether a task's negative importances count as 0; without it the sum may push weights away (solver "grad" only).
    solver, exclude
        See `AnchoredPenalty`.
    """

    strength: float = 1.0
    xi: float = 0.1
    gradient: str = "loss"
    clamp: bool = True

    summary: ClassVar[str] = "pull weights back in proportion to what their path did for the loss"
    paper: ClassVar[str] = "Zenke et al. 2017, arXiv 1703.04200"
    use_when: ClassVar[str] = "like EWC, where a second pass over the task's data is not possible"
    cost: ClassVar[str] = "time: four vector operations a step; memory: 4 P"
    needs_update: ClassVar[bool] = True
    ranks: ClassVar[dict[str, int]] = {**AnchoredPenalty.ranks, "project_gradient": 99, "observe_update": 99}
    aligned: ClassVar[dict[str, float | str]] = {"importance": 0.0, "anchor": "theta", "path": 0.0}
    task_sums: ClassVar[tuple[str, ...]] = ("path",)
    transient: ClassVar[tuple[str, ...]] = ("_kept", "_total", "_views")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.xi > 0:
            raise UsageError(f"si: xi is {self.xi!r}, it must be more than 0")
        check_choice(self.name, "gradient", self.gradient, ("loss", "total"))
        if not self.clamp and self.solver == "prox":
            raise UsageError("si: solver='prox' divides by 1 + importance, which must not be negative; leave clamp on")

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.path = torch.zeros_like(self.parameters.theta)
        self.anchor = self.parameters.theta.clone()

    def _forget_caches(self) -> None:
        super()._forget_caches()
        self._total: Tensor | None = None
        self._views: tuple[Tensor, list[Tensor], Tensor, list[Tensor]] | None = None

    @property
    def merges(self) -> bool:
        return self.clamp and super().merges

    @property
    def reads_arrivals(self) -> bool:
        return self.gradient == "loss"

    def has(self, hook: str) -> bool:
        if hook == "project_gradient":
            return self.gradient == "total"
        return super().has(hook)

    def project_gradient(self, grad: Tensor) -> None:
        # A copy: clipping changes `grad` in place, and so do optimizers (foreach SGD with nesterov).
        if self._total is None:
            self._total = grad.clone()
        else:
            self._total.copy_(grad)

    def observe_update(self, before: Tensor, theta: Tensor) -> None:
        delta = torch.sub(theta, before, out=before)
        if self._total is not None:
            self.path.addcmul_(self._total, delta, value=-1)
        else:
            self._follow_path(self.parameters.arrivals, delta)

    def _follow_path(self, gradients: Sequence[Tensor | None], delta: Tensor) -> None:
        """`path -= g * delta`, with g as one tensor a parameter."""
        if self._views is None or self._views[0] is not self.path or self._views[2] is not delta:
            views = self.parameters.views
            self._views = self.path, list(views(self.path).values()), delta, list(views(delta).values())
        taking = [(p, g, d) for p, g, d in zip(self._views[1], gradients, self._views[3], strict=True) if g is not None]
        if taking:
            path, gradient, movement = (list(column) for column in zip(*taking, strict=True))
            torch._foreach_addcmul_(path, gradient, movement, value=-1)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        theta = self.parameters.theta
        assert self.anchor is not None
        # Where xi is too small for the vector's type, what has not moved, gaps included, would be 0 / 0.
        gained = self.path / ((theta - self.anchor) ** 2 + self.xi).clamp_min(torch.finfo(theta.dtype).tiny)
        if self.clamp:
            gained = torch.relu(gained)
        self.path.zero_()
        self.replace(gained if self.importance is None else self.importance + gained, theta.clone())
