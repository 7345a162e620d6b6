"""The one object behind every penalty that pulls weights back: `strength / 2 * sum_i S_i (theta_i - mu_i)^2`.

Several anchors merge into one exactly (training-methods, principle 1), so memory and time do not grow with the number
of tasks: with importances F_k and anchors theta_k, S = sum F_k and mu = sum F_k theta_k / S. Several penalties on one
learner merge in the same way, each weighted by its strength, so that a step costs what it costs with one.
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
        "grad" adds the penalty's gradient `strength * S * (theta - mu)` to the loss gradient; under plain SGD, where
        nothing else needs their sum, the weights take that part of the step by itself. "prox" solves for the
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
    transient: ClassVar[tuple[str, ...]] = ("_kept", "_steps")

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
        self._kept: tuple[Tensor, Tensor] | tuple[()] | None = None
        self._steps: tuple[float, Tensor] | None = None
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
        for penalty in self._together():
            penalty._kept = penalty._steps = None

    # -- consolidating --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def absorb(self, importance: Tensor, anchor: Tensor) -> None:
        """Merge one more task: its importances F [P], at least 0, and its weights [P]; neither is kept or changed."""
        importance = self._in_scope(importance)
        if self.importance is None or self.anchor is None:
            self.importance, self.anchor = torch.zeros_like(importance), anchor.clone()
        total, mean, constant = merged(self.importance, self.anchor, importance, anchor)
        self.constant += float(constant)
        self.replace(total, mean)

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

    @property
    def pulls(self) -> bool:
        plain = type(self).add_gradient is AnchoredPenalty.add_gradient
        # One after the other, the second would pull weights that the first has moved.
        return plain and (self.merges or self.learner.hooks["add_gradient"] == [self])

    @property
    def merges(self) -> bool:
        """Whether this penalty is a quadratic with importances of at least 0 and nothing else, so that it can merge."""
        kind = type(self)
        plain = (kind.add_gradient, kind.on_update) == (AnchoredPenalty.add_gradient, AnchoredPenalty.on_update)
        return plain and self.has("add_gradient" if self.solver == "grad" else "on_update")

    def _together(self) -> list[AnchoredPenalty]:
        """The learner's penalties that the first of them adds as one, in a fixed order; itself if it stays alone."""
        if not self.merges:
            return [self]
        penalties = [m for m in self.learner.methods if isinstance(m, AnchoredPenalty) and m.solver == self.solver]
        return [penalty for penalty in penalties if penalty.merges]

    def _pull(self) -> tuple[Tensor, Tensor] | tuple[()]:
        """`strength * S` [P] and mu [P] of all penalties that this one adds, kept because every step needs them.

        Empty before the first task ends, and where another penalty adds this one too.
        """
        if self._kept is None:
            self._kept = self._combined()
        return self._kept

    def _combined(self) -> tuple[Tensor, Tensor] | tuple[()]:
        together = self._together()
        ready = [(p.strength * p.importance, p.anchor) for p in together if p.importance is not None]
        if together[0] is not self or not ready:
            return ()
        total, mean = ready[0]
        assert mean is not None
        for scaled, anchor in ready[1:]:
            assert anchor is not None
            total, mean, _ = merged(total, mean, scaled, anchor)
        return total, mean

    def start_gradient(self, grad: Tensor) -> bool:
        return type(self).add_gradient is AnchoredPenalty.add_gradient and self._write_pull(grad)

    def add_gradient(self, grad: Tensor) -> None:
        # Product and sum are rounded separately, so a buffer that starts as the penalty has the same bits.
        if self._write_pull(self.parameters.scratch):
            grad.add_(self.parameters.scratch)

    def _write_pull(self, into: Tensor) -> bool:
        """The penalty's gradient `strength * S * (theta - mu)` [P]; false before the first task ends."""
        pull = self._pull()
        if pull:
            torch.sub(self.parameters.theta, pull[1], out=into).mul_(pull[0])
        return bool(pull)

    @torch.no_grad()
    def descend(self) -> None:
        """The penalty's part of a plain gradient step: `theta <- theta + lr * strength * S (mu - theta)`.

        In place of `add_gradient`, before the optimizer's own part, where that is `theta -= lr * grad` alone.
        A parameter without a gradient stays where it is, as the optimizer would leave it.
        """
        pull = self._pull()
        if not pull:
            return
        theta, mu, a = self.parameters.theta, pull[1], self._step_sizes(pull[0])
        runs = self.parameters.taking_part()
        if runs is None:
            theta.lerp_(mu, a)
            return
        for run in runs:
            theta[run].lerp_(mu[run], a[run])

    def _step_sizes(self, scaled: Tensor) -> Tensor:
        """Learning rate times `strength * S` [P], kept while the rate is the same."""
        first, *others = self.learner.optimizers.groups()
        rate = float(first["lr"])
        if others:
            return scaled * self._rates()
        if self._steps is None or self._steps[0] != rate:
            self._steps = rate, scaled * rate
        return self._steps[1]

    @torch.no_grad()
    def on_update(self, before: Tensor, theta: Tensor) -> None:
        """`theta <- (theta + a mu) / (1 + a)` with `a = lr * strength * S`; a weight on its anchor keeps its bits."""
        pull = self._pull()
        if pull:
            a = pull[0] * self._rates()
            theta.sub_((theta - pull[1]) * (a / (1 + a)))

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


def merged(s: Tensor, mu: Tensor, importance: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One quadratic equal to the sum of two, all vectors [P]: its importance, its anchor, and its smallest value.

    `sum S/2 (t - mu)^2 + sum F/2 (t - a)^2 = sum (S + F)/2 (t - mean)^2 + constant`, without cancellation.
    """
    total, distance = s + importance, anchor - mu
    part = torch.where(total > 0, importance / total.clamp_min(torch.finfo(total.dtype).tiny), torch.zeros_like(total))
    constant = 0.5 * (s * part * distance**2).sum(dtype=torch.float64)
    return total, torch.where(total > 0, mu + part * distance, anchor), constant
