"""Averaged GEM: no step may raise the mean loss on a draw from all past tasks' memories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from perdure.errors import UsageError
from perdure.memory.task_memory import TaskMemory
from perdure.methods.base import Method, check_count, check_value
from perdure.methods.gem import quota
from perdure.methods.projection import agem_projection, reference_gradient, without_idle
from perdure.methods.replay import class_quota, columns_of
from perdure.registry import register
from perdure.seeding import derive

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner
    from perdure.streams.task import Task


@register("agem")
@dataclass
class AGEM(Method):
    """Remove from the gradient what would raise the loss on a random draw from the past tasks' memories.

    With the reference gradient r of `batch_size` remembered examples: if g.r < 0, g <- g - (g.r / r.r) r; otherwise g
    keeps its bits. The memory never holds the current task.

    Chaudhry et al. 2019, arXiv 1812.00420.

    Parameters
    ----------
    per_task
        Examples kept of every task, a uniform sample of it; 0 switches the method off.
    capacity
        Examples kept in total, divided by the stream's number of tasks, instead of `per_task`.
    batch_size
        Examples drawn for a reference gradient; 0 switches the method off.
    per_class
        Examples kept of every class of every task, instead of `per_task`.
    eps
        Added to r.r in the division, as some code does; a zero r leaves g alone without it too.
    """

    per_task: int = 256
    capacity: int | None = None
    batch_size: int = 256
    per_class: int | None = None
    eps: float = 0.0

    summary: ClassVar[str] = "project gradients so that past tasks' memory does not get worse on average"
    paper: ClassVar[str] = "Chaudhry et al. 2019, arXiv 1812.00420"
    use_when: ClassVar[str] = (
        "task-incremental streams, one pass, some old examples may be kept; replay is usually stronger"
    )
    cost: ClassVar[str] = "time: one pass over batch_size rows a step; memory: examples and P"
    needs_boundaries: ClassVar[bool] = True
    stores_examples: ClassVar[bool] = True
    scenarios: ClassVar[frozenset[str]] = frozenset({"task", "domain", "class"})
    transient: ClassVar[tuple[str, ...]] = ("_reference",)

    def __post_init__(self) -> None:
        check_count(self.name, "per_task", self.per_task)
        check_count(self.name, "batch_size", self.batch_size)
        check_value(self.name, "eps", self.eps)
        if self.capacity is not None:
            check_count(self.name, "capacity", self.capacity)
        if self.per_class is not None:
            check_count(self.name, "per_class", self.per_class)
            if self.capacity is not None:
                raise UsageError(f"{self.name}: capacity and per_class are both given; give one of them")

    def has(self, hook: str) -> bool:
        given = self.per_class if self.capacity is None else self.capacity
        kept = self.per_task if given is None else given
        return super().has(hook) and kept != 0 and self.batch_size != 0

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        writing = "reservoir" if self.per_class is None else "class_balanced"
        self._reference: Tensor | None = None
        self.memory = TaskMemory(derive(learner.seed, "buffer", self.name), writing)

    def begin_task(self, task: Task) -> None:
        if self.per_class is not None:
            self.memory.open(task.index, class_quota(self.name, task, self.per_class))
        else:
            self.memory.open(task.index, quota(self.learner, self.per_task, self.capacity))

    def project_gradient(self, grad: Tensor) -> None:
        drawn = self.memory.draw(self.batch_size, self.generator)
        if drawn is None:
            return
        if self._reference is None or self._reference.shape != grad.shape:
            self._reference = torch.zeros_like(grad)
        reference = reference_gradient(self.learner, drawn["x"], drawn["y"], drawn["task"], self._reference)
        agem_projection(grad, without_idle(self.parameters, reference), self.eps, out=grad)

    def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
        if batch.first_pass:
            self.memory.add(columns_of(batch.now, batch.task))

    def end_task(self, task: Task) -> None:
        self.memory.close()
