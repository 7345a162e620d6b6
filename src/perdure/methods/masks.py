"""What SPG and HAT share: a mask on the movement of every weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from perdure.errors import IncompatibleError, UsageError
from perdure.methods.base import MASK, Method, check_choice
from perdure.models.task_norm import TaskNorm, split_norms

if TYPE_CHECKING:
    from perdure.learner import Learner
    from perdure.parameters import Remap
    from perdure.streams.task import Task


_UNUSED = {"update": "project_gradient", "gradient": "on_update"}
"""The hook that a mask leaves alone."""


class UpdateMask(Method):
    """Base of the methods that let weight i make only 1 - a_i of its step, with a fixed protection a [P] in a task.

    theta <- before + (1 - a) (theta - before) after the optimizer's step. A mask on the gradient is the same under
    plain SGD alone: Adam divides a constant factor out again, and momentum and weight decay move weights whose gradient
    is zero.

    A subclass is a dataclass with the fields `strength`, which switches it off at 0, and `mask_on`: "update", or
    "gradient", which is accepted with plain SGD only. It says in `protection` what a is.
    """

    strength: float
    mask_on: str

    regulariser: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True
    needs_train_task_id: ClassVar[bool] = True
    needs_test_task_id: ClassVar[bool] = True
    needs_update: ClassVar[bool] = True
    scenarios: ClassVar[frozenset[str]] = frozenset({"task"})
    # Banks and gates have to be there before another method takes a snapshot of the model; a mask comes after GEM.
    ranks: ClassVar[dict[str, int]] = {"begin_task": 10, "on_update": MASK, "project_gradient": 60}
    transient: ClassVar[tuple[str, ...]] = ("_protection", "_frozen", "_known")

    def protection(self) -> Tensor | None:
        """The vector a [P] of the open task, in [0, 1]; None where nothing is protected."""
        raise NotImplementedError

    def has(self, hook: str) -> bool:
        if hook == _UNUSED[self.mask_on] and getattr(type(self), hook) is getattr(UpdateMask, hook):
            return False
        return super().has(hook) and bool(self.strength)

    def __post_init__(self) -> None:
        check_choice(self.name, "mask_on", self.mask_on, tuple(_UNUSED))

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.forget_mask()
        if self.mask_on == "gradient":
            self._check_plain(learner)
        if self.strength:
            split_norms(self.parameters.module)

    def _check_plain(self, learner: Learner) -> None:
        for optimizer in learner.optimizers.all:
            plain = isinstance(optimizer, torch.optim.SGD)
            if not plain or any(group["momentum"] or group["weight_decay"] for group in optimizer.param_groups):
                raise IncompatibleError(
                    f"{self.name}: mask_on is 'gradient', and with momentum, moments or weight decay "
                    f"{type(optimizer).__name__} moves weights whose gradient is masked; use mask_on='update' or "
                    "plain SGD"
                )

    def resize(self, remap: Remap) -> None:
        super().resize(remap)
        self.forget_mask()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.forget_mask()

    def begin_task(self, task: Task) -> None:
        if not task.classes:
            raise UsageError(
                f"'{self.name}' protects old heads, so it has to know the class columns of task '{task.name}'; give "
                "begin_task() classes="
            )
        for module in self.parameters.module.modules():
            if isinstance(module, TaskNorm):
                module.add(task.index)
        self.forget_mask()

    def forget_mask(self) -> None:
        """Have `protection` asked again at the next step."""
        self._protection: Tensor | None = None
        self._frozen: Tensor | None = None
        self._known = False

    def _look_up(self) -> Tensor | None:
        if not self._known:
            found = self.protection()
            if found is not None and bool((found > 0).any()):
                self._protection = found.to(self.parameters.theta.dtype)
                frozen = self._protection == 1
                self._frozen = frozen if bool(frozen.any()) else None
            self._known = True
        return self._protection

    def project_gradient(self, grad: Tensor) -> None:
        a = self._look_up()
        if a is not None:
            grad.mul_(1 - a)
            if self._frozen is not None:
                grad.masked_fill_(self._frozen, 0.0)

    @torch.no_grad()
    def on_update(self, before: Tensor, theta: Tensor) -> None:
        a = self._look_up()
        if a is None:
            return
        theta.lerp_(before, a)
        if self._frozen is not None and (theta.device.type != "cpu" or not bool(theta.sum().isfinite())):
            # `lerp` is exact at both ends, but not for what is not finite: a frozen weight gets its bits back, whatever
            # came. A sum shows on a CPU that nothing did; elsewhere reading it would cost more than the restoring.
            torch.where(self._frozen, before, theta, out=theta)
