"""What all methods share that keep an older model's answers: a teacher run through the same module, and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.errors import IncompatibleError
from perdure.methods.base import Method, check_choice, check_value
from perdure.methods.frozen import Tensors, frozen_copy, run_frozen
from perdure.methods.side_passes import frozen_statistics

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner
    from perdure.streams.task import Task


class Distillation(Method):
    """Base of LwF, KD and MomentumKD, which differ in the teacher and in how its term is weighted.

    The term is `weight * T^2 * KL(softmax(z_teacher / T) || softmax(z / T))`, mean over the rows, over blocks of class
    columns.
    """

    temperature: float
    reduce: str
    rescale: bool
    replayed: bool

    regulariser: ClassVar[bool] = True
    distils_current: ClassVar[bool] = True
    ranks: ClassVar[dict[str, int]] = {"on_batch": 99}
    transient: ClassVar[tuple[str, ...]] = ("_rows",)

    def __post_init__(self) -> None:
        check_value(self.name, "temperature", self.temperature, 1e-6)
        check_choice(self.name, "reduce", self.reduce, ("mean", "sum"))

    @property
    def weight(self) -> float:
        """Factor of the term; 0 switches the method off."""
        raise NotImplementedError

    def teacher_tensors(self) -> Tensors | None:
        """Parameters and buffers of the teacher by name, or None while there is none."""
        raise NotImplementedError

    def column_blocks(self) -> list[list[int]]:
        """Blocks of class columns that are each normalised by themselves; one empty block is all of the teacher's."""
        raise NotImplementedError

    def has(self, hook: str) -> bool:
        if hook == "on_batch" and type(self).on_batch is Distillation.on_batch:
            return self.replayed and bool(self.weight)
        return super().has(hook) and bool(self.weight)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self._rows = 0

    def on_batch(self, batch: Batch) -> Batch:
        self._rows = batch.size  # of the whole batch, of which `loss` may see pieces
        return batch

    def loss(self, batch: Batch, outputs: Tensor) -> Tensor | None:
        teacher = self.teacher_tensors()
        if teacher is None:
            return None
        forward = self.learner.forward
        every = self.replayed and len(batch.sources) > 1
        inputs = forward.inputs(*forward.joined(batch.sources if every else (batch.now,)))
        student = outputs if every else batch.part("current", outputs)
        if forward.depends_on_task:
            # The pass of the current task has only its own head; all heads answer where no task is named.
            forward.activate(None)
            with frozen_statistics(self.learner.model):
                student = forward.call(inputs)
            self.learner.passes["forward_rows"] += len(student)
            self.learner.passes["backward_rows"] += len(student)
        targets = self.teach(inputs, teacher)
        if forward.depends_on_task:
            forward.activate(self.learner.shown_task)
        self.learner.passes["forward_rows"] += len(targets)
        terms = []
        for block in self.column_blocks() or [[]]:
            values = self._divergence(student, targets, block)
            terms.append(values.sum() / self._rows if every else batch.mean("current", values))
        total = torch.stack(terms).sum() if len(terms) > 1 else terms[0]
        if self.reduce == "mean" and len(terms) > 1:
            total = total / len(terms)
        return total * (self.weight * (self.temperature**2 if self.rescale else 1.0))

    def teach(self, inputs: Any, teacher: Tensors | None = None) -> Tensor:
        """The teacher's outputs [rows, columns] on prepared inputs, in evaluation mode."""
        tensors = teacher or self.teacher_tensors()
        assert tensors is not None
        return run_frozen(self.learner, tensors, inputs)

    def _divergence(self, student: Tensor, teacher: Tensor, block: Sequence[int]) -> Tensor:
        """KL divergence [rows] over a block's columns (all of the teacher's if empty); of a sequence, its mean."""
        columns = self.learner.classes.index(block)
        if columns is None:
            columns = slice(teacher.shape[-1])
        student, teacher = student[..., columns], teacher[..., columns]
        ours = F.log_softmax(student / self.temperature, -1)
        theirs = F.log_softmax(teacher / self.temperature, -1)
        values = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        return values if values.dim() == 1 else values.flatten(1).mean(1)

    def _check_heads(self, tasks: list[int]) -> None:
        for head in self.learner.forward.heads:
            if hasattr(head, "together") and not head.together(tasks):
                raise IncompatibleError(
                    f"'{self.name}' asks all heads at once, which cannot be told apart where tasks share class "
                    "columns; give every task columns of its own"
                )


def scale_shares(batch: Batch, factor: float) -> Batch:
    """The batch with the main loss of every source times `factor`."""
    pooled = sum(s.size for s in batch.sources if s.share is None)
    shares = [s.size / pooled if s.share is None else s.share for s in batch.sources]
    sources = zip(batch.sources, shares, strict=True)
    return batch.with_sources(*(replace(source, share=factor * share) for source, share in sources))


class SnapshotDistillation(Distillation):
    """The teacher is the model as it was before the task, over the class columns of the tasks before."""

    columns: str

    needs_boundaries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "columns", self.columns, ("old", "all"))

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.teacher: Tensors | None = None
        self.blocks: list[list[int]] = []

    def begin_task(self, task: Task) -> None:
        old = {index: list(c) for index, c in self.learner.classes.by_task.items() if index != task.index}
        if self.learner.tasks_begun < 2:
            return
        self._check_heads([*old, task.index])
        self.teacher = frozen_copy(self.learner.parameters.module)
        if self.learner.scenario == "task":
            self.blocks = list(old.values())
        elif self.columns == "old":
            columns = sorted({column for block in old.values() for column in block})
            self.blocks = [columns] if columns else []

    def teacher_tensors(self) -> Tensors | None:
        return self.teacher

    def column_blocks(self) -> list[list[int]]:
        return self.blocks
