"""ER-ACE: replay in which new classes do not push old ones away (asymmetric cross-entropy)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.batch import as_mask
from perdure.errors import UsageError
from perdure.methods.base import check_value
from perdure.methods.replay import Remembering, add_drawn, draw_size
from perdure.registry import register

if TYPE_CHECKING:
    from perdure.batch import Allowed, Batch, Source
    from perdure.learner import Learner


@register("er_ace")
@dataclass
class ERACE(Remembering):
    """Replay whose loss of new rows leaves the seen classes alone that are not among them.

    loss <- cross-entropy(new rows; columns of their own classes and of classes not yet seen)
    + weight * cross-entropy(remembered rows; columns of all classes seen). The mean over the new rows gives no gradient
    to the output of a seen class that is absent from them, which would otherwise be pushed down in every step.

    Works without task boundaries, from the first batch, with classes that arrive in any order. It owns the loss of
    the current rows; rows that other methods add (DER++, ...) are scored as without it.

    Caccia et al. 2022, arXiv 2104.05025.

    Parameters
    ----------
    capacity
        Examples kept in total; 0 switches the method off. None with `bytes_budget`.
    weight
        Factor of the remembered rows' mean.
    ratio, batch_size, writing, reading, bytes_budget
        See `Replay`.
    forward
        "joint" or "separate": see `Replay`.
    """

    capacity: int | None = 1000
    weight: float = 1.0
    ratio: float = 1.0
    batch_size: int | None = None
    writing: str = "reservoir"
    reading: str = "uniform"
    forward: str = "joint"
    bytes_budget: int | None = None

    summary: ClassVar[str] = "replay in which new classes do not push old ones away"
    paper: ClassVar[str] = "Caccia et al. 2022, arXiv 2104.05025"
    use_when: ClassVar[str] = "as replay, where new classes come unnamed and in one pass"
    cost: ClassVar[str] = "time: 1 + ratio times a step; memory: M D"
    draws: ClassVar[tuple[str, ...]] = ("er_ace",)
    scenarios: ClassVar[frozenset[str]] = frozenset({"task", "class", "online", "blurry"})
    owns: ClassVar[tuple[str, ...]] = ("criterion",)
    transient: ClassVar[tuple[str, ...]] = (*Remembering.transient, "_labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value(self.name, "weight", self.weight)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.seen = torch.zeros(0, dtype=torch.bool, device=learner.device)
        self._labels = torch.zeros(0, dtype=torch.int64)

    def on_batch(self, batch: Batch) -> Batch:
        self._labels = batch.now.y  # of the whole batch, of which `criterion` may see pieces
        if batch.now.share is None:
            batch = batch.with_sources(replace(batch.now, share=1.0), *batch.sources[1:])
        if not self.weight or not len(self.buffer):
            return batch
        drawn = self.buffer.sample(draw_size(batch, self.batch_size, self.ratio))
        return add_drawn(batch, "er_ace", drawn, self.forward, share=self.weight)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        present = columns_present(self._labels, outputs.shape[-1])
        self.seen = F.pad(self.seen.to(present.device), (0, max(0, len(present) - len(self.seen)))) | present
        masks = {"current": (present | ~self.seen)[None], "er_ace": self.seen[None]}

        def allowed(source: Source, width: int) -> Allowed:
            usual, own = self.learner.allowed(source, width), masks.get(source.name)
            if usual is None or own is None:
                return own if usual is None else usual
            return own & as_mask(usual, source.size, width, outputs.device)

        return self.learner.criterion(outputs, batch, allowed)


def columns_present(labels: Tensor, width: int) -> Tensor:
    """Boolean [width]: which columns occur among `labels`; targets that are no column (-100) do not count.

    >>> columns_present(torch.tensor([2, 0, 2, -100]), 4).tolist()
    [True, False, True, False]
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise UsageError("er_ace: the targets must be class columns (int64); use replay for other targets")
    inside = torch.where((labels < 0) | (labels >= width), width, labels).flatten()
    return torch.zeros(width + 1, dtype=torch.bool, device=labels.device).index_fill(0, inside, True)[:width]
