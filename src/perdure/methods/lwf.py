"""Learning without Forgetting: the new model keeps the old model's answers on the new inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from perdure.errors import IncompatibleError
from perdure.methods.base import Method, check_choice, check_value
from perdure.methods.side_passes import eval_mode, frozen_statistics
from perdure.registry import register

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner
    from perdure.streams.task import Task


@register("lwf")
@dataclass
class LwF(Method):
    """Distil the model as it was before the task, on the task's own inputs and the old classes.

    loss += strength * T^2 * KL(softmax(z_old / T) || softmax(z / T)), mean over the current rows; z_old are the
    teacher's outputs over the old columns: one block a past task in the task-incremental scenario, one block in all
    otherwise.

    Li and Hoiem 2016, arXiv 1606.09282; distillation: Hinton et al. 2015, arXiv 1503.02531.

    Parameters
    ----------
    strength
        Weight of the term.
    temperature
        T: flattens both distributions.
    reduce
        Over past tasks in the task-incremental scenario: "mean" or "sum".
    rescale
        Whether the factor T^2 is there, which keeps the gradient's size comparable for every T.
    columns
        Outside that scenario: "old", or "all" that the teacher has, also those of classes that had not come.
    """

    strength: float = 1.0
    temperature: float = 2.0
    reduce: str = "mean"
    rescale: bool = True
    columns: str = "old"

    summary: ClassVar[str] = "keep the old model's answers on new inputs (distillation)"
    paper: ClassVar[str] = "Li and Hoiem 2016, arXiv 1606.09282"
    use_when: ClassVar[str] = (
        "no old data may be kept and new inputs resemble old ones; weak alone on class-incremental streams"
    )
    cost: ClassVar[str] = "time: one more forward pass a step; memory: one copy of the model"
    regulariser: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True
    distils_current: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_value(self.name, "strength", self.strength)
        check_value(self.name, "temperature", self.temperature, 1e-6)
        check_choice(self.name, "reduce", self.reduce, ("mean", "sum"))
        check_choice(self.name, "columns", self.columns, ("old", "all"))

    def has(self, hook: str) -> bool:
        return super().has(hook) and bool(self.strength)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.teacher: dict[str, Tensor] | None = None
        self.blocks: list[list[int]] = []

    def begin_task(self, task: Task) -> None:
        old = {index: list(c) for index, c in self.learner.classes.by_task.items() if index != task.index}
        if self.learner.tasks_begun < 2:
            return
        for head in self.learner.forward.heads:
            if hasattr(head, "together") and not head.together([*old, task.index]):
                raise IncompatibleError(
                    "'lwf' asks all old heads at once, which cannot be told apart where tasks share class columns; "
                    "give every task columns of its own"
                )
        module = self.learner.parameters.module
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.teacher = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        if self.learner.scenario == "task":
            self.blocks = list(old.values())
        elif self.columns == "old":
            columns = sorted({column for block in old.values() for column in block})
            self.blocks = [columns] if columns else []

    def loss(self, batch: Batch, outputs: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        forward = self.learner.forward
        inputs = forward.inputs(batch.now.x)
        student = batch.part("current", outputs)
        if forward.depends_on_task:
            # The pass of the current task has only its own head; all heads answer where no task is named.
            forward.activate(None)
            with frozen_statistics(self.learner.model):
                student = forward.call(inputs)
            self.learner.passes["forward_rows"] += len(student)
            self.learner.passes["backward_rows"] += len(student)
        targets = self.teach(inputs)
        if forward.depends_on_task:
            forward.activate(self.learner.shown_task)
        self.learner.passes["forward_rows"] += len(targets)
        terms = [batch.mean("current", self._divergence(student, targets, block)) for block in self.blocks or [[]]]
        total = torch.stack(terms).sum() if len(terms) > 1 else terms[0]
        if self.reduce == "mean" and len(terms) > 1:
            total = total / len(terms)
        return total * (self.strength * (self.temperature**2 if self.rescale else 1.0))

    @torch.no_grad()
    def teach(self, inputs: Any) -> Tensor:
        """The teacher's outputs [rows, columns] on prepared inputs, in evaluation mode."""
        module, teacher = self.learner.parameters.module, self.teacher
        assert teacher is not None

        def run(*args: Any, **kwargs: Any) -> Any:
            return functional_call(module, teacher, args, kwargs)

        with eval_mode(module):
            return self.learner.forward.call(inputs, run)

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
