"""Averaged GEM: no step may raise the mean loss on a draw from all past tasks' memories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from perdure.errors import UsageError
from perdure.memory.buffer import Buffer
from perdure.memory.task_memory import TaskMemory
from perdure.methods.base import Method, check_choice, check_count, check_value
from perdure.methods.gem import quota
from perdure.methods.projection import agem_project, reference_gradients
from perdure.methods.replay import class_quota, columns_of
from perdure.registry import register
from perdure.seeding import derive
from perdure.tree import cat

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner
    from perdure.streams.task import Task


@register("agem")
@dataclass
class AGEM(Method):
    """Remove from the gradient what would raise the loss on a random draw from the past tasks' memories.

    With the reference gradient r of `batch_size` remembered examples: if g.r < 0, g <- g - (g.r / r.r) r; otherwise g
    keeps its bits. The reference never holds the current task.

    Chaudhry et al. 2019, arXiv 1812.00420. Where nobody says where tasks begin (an online stream), the whole stream is
    the past: one reservoir keeps `capacity` (or `per_task`) of its examples, each with the same probability.

    Parameters
    ----------
    per_task
        Examples kept of every task; 0 switches the method off.
    capacity
        Examples kept in total, divided by the stream's number of tasks, instead of `per_task`.
    batch_size
        Examples drawn for a reference gradient; 0 switches the method off.
    per_class
        Examples kept of every class of every task, instead of `per_task`.
    writing
        "reservoir": a uniform sample of the task (of each class with `per_class`); "ring": its newest examples.
    eps
        Added to r.r in the division, as some code does; a zero r leaves g alone without it too.
    """

    per_task: int = 256
    capacity: int | None = None
    batch_size: int = 256
    per_class: int | None = None
    writing: str = "reservoir"
    eps: float = 0.0

    summary: ClassVar[str] = "project gradients so that past tasks' memory does not get worse on average"
    paper: ClassVar[str] = "Chaudhry et al. 2019, arXiv 1812.00420"
    use_when: ClassVar[str] = (
        "task-incremental streams, one pass, some old examples may be kept; replay is usually stronger"
    )
    cost: ClassVar[str] = "time: one pass over batch_size rows a step; memory: M D + P"
    stores_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count(self.name, "per_task", self.per_task)
        check_count(self.name, "batch_size", self.batch_size)
        check_value(self.name, "eps", self.eps)
        check_choice(self.name, "writing", self.writing, ("reservoir", "ring"))
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
        seed = derive(learner.seed, "buffer", self.name)
        balanced = {"reservoir": "class_balanced", "ring": "class_ring"}
        self.memory = TaskMemory(seed, self.writing if self.per_class is None else balanced[self.writing])
        kept = self.per_task if self.capacity is None else self.capacity
        self.stream = Buffer(kept, seed=derive(seed, "stream"))

    def begin_task(self, task: Task) -> None:
        if self.per_class is not None:
            self.memory.open(task.index, class_quota(self.name, task, self.per_class))
        else:
            self.memory.open(task.index, quota(self.learner, self.per_task, self.capacity))

    def project_gradient(self, grad: Tensor) -> None:
        drawn = self._draw()
        if drawn is None:
            return
        found = reference_gradients(self.learner, drawn["x"], drawn["y"], drawn["task"])
        # What takes no part in this step (another task's head) is moved by no optimizer, so it cannot keep a promise.
        busy = {name: p.grad for name, p in self.parameters.members.items() if p.grad is not None and name in found}
        if busy:
            agem_project(list(busy.values()), [found[name] for name in busy], self.eps)

    @property
    def gathers(self) -> bool:
        return False

    def _draw(self) -> dict[str, Any] | None:
        """Rows of all finished tasks, and of what came while no task was announced, in proportion; None if none."""
        nameless, count = len(self.stream), self.batch_size
        if not nameless:
            return self.memory.draw(count, self.generator)
        old = len(self.memory)
        share = round(count * nameless / (old + nameless)) if old else count
        drawn: dict[str, Any] = self.stream.sample(share)
        del drawn["slot"]
        others = self.memory.draw(count - share, self.generator) if share < count else None
        return drawn if others is None else {name: cat([column, others[name]]) for name, column in drawn.items()}

    def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
        if batch.first_pass:
            memory = self.stream if batch.task is None else self.memory
            memory.add(columns_of(batch.now, batch.task))

    def end_task(self, task: Task) -> None:
        self.memory.close()
