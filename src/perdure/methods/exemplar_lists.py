"""Exemplars: a few ordered rows of every class, chosen by herding, that are trained on with each later task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.data.examples import Examples
from perdure.data.joined import JoinedExamples
from perdure.errors import DataError, IncompatibleError, UsageError
from perdure.memory.selection import herding
from perdure.methods.base import Method, check_count
from perdure.methods.features import features_of
from perdure.streams.task import Task
from perdure.tree import cat, leaves, rows, take, tree_map

if TYPE_CHECKING:
    from perdure.learner import Learner


class Exemplars:
    """Rows of each class in the order in which they were chosen, as they were stored, on the CPU.

    A smaller quota keeps the first of each class, which is what a shorter herding would have chosen.

    Attributes
    ----------
    rows
        Inputs [m, ...] (a tensor or a tree of tensors) by class column.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Any] = {}

    def __len__(self) -> int:
        return sum(map(rows, self.rows.values()))

    def cut(self, quota: int) -> None:
        """Keep the first `quota` rows of every class."""
        self.rows = {label: tree_map(lambda leaf: leaf[:quota].clone(), x) for label, x in self.rows.items()}

    def examples(self, chosen: Mapping[int, Tensor] | None = None) -> Examples | None:
        """The rows as one set of examples, class after class, or `chosen` rows [m] of each; None if there are none."""
        parts = {label: x if chosen is None else take(x, chosen[label]) for label, x in sorted(self.rows.items())}
        parts = {label: x for label, x in parts.items() if rows(x)}
        if not parts:
            return None
        labels = [torch.full((rows(x),), label) for label, x in parts.items()]
        return Examples(cat(list(parts.values())), torch.cat(labels))

    def bytes(self) -> int:
        """Bytes of all stored inputs."""
        return sum(leaf.nbytes for x in self.rows.values() for leaf in leaves(x))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": dict(self.rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows = {int(label): tree_map(lambda leaf: leaf.cpu().clone(), x) for label, x in state["rows"].items()}


class ExemplarMethod(Method):
    """Base of iCaRL, WA and BiC: exemplars join each task's data, and are chosen when it ends."""

    capacity: int | None
    per_class: int | None
    layer: str | None
    normalise: bool = True
    selection: str = "herding"

    needs_boundaries: ClassVar[bool] = True
    needs_task_data: ClassVar[bool] = True
    stores_examples: ClassVar[bool] = True
    attachable: ClassVar[bool] = False

    _own: Examples | None

    def __post_init__(self) -> None:
        if (self.capacity is None) == (self.per_class is None):
            raise UsageError(
                f"{self.name}: capacity is {self.capacity} and per_class is {self.per_class}; give one of them and set "
                "the other to None (null)"
            )
        for argument in ("capacity", "per_class"):
            if getattr(self, argument) is not None:
                check_count(self.name, argument, getattr(self, argument))

    def has(self, hook: str) -> bool:
        return Method.has(self, hook) and 0 not in (self.capacity, self.per_class)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.exemplars = Exemplars()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.learner.task is None:
            state["teacher"] = None  # the next task begins with a copy of the model as it is now
        return state

    def own_data(self, task: Task) -> Examples:
        """The task's own examples, checked."""
        if self.learner.forward.depends_on_task:
            raise IncompatibleError(
                f"'{self.name}' compares the outputs of all classes at once, and this model gives other answers for "
                "other tasks; use one head for all classes, wide or growing"
            )
        data = task.train
        if not isinstance(data, Examples):
            raise UsageError(
                f"{self.name}: exemplars are chosen among the task's examples and join them; pass arrays or a data "
                "set, and train on learner.task.train"
            )
        if not task.classes:
            raise UsageError(
                f"{self.name}: the classes of task '{task.name}' have to be known; give begin_task() classes="
            )
        others = set(torch.unique(data.targets).tolist()) - set(task.classes)
        if others:
            raise DataError(f"task '{task.name}' has rows of class {min(others):g}, which is none of {task.classes}")
        return data

    def joined(self, task: Task, own: Examples, further: Examples | None) -> Task:
        """The task with `own` and further examples as its data."""
        return replace(task, train=own if further is None else JoinedExamples([own, further], own=0))

    def choose_exemplars(self, data: Examples) -> None:
        """Cut the old classes' lists to the new quota, and herd as many of each class in `data`.

        A class that has come before is chosen anew, from its new rows and its exemplars.
        """
        labels: list[int] = torch.unique(data.targets).tolist()
        quota = self._quota(len({*self.exemplars.rows, *labels}))
        self.exemplars.cut(quota)
        for label in labels:
            x, _ = data.gather((data.targets == label).nonzero()[:, 0])
            x = tree_map(Tensor.cpu, x)
            if label in self.exemplars.rows:
                x = cat([self.exemplars.rows[label], x])
            self.exemplars.rows[label] = take(x, self._order(x, quota))

    def _order(self, x: Any, quota: int) -> Tensor:
        """Which rows of a class to keep, the most important first: int64 [min(quota, rows)]."""
        if self.selection == "random":
            return torch.randperm(rows(x), generator=self.generator)[:quota]
        features = self.features(x)
        return herding(features, quota, self.mean(features)).cpu()

    def features(self, x: Any) -> Tensor:
        """Features [rows, d] of stored rows, of length 1 if the method normalises."""
        return features_of(self.learner, x, self.layer, self.normalise)

    def mean(self, features: Tensor) -> Tensor:
        """Mean [d] of features, of length 1 again if the method normalises."""
        mean = features.mean(0)
        return F.normalize(mean, dim=0) if self.normalise else mean

    def _quota(self, classes: int) -> int:
        if self.per_class is not None:
            return self.per_class
        assert self.capacity is not None
        if self.capacity < classes:
            raise UsageError(
                f"{self.name}: capacity is {self.capacity} and there are {classes} classes; give at least one exemplar "
                "a class"
            )
        return self.capacity // classes
