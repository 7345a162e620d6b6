"""The wrapper of knowledge distillation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from perdure.batch import Batch
from perdure.continual.boundaries import TaskId
from perdure.continual.penalty import nothing
from perdure.continual.wrapper import Wrapper
from perdure.methods.base import check_value
from perdure.methods.lwf import LwF
from perdure.streams.task import Task
from perdure.tree import as_tensors


class KnowledgeDistillation(Wrapper):
    """Train towards the outputs of the model as the last task left it, besides the targets.

    loss = (1 - alpha) * loss + alpha * T^2 * KL(softmax(teacher / T) || softmax(outputs / T)), mean over the rows. The
    first task has no teacher and is the plain loss, whatever alpha is. Hinton et al. 2015, arXiv 1503.02531; Li and
    Hoiem 2016, arXiv 1606.09282.

    Parameters
    ----------
    model
        Any module with outputs [rows, classes].
    temperature
        T: flattens both distributions; more than 0.
    alpha
        Weight of the distillation, 0 to 1; higher means more distillation.
    device
        Where to train; the model's own device if left out.

    >>> model = nn.Linear(3, 2)
    >>> distillation = KnowledgeDistillation(model)
    >>> x = torch.randn(8, 3)
    >>> distillation.get_distillation_loss(x, model(x)).item()
    0.0
    """

    method: TeacherAtEnd

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 2.0,
        alpha: float = 0.5,
        device: str | torch.device | None = None,
    ) -> None:
        check_value("KnowledgeDistillation", "temperature", temperature, 1e-6)
        check_value("KnowledgeDistillation", "alpha", alpha, 0.0, 1.0)
        super().__init__(model, distiller(temperature, alpha), device)

    def register_task(self, task_id: TaskId, dataloader: Any = None) -> None:
        """Name a task before or after its training; if there was any, the model as it is becomes the teacher.

        The loader is not needed: stored outputs of a shuffled or augmented loader would not belong to the inputs that
        come, so the teacher itself is kept and asked. Calling it again changes nothing.
        """
        self._register(task_id)

    def get_distillation_loss(self, inputs: Any, outputs: Tensor) -> Tensor:
        """`T^2 * KL` between the teacher's outputs on `inputs` and `outputs` [rows, classes], a scalar.

        It is differentiable with respect to `outputs` and not yet multiplied by alpha; 0 before there is a teacher.
        """
        self._follow(at_boundary=False)
        return self.method.distance(as_tensors(inputs), outputs)


class TeacherAtEnd(LwF):
    """LwF's term with the weight `strength`, the task's loss with the rest; the teacher is frozen when a task ends."""

    def has(self, hook: str) -> bool:
        return hook == "end_task" or super().has(hook)

    def begin_task(self, task: Task) -> None:
        """The teacher is that of the last end."""

    def on_batch(self, batch: Batch) -> Batch:
        if self.teacher is None:
            return batch
        return batch.with_sources(replace(batch.now, share=1.0 - self.strength), *batch.sources[1:])

    def end_task(self, task: Task) -> None:
        module = self.learner.parameters.module
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.teacher = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def distance(self, inputs: Any, outputs: Tensor) -> Tensor:
        """`T^2 * KL(teacher || outputs)`, mean over the rows; 0 without a teacher."""
        if self.teacher is None:
            return nothing(outputs)
        targets = self.teach(self.learner.forward.inputs(inputs))
        return self._divergence(outputs, targets, ()).mean() * self.temperature**2


def distiller(temperature: float, alpha: float) -> TeacherAtEnd:
    """The method behind the wrapper."""
    return TeacherAtEnd(strength=alpha, temperature=temperature, columns="all")
