"""DER++: dark experience replay, and replay of the labels on a second draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from perdure.methods.base import check_value
from perdure.methods.der import LogitMemory, logit_loss
from perdure.methods.replay import add_drawn, draw_size
from perdure.registry import register

if TYPE_CHECKING:
    from perdure.batch import Batch


@register("derpp")
@dataclass
class DERpp(LogitMemory):
    """Keep the logits of remembered examples, and train on the labels of an independent second draw.

    loss += alpha * mean((z - z_stored)^2) + beta * mean cross-entropy(z', y'), with (z, z_stored) and (z', y') from two
    draws.

    Buzzega et al. 2020, arXiv 2004.07211.

    Parameters
    ----------
    capacity
        Examples kept in total; 0 switches the method off. None with `bytes_budget`.
    alpha, beta
        Weights of the logit term and of the label term.
    shared_draw
        Use one draw for both terms: a different, cheaper algorithm.
    ratio, batch_size, writing, reading, bytes_budget, folder
        See `Replay`; each draw has this size.
    forward
        "separate" (published) or "joint".
    """

    capacity: int | None = 1000
    alpha: float = 0.5
    beta: float = 0.5
    shared_draw: bool = False
    ratio: float = 1.0
    batch_size: int | None = None
    writing: str = "reservoir"
    reading: str = "uniform"
    forward: str = "separate"
    bytes_budget: int | None = None
    folder: str | None = None

    summary: ClassVar[str] = "replay past examples towards their stored logits and their labels"
    use_when: ClassVar[str] = (
        "some old examples may be kept: usually the best simple method, without task boundaries too"
    )
    cost: ClassVar[str] = "time: 1 + 2 ratio times a step; memory: capacity examples and their logits"

    draws: ClassVar[tuple[str, ...]] = ("derpp_logits", "derpp_labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value(self.name, "beta", self.beta)

    def on_batch(self, batch: Batch) -> Batch:
        if not len(self.buffer):
            return batch
        size = draw_size(batch, self.batch_size, self.ratio)
        if self.shared_draw and (self.alpha or self.beta):
            return add_drawn(batch, "derpp_logits", self.buffer.sample(size), self.forward, share=self.beta)
        if self.alpha:
            batch = add_drawn(batch, "derpp_logits", self.buffer.sample(size), self.forward, share=0.0)
        if self.beta:
            drawn = self.buffer.sample(size)
            labelled = {name: column for name, column in drawn.items() if name not in ("logits", "valid")}
            batch = add_drawn(batch, "derpp_labels", labelled, self.forward, share=self.beta)
        return batch

    def loss(self, batch: Batch, outputs: Tensor) -> Tensor | None:
        super().loss(batch, outputs)
        return logit_loss(batch, "derpp_logits", outputs, self.alpha)
