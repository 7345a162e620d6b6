"""Joint training: the reference that no continual method is expected to beat."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from perdure.data.joined import JoinedExamples
from perdure.errors import UsageError
from perdure.methods.base import Method
from perdure.registry import register

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner
    from perdure.streams.task import Task


@register("joint")
@dataclass
class Joint(Method):
    """Train on the data of all tasks so far, from the initial weights, whenever a task arrives.

    The reference for every other method: what the model reaches if nothing has to be forgotten. Epochs count passes
    over all that data.

    Parameters
    ----------
    restart
        Begin every task from the initial weights, a fresh optimizer and a fresh schedule; otherwise go on from the
        current ones.
    """

    restart: bool = True

    summary: ClassVar[str] = "train on all data so far: the reference, not a continual method"
    paper: ClassVar[str] = "reference run; no single source"
    use_when: ClassVar[str] = "to know the ceiling: all old data must be kept"
    cost: ClassVar[str] = "time: t times the training of one task at task t; memory: all data"
    needs_boundaries: ClassVar[bool] = True
    needs_task_data: ClassVar[bool] = True
    stores_examples: ClassVar[bool] = True
    attachable: ClassVar[bool] = False
    owns: ClassVar[tuple[str, ...]] = ("training_data",)
    aligned: ClassVar[dict[str, float | str]] = {"initial": "theta"}
    transient: ClassVar[tuple[str, ...]] = ("_schedules", "_rates")

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.initial = self.parameters.theta.clone()
        self.buffers = {name: tensor.clone() for name, tensor in self.parameters.module.named_buffers()}
        self._schedules = [deepcopy(schedule.state_dict()) for schedule in learner.schedulers]
        self._rates = [float(group["lr"]) for group in learner.optimizers.groups()]

    def training_data(self, task: Task) -> Task:
        stream = self.learner.stream
        if stream is None:
            raise UsageError("'joint' needs the whole stream; call fit(stream)")
        if task.index >= len(stream):
            raise UsageError(f"'joint' knows the stream's {len(stream)} tasks alone; use replay for tasks beyond it")
        parts = [stream[index].train for index in range(task.index + 1)]
        return replace(task, train=JoinedExamples(parts, own=task.index))

    @torch.no_grad()
    def begin_task(self, task: Task) -> None:
        if self.restart and task.index > 0:
            self.parameters.theta.copy_(self.initial)
            for name, tensor in self.parameters.module.named_buffers():
                if name in self.buffers:  # a head that came later brought its own, which never change
                    tensor.copy_(self.buffers[name])
            self._restart_optimizers()

    def _restart_optimizers(self) -> None:
        self.learner.optimizers.reset()
        for schedule, state in zip(self.learner.schedulers, self._schedules, strict=True):
            schedule.load_state_dict(deepcopy(state))
        if self._schedules:
            for group, rate in zip(self.learner.optimizers.groups(), self._rates, strict=True):
                group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate

    def on_batch(self, batch: Batch) -> Batch:
        train = self.learner.task.train if self.learner.task is not None else None
        if self.learner.scenario != "task" or batch.index is None or not isinstance(train, JoinedExamples):
            return batch
        return batch.with_sources(replace(batch.now, tasks=train.owners(batch.index)), *batch.sources[1:])
