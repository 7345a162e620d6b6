"""Dark Experience Replay: the past is remembered with the answers that the model gave at the time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.errors import ModelError
from perdure.methods.base import check_value
from perdure.methods.replay import Remembering, add_drawn, draw_size
from perdure.registry import register

if TYPE_CHECKING:
    from perdure.batch import Batch


class LogitMemory(Remembering):
    """What DER and DER++ share: a buffer of the examples with the logits that they had when they were stored."""

    alpha: float

    paper: ClassVar[str] = "Buzzega et al. 2020, arXiv 2004.07211"
    stores_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value(self.name, "alpha", self.alpha)


@register("der")
@dataclass
class DER(LogitMemory):
    """Keep the logits of remembered examples where they were when the example was stored.

    loss += alpha * mean over rows and columns of (z - z_stored)^2. z_stored are the logits of the forward pass of the
    very step in which the example was new (of its task's end, where examples are chosen then), and are never refreshed.

    Buzzega et al. 2020, arXiv 2004.07211.

    Parameters
    ----------
    capacity
        Examples kept in total; 0 switches the method off. None with `bytes_budget`.
    alpha
        Weight of the term; 0 switches it off.
    ratio, batch_size, writing, reading, bytes_budget, folder
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
    folder: str | None = None

    summary: ClassVar[str] = "replay past examples towards the logits they had when they were new"
    use_when: ClassVar[str] = "as replay; stronger with small buffers, works without task boundaries"
    cost: ClassVar[str] = "time: 1 + ratio times a step; memory: capacity examples and their logits"
    draws: ClassVar[tuple[str, ...]] = ("der",)

    def on_batch(self, batch: Batch) -> Batch:
        if not self.alpha or not len(self.buffer):
            return batch
        drawn = self.buffer.sample(draw_size(batch, self.batch_size, self.ratio))
        return add_drawn(batch, "der", drawn, self.forward, share=0.0)

    def loss(self, batch: Batch, outputs: Tensor) -> Tensor | None:
        super().loss(batch, outputs)
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
