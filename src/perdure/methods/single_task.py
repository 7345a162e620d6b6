"""A model with a part for every task, reduced to what one of them uses."""

from __future__ import annotations

import copy

from torch import nn

from perdure.models.heads import MultiHead, TaskHead
from perdure.models.task_norm import TaskNorm


def single_task(model: nn.Module, task: int) -> nn.Module:
    """A copy in evaluation mode, with plain layers in the place of norms and heads that have a part for every task.

    Raises
    ------
    UnknownNameError
        If a part has nothing for that task.
    """
    alone = copy.deepcopy(model)
    for parent in list(alone.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, TaskNorm):
                child.activate(task)
                parent._modules[name] = child.copy
            elif isinstance(child, MultiHead):
                child.activate(task)
                parent._modules[name] = _linear(child.part(task))
    return alone.eval()


def _linear(head: TaskHead) -> nn.Linear:
    plain = nn.Linear(head.in_features, head.out_features, device="meta")
    plain.weight, plain.bias = head.weight, head.bias
    return plain
