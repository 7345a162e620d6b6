"""Look-ahead meta-learning: step along the gradient that comes after a few steps on the current batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from perdure.memory.buffer import Buffer
from perdure.methods.base import Method, check_choice, check_count, check_value
from perdure.methods.fast_weights import FastWeights, hand_over
from perdure.methods.replay import FORWARDS, add_drawn, columns_of, draw_size
from perdure.methods.side_passes import frozen_statistics
from perdure.registry import register
from perdure.seeding import derive

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner


@register("look_ahead")
@dataclass
class LookAhead(Method):
    """Take `inner_steps` trial steps on the current batch, and use the gradient found there on old and new rows.

    fast = theta; inner_steps times: fast <- fast - inner_lr grad CE(batch; fast); then the optimizer steps theta along
    the gradient of CE(batch; fast) + CE(memory; fast) at fast.

    First-order look-ahead MAML: La-MAML (Gupta et al. 2020, arXiv 2007.13904) with one rate for all weights; also
    taught as "online meta-learning". The learner's optimizer makes the outer step (Adam with lr 0.001 by default), so
    its schedule, groups and clipping hold for it. With `inner_lr=0` it is replay with summed losses. What is minimised
    is the loss after the trial steps: where they lead far (a large `inner_lr` times `inner_steps`), the weights before
    them need not be good for anything.

    Batch normalisation: trial steps leave running statistics alone, the outer pass is a training pass like any other.

    Parameters
    ----------
    capacity
        Examples kept in total, a uniform sample of the stream; 0 switches the method off.
    inner_lr
        Rate of the trial steps.
    inner_steps
        Number of trial steps.
    ratio
        Remembered rows for each current row; 0 switches the method off.
    batch_size
        Remembered rows a step, instead of `ratio`.
    forward
        "joint": one outer pass over all rows; "separate": remembered rows have their own (batch statistics differ).
    """

    capacity: int = 1000
    inner_lr: float = 0.01
    inner_steps: int = 5
    ratio: float = 1.0
    batch_size: int | None = None
    forward: str = "joint"

    summary: ClassVar[str] = "look ahead a few steps on the new batch, then step where old and new rows want to go"
    paper: ClassVar[str] = "Gupta et al. 2020, arXiv 2007.13904 (first order, one rate)"
    use_when: ClassVar[str] = "online streams, some old examples may be kept, and a step may take several passes"
    cost: ClassVar[str] = "time: inner_steps + 1 + ratio times a step; memory: M D + 2 P"
    stores_examples: ClassVar[bool] = True
    owns: ClassVar[tuple[str, ...]] = ("step",)

    def __post_init__(self) -> None:
        check_count(self.name, "capacity", self.capacity)
        check_count(self.name, "inner_steps", self.inner_steps)
        check_value(self.name, "inner_lr", self.inner_lr)
        check_value(self.name, "ratio", self.ratio)
        check_choice(self.name, "forward", self.forward, FORWARDS)
        if self.batch_size is not None:
            check_count(self.name, "batch_size", self.batch_size)

    def has(self, hook: str) -> bool:
        return super().has(hook) and 0 not in (self.capacity, self.ratio, self.batch_size)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.buffer = Buffer(self.capacity, seed=derive(learner.seed, "buffer", self.name))

    def step(self, batch: Batch) -> Tensor:
        learner, fast = self.learner, FastWeights(self.learner)
        gradient = torch.zeros_like(fast.vector)
        with frozen_statistics(learner.model):
            for _ in range(self.inner_steps if self.inner_lr else 0):
                fast.gradient(batch, into=gradient)
                fast.vector.add_(gradient, alpha=-self.inner_lr)
        if len(self.buffer):
            drawn = self.buffer.sample(draw_size(batch, self.batch_size, self.ratio))
            batch = add_drawn(batch, "replay", drawn, self.forward, 1.0)
        loss = fast.gradient(batch, into=gradient)
        hand_over(learner, gradient, fast.reached)
        before = learner.apply_gradient()
        if before is not None:
            learner.finish_update(before)
        return loss

    def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
        if batch.first_pass:
            self.buffer.add(columns_of(batch.now, batch.task))
