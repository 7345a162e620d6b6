"""Distillation from a running average of the model itself, which needs no task boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from perdure.methods.base import check_value
from perdure.methods.distillation import Distillation
from perdure.methods.frozen import Tensors
from perdure.registry import register

if TYPE_CHECKING:
    from perdure.learner import Learner


@register("momentum_kd")
@dataclass
class MomentumKD(Distillation):
    """Distil a running average of the weights, on every row, over all classes seen so far.

    After every update: average <- d * average + (1 - d) * theta, with d = min(decay, 1 - 1 / updates), so that the
    average is the plain mean of all weights so far until decay takes over, and the first weights are forgotten; running
    statistics are averaged alike. loss += strength * T^2 * KL(softmax(z_average / T) || softmax(z / T)).

    Michel et al. 2024, arXiv 2309.02870; the averaged teacher: Tarvainen and Valpola 2017, arXiv 1703.01780.

    Parameters
    ----------
    strength
        Weight of the term; 0 switches the method off.
    temperature, rescale
        See `LwF`.
    decay
        How much of the average every update keeps, 0 to 1: it remembers about 1 / (1 - decay) updates.
    reduce
        Over tasks, this one included, in the task-incremental scenario: "mean" or "sum".
    replayed
        Whether remembered rows of other methods are distilled too; the mean is then over all rows.
    """

    strength: float = 1.0
    temperature: float = 2.0
    decay: float = 0.99
    reduce: str = "mean"
    rescale: bool = True
    replayed: bool = True

    summary: ClassVar[str] = "keep the answers of a running average of the model; needs no task boundaries"
    paper: ClassVar[str] = "Michel et al. 2024, arXiv 2309.02870"
    use_when: ClassVar[str] = "beside replay, on streams without boundaries, where lwf has nobody to ask"
    cost: ClassVar[str] = "time: one more forward pass and a vector operation a step; memory: P"
    aligned: ClassVar[dict[str, float | str]] = {"average": "theta"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value(self.name, "strength", self.strength)
        check_value(self.name, "decay", self.decay, 0, 1)

    @property
    def weight(self) -> float:
        return self.strength

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        theta = self.parameters.theta
        # A small part of a bfloat16 number is lost when it is added to a whole one.
        self.average = theta.to(torch.promote_types(theta.dtype, torch.float32), copy=True)
        self.buffers: Tensors = {}
        self.updates = 0

    @torch.no_grad()
    def observe_update(self, before: Tensor, theta: Tensor) -> None:
        self.updates += 1
        part = max(1 - self.decay, 1 / self.updates)
        self.average.lerp_(theta.to(self.average.dtype), part)
        for name, now in self.parameters.module.named_buffers():
            kept = self.buffers.get(name)
            if kept is None or kept.shape != now.shape or kept.device != now.device or not now.is_floating_point():
                self.buffers[name] = now.clone()
            else:
                kept.lerp_(now, part)

    def teacher_tensors(self) -> Tensors | None:
        if not self.updates:
            return None
        if self.learner.scenario == "task":
            self._check_heads(list(self.learner.classes.by_task))
        views = self.parameters.views(self.average.to(self.parameters.theta.dtype))
        module = self.parameters.module
        # A head that has just grown has buffers that no update has seen.
        buffers = {n: self._buffer(n, b) for n, b in module.named_buffers()}
        names = [name for name, _ in module.named_parameters()]
        plain = {name: name.replace("_orig_mod.", "") for name in names}
        return {name: views[plain[name]] for name in names if plain[name] in views} | buffers

    def _buffer(self, name: str, now: Tensor) -> Tensor:
        kept = self.buffers.get(name)
        return now if kept is None or kept.shape != now.shape else kept

    def column_blocks(self) -> list[list[int]]:
        classes = self.learner.classes
        if self.learner.scenario == "task":
            return [list(columns) for columns in classes.by_task.values()]
        return [list(classes.seen)] if classes.seen else []
