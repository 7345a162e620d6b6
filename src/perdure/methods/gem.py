"""Gradient Episodic Memory: no step may raise the loss on any past task's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from perdure.errors import UsageError
from perdure.memory.task_memory import TaskMemory
from perdure.methods.base import Method, check_choice, check_count, check_value
from perdure.methods.projection import gem_projection, reference_gradient, without_idle
from perdure.methods.replay import columns_of
from perdure.registry import register
from perdure.seeding import derive
from perdure.tree import take

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner
    from perdure.parameters import Remap
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
        Examples kept of every task; 0 switches the method off.
    capacity
        Examples kept in total, divided by the stream's number of tasks, instead of `per_task`.
    margin
        Smallest v ("memory strength"): larger values move further towards old tasks once one is violated.
    eps
        Added to the diagonal of the Gram matrix.
    refresh
        Steps for which the memories' gradients are used before they are computed anew.
    batch_size
        Examples drawn from each memory for its gradient; all of them if null.
    writing
        "reservoir": a uniform sample of the task; "class_balanced": of each of its classes; "ring" and "class_ring":
        the newest examples.
    """

    per_task: int = 256
    capacity: int | None = None
    margin: float = 0.5
    eps: float = 1e-3
    refresh: int = 1
    batch_size: int | None = None
    writing: str = "reservoir"

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
        check_count(self.name, "refresh", self.refresh, 1)
        if self.batch_size is not None:
            check_count(self.name, "batch_size", self.batch_size, 1)
        check_choice(self.name, "writing", self.writing, ("reservoir", "class_balanced", "ring", "class_ring"))

    def has(self, hook: str) -> bool:
        return super().has(hook) and (self.per_task if self.capacity is None else self.capacity) != 0

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.memory = TaskMemory(derive(learner.seed, "buffer", self.name), self.writing)
        self.references: Tensor | None = None  # the memories' gradients [k, P], and for how many steps they were used
        self.age = 0

    def begin_task(self, task: Task) -> None:
        self.references = None
        self.memory.open(task.index, quota(self.learner, self.per_task, self.capacity))

    def resize(self, remap: Remap) -> None:
        super().resize(remap)
        if self.references is not None:
            self.references = torch.stack([remap(row, 0.0) for row in self.references])

    def project_gradient(self, grad: Tensor) -> None:
        if not self.memory.finished:
            return
        if self.references is None or self.age >= self.refresh:
            self._renew(grad)
        assert self.references is not None
        self.age += 1
        # What is idle now need not be idle while the same gradients are still used.
        rows = self.references if self.refresh == 1 else self.references.clone()
        for row in rows:
            without_idle(self.parameters, row)
        projected = gem_projection(rows, grad, self.margin, self.eps)
        if projected is not None:
            grad.copy_(projected)

    def _renew(self, grad: Tensor) -> None:
        memories = self.memory.finished
        if self.references is None or self.references.shape != (len(memories), len(grad)):
            self.references = grad.new_zeros(len(memories), len(grad))
        self.age = 0
        for row, memory in zip(self.references, memories, strict=True):
            if self.batch_size is not None:
                chosen = torch.randperm(len(memory["task"]), generator=self.generator)[: self.batch_size]
                memory = take(memory, chosen)
            reference_gradient(self.learner, memory["x"], memory["y"], memory["task"], row)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.age >= self.refresh:
            state["references"] = None  # the next step computes them anyway
        return state

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
