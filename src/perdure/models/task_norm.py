"""Normalisation with a copy for every task.

Where a method keeps weights still so that old outputs stay, running statistics and affine parameters that all tasks
share would move those outputs all the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from perdure.errors import UnknownNameError

_START = "start"


class TaskNorm(nn.Module):
    """A normalisation layer, and one copy of it a task: statistics and affine parameters.

    The first task takes the layer itself, every later one starts as a copy of the latest. `activate` chooses.

    Parameters
    ----------
    norm
        A layer with running statistics or affine parameters.

    >>> norm = TaskNorm(nn.BatchNorm1d(2))
    >>> norm.add(0); norm.add(1)
    >>> norm.activate(0)
    >>> sorted(name for name, _ in norm.named_parameters())[:2]
    ['norms.task_0.bias', 'norms.task_0.weight']
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({_START: norm})
        self.active = _START
        self.training = norm.training

    def add(self, task: int, columns: Sequence[int] = ()) -> None:
        """Make the copy of a task, unless there is one, and activate it; `columns` are those of a head, unused here."""
        name = _name(task)
        if name not in self.norms:
            latest = max(self.norms, key=_order)
            if latest == _START:
                self.norms[name] = self.norms.pop(_START)
            else:
                self.norms[name] = copy.deepcopy(self.norms[latest])
        self.active = name

    def activate(self, task: int | None) -> None:
        """Normalise as for that task; None changes nothing.

        Raises
        ------
        UnknownNameError
            If that task has no copy yet.
        """
        if task is None:
            return
        if _name(task) not in self.norms:
            known = ", ".join(name.removeprefix("task_") for name in self.norms if name != _START) or "none"
            raise UnknownNameError(f"task {task} has no normalisation of its own; there is one for {known}")
        self.active = _name(task)

    @property
    def copy(self) -> nn.Module:
        """The layer of the active task."""
        return self.norms[self.active]

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.copy(x)
        return normalised

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        start = prefix + "norms."
        saved = {key.removeprefix(start).split(".")[0] for key in state_dict if key.startswith(start)}
        if saved and saved != set(self.norms):
            template = next(iter(self.norms.values()))
            kept = dict(self.norms.items())
            self.norms.clear()
            for name in sorted(saved, key=_order):
                spare = copy.deepcopy(template) if len(self.norms) else template
                self.norms[name] = kept.get(name, spare)
            self.active = max(self.norms, key=_order)
        super()._load_from_state_dict(state_dict, prefix, *args)


def split_norms(model: nn.Module) -> None:
    """Put a `TaskNorm` around every batch or instance norm of `model` that something in training would change.

    A layer that was frozen on purpose (in evaluation mode, without trainable parameters) is left to all tasks.
    """
    split = [module for module in model.modules() if isinstance(module, TaskNorm)]
    done = {norm for module in split for norm in module.norms.values()}
    made: dict[nn.Module, TaskNorm] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _NormBase) and child not in done and _changes(model, child):
                if child not in made:
                    made[child] = TaskNorm(child)
                parent._modules[name] = made[child]


def _changes(model: nn.Module, norm: _NormBase) -> bool:
    learns = any(parameter.requires_grad for parameter in norm.parameters())
    return learns or (norm.track_running_stats and (norm.training or not model.training))


def _name(task: int) -> str:
    return f"task_{task}"


def _order(name: str) -> int:
    return -1 if name == _START else int(name.removeprefix("task_"))
