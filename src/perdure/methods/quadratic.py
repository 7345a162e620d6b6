"""The one object behind every penalty that pulls weights back: `strength / 2 * sum_i S_i (theta_i - mu_i)^2`.

Several anchors merge into one exactly (training-methods, principle 1), so memory and time do not grow with the number
of tasks: with importances F_k and anchors theta_k, S = sum F_k and mu = sum F_k theta_k / S.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from perdure.errors import PerdureWarning
from perdure.methods.base import PROX, Method, check_choice, check_value

if TYPE_CHECKING:
    from perdure.learner import Learner
    from perdure.parameters import Remap

SOLVERS = ("grad", "prox")


@dataclass
class AnchoredPenalty(Method):
    """Base of EWC, SI, MAS and L2, which differ in how they find importances.

    Parameters
    ----------
    strength
        Factor of the penalty, which counts half: `strength / 2 * sum S (theta - mu)^2`.
    solver
        "grad" adds the penalty's gradient `strength * S * (theta - mu)` to the loss gradient. "prox" solves for the
        penalty exactly after the optimizer's step, with the step's learning rate; it is stable for any strength and the
        same method under plain SGD, while under momentum and Adam it is decoupled from the moments, like AdamW's decay.
    exclude
        Names or patterns of parameters that stay free.
    """

    strength: float = 1.0
    solver: str = "grad"
    exclude: tuple[str, ...] = ()

    regulariser: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True
    ranks: ClassVar[dict[str, int]] = {"on_update": PROX}
    aligned: ClassVar[dict[str, float | str]] = {"importance": 0.0, "anchor": "theta"}
    transient: ClassVar[tuple[str, ...]] = ("_scaled",)

    def __post_init__(self) -> None:
        check_value(self.name, "strength", self.strength)
        check_choice(self.name, "solver", self.solver, SOLVERS)
        self.exclude = (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude)

    def has(self, hook: str) -> bool:
        if hook == "add_gradient":
            return bool(self.strength) and self.solver == "grad"
        if hook == "on_update":
            return bool(self.strength) and self.solver == "prox"
        return super().has(hook)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.importance: Tensor | None = None
        self.anchor: Tensor | None = None
        self.constant = 0.0
        self._forget_caches()

    def resize(self, remap: Remap) -> None:
        super().resize(remap)
        self._forget_caches()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._forget_caches()

    def _forget_caches(self) -> None:
        self._scaled: Tensor | None = None

    # -- consolidating --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def absorb(self, importance: Tensor, anchor: Tensor) -> None:
        """Merge one more task: its importances F [P], at least 0, and its weights [P]; neither is kept or changed."""
        importance = self._in_scope(importance)
        if self.importance is None or self.anchor is None:
            self.importance, self.anchor = torch.zeros_like(importance), anchor.clone()
        old, distance = self.importance, anchor - self.anchor
        total = old + importance
        tiny = torch.finfo(total.dtype).tiny
        part = torch.where(total > 0, importance / total.clamp_min(tiny), torch.zeros_like(total))
        self.constant += 0.5 * float((old * part * distance**2).sum(dtype=torch.float64))
        self.anchor = torch.where(total > 0, self.anchor + part * distance, anchor)
        self.replace(total, self.anchor)

    def replace(self, importance: Tensor, anchor: Tensor) -> None:
        """Set S [P] and mu [P] outright."""
        self.importance, self.anchor = self._in_scope(importance), anchor
        self._forget_caches()
        self.warn_if_stiff()

    def _in_scope(self, importance: Tensor) -> Tensor:
        if not self.exclude:
            return importance
        return importance * ~self.parameters.mask(self.exclude)

    def warn_if_stiff(self) -> None:
        """Warn where gradient steps on the penalty diverge at the current learning rate."""
        plain = all(isinstance(optimizer, torch.optim.SGD) for optimizer in self.learner.optimizers.all)
        if self.solver != "grad" or not plain or not self.strength or self.importance is None:
            return
        rate = max(self.learner.optimizers.learning_rates().values(), default=0.0)
        stiffness = rate * self.strength * float(self.importance.max())
        if stiffness > 2:
            warnings.warn(
                f"{self.name}: learning rate * strength * importance reaches {stiffness:.3g}, and above 2 gradient "
                "steps on the penalty diverge; use solver='prox' or a smaller strength",
                PerdureWarning,
                stacklevel=2,
            )

    # -- using ----------------------------------------------------------------------------------------------------

    def penalty(self) -> float:
        """The value of the penalty now, equal to the explicit sum over tasks."""
        if self.importance is None or self.anchor is None:
            return 0.0
        distance = (self.parameters.theta - self.anchor).double()
        return self.strength * (0.5 * float((self.importance.double() * distance**2).sum()) + self.constant)

    def _pull(self) -> Tensor | None:
        """`strength * S` [P], kept because it is needed at every step; None before the first task ends."""
        if self._scaled is None and self.importance is not None:
            self._scaled = self.strength * self.importance
        return self._scaled

    def start_gradient(self, grad: Tensor) -> bool:
        if type(self).add_gradient is not AnchoredPenalty.add_gradient:
            return False
        return self._write_pull(grad)

    def add_gradient(self, grad: Tensor) -> None:
        # Product and sum are rounded separately, so a buffer that starts as the penalty has the same bits.
        if self._write_pull(self.parameters.scratch):
            grad.add_(self.parameters.scratch)

    def _write_pull(self, into: Tensor) -> bool:
        """The penalty's gradient `strength * S * (theta - mu)` [P]; false before the first task ends."""
        scaled = self._pull()
        if scaled is None:
            return False
        assert self.anchor is not None
        torch.sub(self.parameters.theta, self.anchor, out=into).mul_(scaled)
        return True

    @torch.no_grad()
    def on_update(self, before: Tensor, theta: Tensor) -> None:
        """`theta <- (theta + a mu) / (1 + a)` with `a = lr * strength * S`; a weight on its anchor keeps its bits."""
        scaled = self._pull()
        if scaled is not None:
            assert self.anchor is not None
            a = scaled * self._rates()
            theta.sub_((theta - self.anchor) * (a / (1 + a)))

    def _rates(self) -> float | Tensor:
        """Learning rates of this step: a number if all are the same, else [P]; zero where a parameter is frozen."""
        groups = list(self.learner.optimizers.groups())
        members = self.parameters.members
        if len(groups) == 1 and all(p.requires_grad for p in members.values()):
            return float(groups[0]["lr"])
        rates = self.learner.optimizers.learning_rates()
        vector = torch.zeros_like(self.parameters.theta)
        for name, where in self.parameters.slices.items():
            vector[where] = rates.get(name, 0.0) if members[name].requires_grad else 0.0
        return vector
