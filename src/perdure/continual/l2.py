"""The wrapper of the L2 anchor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perdure.continual.boundaries import TaskId
from perdure.continual.penalty import PenaltyWrapper
from perdure.methods.base import check_value
from perdure.methods.l2 import L2


class L2Regularization(PenaltyWrapper):
    """Penalise changes of the weights from their values after the last task.

    loss += importance / 2 * ||theta - anchor||^2. The method is `perdure.methods.L2`.

    Parameters
    ----------
    model
        Any module.
    importance
        Factor of the penalty (it counts half).
    device
        Where to train; the model's own device if left out.

    >>> model = nn.Linear(3, 2)
    >>> l2 = L2Regularization(model, importance=2.0)
    >>> l2.register_task(1)  # before the training of task 1, or after it: both are right
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
    >>> loss = l2.train_step(optimizer, nn.CrossEntropyLoss(), x, y, task_id=2)
    >>> bool(l2.get_regularization_loss() > 0)
    True
    """

    method: L2

    def __init__(self, model: nn.Module, importance: float = 1.0, device: str | torch.device | None = None) -> None:
        check_value("L2Regularization", "importance", importance)
        super().__init__(model, L2(strength=importance), device)

    def register_task(self, task_id: TaskId) -> None:
        """Name a task before or after its training; weights that were trained since the last one are kept as anchor.

        Calling it again changes nothing.
        """
        self._register(task_id)

    def get_regularization_loss(self) -> Tensor:
        """The penalty, a scalar to differentiate in a loop of your own; 0 before the first task ends."""
        return self._penalty_loss()
