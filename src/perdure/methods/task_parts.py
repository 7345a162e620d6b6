"""Which parts of a model belong to one task alone: its head or its rows of one head, its norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from perdure.errors import IncompatibleError, ModelError
from perdure.models.heads import MultiHead
from perdure.models.task_norm import TaskNorm
from perdure.parameters import ParameterVector

if TYPE_CHECKING:
    from perdure.learner import Learner
    from perdure.streams.task import Task


def output_layers(module: nn.Module, patterns: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The modules that give the outputs, by name.

    Those whose names match a pattern; else heads that grow or have a part a task; else the last layer, in the order in
    which the model registers them, that has parameters.

    Raises
    ------
    ModelError
        If a pattern matches nothing.
    """
    named = {name: each for name, each in module.named_modules() if name}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ModelError(f"no layer matches '{pattern}'; there are {', '.join(named) or 'none'}")
    if patterns:
        return {name: each for name, each in named.items() if any(fnmatchcase(name, p) for p in patterns)}
    heads = {name: each for name, each in named.items() if _is_head(each)}
    if heads:
        return heads
    layers = {name: each for name, each in named.items() if each._parameters and not isinstance(each, _NormBase)}
    if not layers:
        raise ModelError("the model is a single layer; a method that tells head and features apart needs two")
    last = list(layers)[-1]
    return {last: layers[last]}


def _is_head(module: nn.Module) -> bool:
    able = [callable(getattr(module, word, None)) for word in ("activate", "add", "grow")]
    return not isinstance(module, TaskNorm) and (able[2] or (able[0] and able[1]))


def check_plain_model(method: str, learner: Learner, does: str) -> None:
    """Raise IncompatibleError for a compiled or wrapped model, which would not notice what the method `does`."""
    module = learner.parameters.module
    if learner.model is not module or any(each._compiled_call_impl is not None for each in module.modules()):
        raise IncompatibleError(
            f"'{method}' {does}, which a compiled, DataParallel or DistributedDataParallel model does not see; pass "
            "the plain model"
        )


def check_heads(method: str, heads: Mapping[str, nn.Module]) -> None:
    """Raise IncompatibleError for a head that is neither one Linear layer nor has a part for every task."""
    for name, head in heads.items():
        if not isinstance(head, nn.Linear) and not callable(getattr(head, "activate", None)):
            raise IncompatibleError(
                f"'{method}' needs a head whose rows belong to one task each, and '{name}' is a "
                f"{type(head).__name__}; name one Linear layer with head=['...'], or build the model with a "
                "multi head"
            )


def check_own_rows(
    method: str, heads: Mapping[str, nn.Module], task: Task, classes: Mapping[int, Sequence[int]]
) -> None:
    """Raise IncompatibleError if a head that all tasks share has rows that `task` would take from an older one.

    `classes` are the columns of every task begun so far.
    """
    earlier = {column for index, columns in classes.items() if index != task.index for column in columns}
    wide = [name for name, head in heads.items() if isinstance(head, nn.Linear)]
    if wide and earlier & set(task.classes):
        raise IncompatibleError(
            f"'{method}' keeps every task's rows of the head '{wide[0]}', and task '{task.name}' has columns of "
            "an older one; build the model with a multi head"
        )


def below(parameters: ParameterVector, names: Sequence[str]) -> Tensor:
    """Boolean [P]: the parameters of these modules."""
    chosen = torch.zeros(parameters.layout.length, dtype=torch.bool, device=parameters.theta.device)
    for slot in parameters.layout:
        if any(slot.name.startswith(name + ".") for name in names):
            slot.view(chosen).fill_(True)
    return chosen


def of_norms(parameters: ParameterVector) -> Tensor:
    """Boolean [P]: the parameters of norms with a copy a task."""
    return below(parameters, [name for name, m in parameters.module.named_modules() if isinstance(m, TaskNorm)])


def of_other_tasks(
    parameters: ParameterVector,
    heads: Mapping[str, nn.Module],
    task: int,
    classes: Mapping[int, Sequence[int]],
) -> Tensor:
    """Boolean [P]: what belongs to tasks other than `task` alone.

    Their heads, their rows of a head that all share, their copies of norms. `classes` are the columns of every task
    begun so far; a column that the task has too is not another's.
    """
    other = torch.zeros(parameters.layout.length, dtype=torch.bool, device=parameters.theta.device)
    theirs = {column for index, columns in classes.items() if index != task for column in columns}
    rows = sorted(theirs - set(classes.get(task, ())))
    banks = _banks(parameters, heads)
    for slot in parameters.layout:
        bank = next((bank for bank in banks if slot.name.startswith(bank + ".")), None)
        if bank is not None:
            if not slot.name.startswith(f"{bank}.task_{task}."):
                slot.view(other).fill_(True)
            continue
        head = next((m for name, m in heads.items() if slot.name.startswith(name + ".")), None)
        if isinstance(head, nn.Linear) and rows and slot.shape[0] == head.out_features:
            slot.view(other)[[row for row in rows if row < head.out_features]] = True
    return other


def task_parameters(parameters: ParameterVector, heads: Mapping[str, nn.Module]) -> set[str]:
    """Names of the parameters that belong to one task each, or whose rows do: heads and copies of norms."""
    banks = _banks(parameters, heads)
    rows = {f"{name}.": head.out_features for name, head in heads.items() if isinstance(head, nn.Linear)}
    return {
        slot.name
        for slot in parameters.layout
        if any(slot.name.startswith(bank + ".") for bank in banks)
        or any(slot.name.startswith(name) and slot.shape[:1] == (count,) for name, count in rows.items())
    }


def _banks(parameters: ParameterVector, heads: Mapping[str, nn.Module]) -> list[str]:
    """The modules that hold a module a task: `BANK.task_3.weight` is a parameter of task 3."""
    banks = [f"{name}.norms" for name, m in parameters.module.named_modules() if isinstance(m, TaskNorm)]
    return banks + [f"{name}.heads" for name, m in heads.items() if isinstance(m, MultiHead)]
