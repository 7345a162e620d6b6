"""Dark Experience Replay: the past is remembered with the answers that the model gave at the time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.errors import ModelError
from perdure.methods.base import Method, check_value
from perdure.methods.replay import add_drawn, check_buffer, columns_of, draw_size, make_buffer
from perdure.registry import register

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner


class LogitMemory(Method):
    """What DER and DER++ share: a buffer of the examples with the logits that they had when they were new."""

    capacity: int | None
    alpha: float
    ratio: float
    batch_size: int | None

    paper: ClassVar[str] = "Buzzega et al. 2020, arXiv 2004.07211"
    stores_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_buffer(self)
        check_value(self.name, "alpha", self.alpha)
        check_value(self.name, "ratio", self.ratio)

    def has(self, hook: str) -> bool:
        return super().has(hook) and 0 not in (self.capacity, self.ratio, self.batch_size)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.buffer = make_buffer(self)

    def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
        if batch.first_pass and outputs is not None:
            self.buffer.add({**columns_of(batch.now, batch.task), "logits": outputs[: batch.now.size]})


@register("der")
@dataclass
class DER(LogitMemory):
    """Keep the logits of remembered examples where they were when the example was stored.

    loss += alpha * mean over rows and columns of (z - z_stored)^2. z_stored are the logits of the forward pass of the
    very step in which the example was new, and are never refreshed.

    Buzzega et al. 2020, arXiv 2004.07211.

    Parameters
    ----------
    capacity
        Examples kept in total; 0 switches the method off. None with `bytes_budget`.
    alpha
        Weight of the term; 0 switches it off.
    ratio, batch_size, writing, reading, bytes_budget
        See `Replay`.
    forward
        "separate" (published) or "joint".
    """

    capacity: int | None = 1000
    alpha: float = 0.5
    ratio: float = 1.0
    batch_size: int | None = None
    writing: str = "reservoir"
    reading: str = "uniform"
    forward: str = "separate"
    bytes_budget: int | None = None

    summary: ClassVar[str] = "replay past examples towards the logits they had when they were new"
    use_when: ClassVar[str] = "as replay; stronger with small buffers, works without task boundaries"
    cost: ClassVar[str] = "time: 1 + ratio times a step; memory: M (D + 4 C)"

    def on_batch(self, batch: Batch) -> Batch:
        if not self.alpha or not len(self.buffer):
            return batch
        drawn = self.buffer.sample(draw_size(batch, self.batch_size, self.ratio))
        return add_drawn(batch, "der", drawn, self.forward, share=0.0)

    def loss(self, batch: Batch, outputs: Tensor) -> Tensor | None:
        return logit_loss(batch, "der", outputs, self.alpha)


def logit_loss(batch: Batch, name: str, outputs: Tensor, alpha: float) -> Tensor | None:
    """`alpha` times the mean squared distance of a source's logits from those stored with it.

    Columns that did not exist, or that no head wrote, when a row was stored do not count.
    """
    source = batch.find(name)
    if source is None or not alpha:
        return None
    stored: Tensor = source.extras["logits"]
    now = batch.part(name, outputs)
    if now.dim() > 2:
        raise ModelError("stored logits are of one row an example; for sequences use 'replay' instead")
    if now.shape == stored.shape and source.whole is None and now.device.type == "cpu":
        # All columns count in most steps, and asking costs a CPU nothing; a GPU would have to be waited for.
        distance = F.mse_loss(now, stored)
        if "valid" not in source.extras and math.isfinite(float(distance.detach())):
            return distance * alpha
    now = now[:, : stored.shape[1]]
    counts = torch.isfinite(stored) & torch.isfinite(now.detach())
    if "valid" in source.extras:
        counts &= torch.arange(stored.shape[1], device=stored.device) < source.extras["valid"][:, None]
    distance = torch.where(counts, now - torch.where(counts, stored, 0.0), 0.0)
    values = distance.square().sum(1) / counts.sum(1).clamp_min(1)
    return batch.mean(name, values) * alpha
