"""Gradient Episodic Memory: no step may raise the loss on any past task's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from perdure.errors import UsageError
from perdure.memory.task_memory import TaskMemory
from perdure.methods.base import Method, check_count, check_value
from perdure.methods.projection import gem_projection, reference_gradient, without_idle
from perdure.methods.replay import columns_of
from perdure.registry import register
from perdure.seeding import derive

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner
    from perdure.streams.task import Task


@register("gem")
@dataclass
class GEM(Method):
    """Project the gradient onto the nearest one that has no negative product with any past task's memory gradient.

    If some <g, g_k> < 0: g <- g + G'v with v = argmin over v >= margin of v'(GG' + eps I)v / 2 + (Gg)'v, solved
    exactly.

    Lopez-Paz and Ranzato 2017, arXiv 1706.08840. The guarantee is about the gradient: momentum, Adam or clipping by
    value move along another direction.

    Parameters
    ----------
    per_task
        Examples kept of every task, a uniform sample of it; 0 switches the method off.
    capacity
        Examples kept in total, divided by the stream's number of tasks, instead of `per_task`.
    margin
        Smallest v ("memory strength"): larger values move further towards old tasks once one is violated.
    eps
        Added to the diagonal of the Gram matrix.
    """

    per_task: int = 256
    capacity: int | None = None
    margin: float = 0.5
    eps: float = 1e-3

    summary: ClassVar[str] = "project gradients so that no past task's memory gets worse (one constraint a task)"
    paper: ClassVar[str] = "Lopez-Paz and Ranzato 2017, arXiv 1706.08840"
    use_when: ClassVar[str] = "few tasks, some old examples may be kept, and backward transfer matters"
    cost: ClassVar[str] = "time: one pass over every past task's memory a step; memory: M D + k P"
    needs_boundaries: ClassVar[bool] = True
    needs_train_task_id: ClassVar[bool] = True
    stores_examples: ClassVar[bool] = True
    scenarios: ClassVar[frozenset[str]] = frozenset({"task", "domain", "class"})

    def __post_init__(self) -> None:
        check_count(self.name, "per_task", self.per_task)
        check_value(self.name, "margin", self.margin)
        check_value(self.name, "eps", self.eps)
        if self.capacity is not None:
            check_count(self.name, "capacity", self.capacity)

    def has(self, hook: str) -> bool:
        return super().has(hook) and (self.per_task if self.capacity is None else self.capacity) != 0

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.memory = TaskMemory(derive(learner.seed, "buffer", self.name))

    def begin_task(self, task: Task) -> None:
        self.memory.open(task.index, quota(self.learner, self.per_task, self.capacity))

    def project_gradient(self, grad: Tensor) -> None:
        if not self.memory.finished:
            return
        memories = [reference_gradient(self.learner, m["x"], m["y"], m["task"]) for m in self.memory.finished]
        rows = torch.stack([without_idle(self.parameters, memory) for memory in memories])
        projected = gem_projection(rows, grad, self.margin, self.eps)
        if projected is not None:
            grad.copy_(projected)

    def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
        if batch.first_pass:
            self.memory.add(columns_of(batch.now, batch.task))

    def end_task(self, task: Task) -> None:
        self.memory.close()


def quota(learner: Learner, per_task: int, capacity: int | None) -> int:
    """Examples of each task: `per_task`, or the capacity divided by the stream's number of tasks.

    Raises
    ------
    UsageError
        If there is no stream that says how many tasks share the capacity.
    """
    if capacity is None:
        return per_task
    if learner.stream is None:
        raise UsageError(
            f"capacity={capacity} is shared by all tasks of a stream, and a loop of your own does not say how many "
            "there are; give per_task= instead"
        )
    return capacity // len(learner.stream)
