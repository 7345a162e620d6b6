"""The wrapper of Synaptic Intelligence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from perdure.continual.boundaries import TaskId
from perdure.continual.penalty import PenaltyWrapper
from perdure.errors import DivergedError
from perdure.methods.base import check_value
from perdure.methods.si import SI
from perdure.parameters import Remap


class SynapticIntelligence(PenaltyWrapper):
    """Penalise changes of weights in proportion to what their movement did for the loss of past tasks.

    loss += importance / 2 * sum Omega (theta - anchor)^2. The method is `perdure.methods.SI`: Zenke et al. 2017, arXiv
    1703.04200 (whose c is importance / 2).

    Parameters
    ----------
    model
        Any module.
    importance
        Factor of the penalty (it counts half).
    xi
        Keeps the importance of weights that hardly moved finite; more than 0.
    device
        Where to train; the model's own device if left out.

    In a loop of your own, `update_importance` stands between `backward()` and `step()`:

    >>> model = nn.Linear(3, 2)
    >>> si = SynapticIntelligence(model)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
    >>> si.register_task(1)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     loss.backward()
    ...     si.update_importance(loss)
    ...     optimizer.step()
    >>> si.register_task(2)
    >>> bool(si.method.importance.sum() > 0)
    True
    """

    method: SI

    def __init__(
        self, model: nn.Module, importance: float = 1.0, xi: float = 0.1, device: str | torch.device | None = None
    ) -> None:
        check_value("SynapticIntelligence", "importance", importance)
        super().__init__(model, SI(strength=importance, xi=xi), device)
        self._waiting: tuple[Tensor, Tensor] | None = None
        self._penalised: Tensor | None = None

    def register_task(self, task_id: TaskId) -> None:
        """Name a task before or after its training; what was trained since the last one is consolidated.

        Calling it again changes nothing.
        """
        self._register(task_id)

    def update_importance(self, loss: Tensor | float) -> None:
        """Take the gradients of the step that comes, after `backward()` and before `optimizer.step()`.

        They count when the step has been taken: at the next call of any method. A penalty from
        `get_regularization_loss` that took part in the backward pass is subtracted, for the path is one of the task's
        own loss.

        Raises
        ------
        DivergedError
            If `loss` is not finite (it is used for nothing else).
        """
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if not math.isfinite(value):
            raise DivergedError(
                f"training diverged: the loss is {value}; lower the learning rate or the importance, or look for NaN "
                "in the inputs"
            )
        self._follow(at_boundary=False)
        self._settle()
        parameters = self.learner.parameters
        gradient = parameters.pack({n: p.grad for n, p in parameters.members.items() if p.grad is not None})
        if self._penalised is not None:
            pull = torch.zeros_like(gradient)
            self.method.add_gradient(pull)
            gradient.sub_(pull.mul_(self._penalised))
            self._penalised = None
        self._waiting = gradient, parameters.theta.clone()
        self._boundaries.steps += 1

    def get_regularization_loss(self) -> Tensor:
        """The penalty, a scalar to differentiate in a loop of your own; 0 before the first task ends."""
        value = self._penalty_loss()
        if self.method.importance is not None and value.requires_grad:
            value.register_hook(self._note)  # type: ignore[no-untyped-call]
        return value

    def _note(self, factor: Tensor) -> None:
        """The backward pass went through the penalty, with this factor before it."""
        self._penalised = factor.detach() if self._penalised is None else self._penalised + factor.detach()

    def _settle(self) -> None:
        if self._waiting is not None:
            gradient, before = self._waiting
            parameters = self.learner.parameters
            parameters.arrivals = list(parameters.views(gradient).values())
            self.method.observe_update(before, parameters.theta)
            self._waiting = None

    def _added_loss(self) -> Tensor | None:
        # The step that comes sets the gradients to None, those of any backward pass before it too.
        self._penalised = None
        return super()._added_loss()

    def _begin(self, task_id: TaskId) -> None:
        super()._begin(task_id)
        # Training before it that belongs to no task does not count as the task's path.
        self.method.path.zero_()
        if self.method.importance is None:
            self.method.anchor = self.learner.parameters.theta.clone()

    def _resize(self, remap: Remap) -> None:
        super()._resize(remap)
        if self._waiting is not None:
            gradient, before = self._waiting
            self._waiting = remap(gradient, 0.0), remap(before, self.learner.parameters.theta)

    def _vectors(self) -> list[Tensor]:
        return [*super()._vectors(), *(self._waiting or ())]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "waiting": None if self._waiting is None else list(self._waiting)}

    def _load(self, state: dict[str, Any]) -> None:
        device = self.learner.parameters.theta.device
        waiting = state["waiting"]
        self._waiting = None if waiting is None else (waiting[0].to(device), waiting[1].to(device))
