"""Loss-aware reservoir sampling: what the model knows best makes room for new rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from perdure.errors import UsageError
from perdure.memory.writing import Uniforms, WritingPolicy

if TYPE_CHECKING:
    from perdure.memory.buffer import Buffer


class LossAware(WritingPolicy):
    """A row enters with a reservoir's probability, capacity / rows seen, in place of one that has a small loss.

    Stored row i goes with probability (max_j loss_j - loss_i) / sum_k (max_j loss_j - loss_k); if all are alike, with
    equal probability. The losses are the column "loss" [rows]: that of the step in which the row was new, and after
    that of the last step that replayed it (`buffer.update(slots, {"loss": ...})`). A loss that is not finite counts as
    the largest. This is no uniform sample: rows with a wrong label stay.

    Source: Buzzega et al. 2020, Rethinking experience replay: a bag of tricks for continual learning, arXiv 2010.05595.
    """

    name = "loss_aware"

    def __init__(self) -> None:
        self._uniforms = Uniforms()

    def place(
        self, count: int, columns: Mapping[str, Any], buffer: Buffer, capacity: int, generator: torch.Generator
    ) -> dict[int, int]:
        offered = columns.get("loss")
        if not isinstance(offered, Tensor) or offered.ndim != 1 or not offered.is_floating_point():
            raise UsageError("the loss_aware writing policy needs the loss of every row in column 'loss' [rows]")
        placed: dict[int, int] = {}
        losses: np.ndarray | None = None
        new: list[float] = []
        filled = len(buffer)
        for row, u in enumerate(self._uniforms.take(count, generator)):
            slot = filled
            if filled == capacity:
                # Given that it is below the capacity, the scaled number is uniform again: it chooses the slot.
                scaled = u * (buffer.seen + row + 1)
                if scaled >= capacity:
                    continue
                if losses is None:
                    new = offered.tolist()  # once: from another device every number would be waited for
                    losses = _held(buffer, new, placed)
                slot = chosen(losses, scaled / capacity)
                losses[slot] = new[row]
            else:
                filled += 1
            placed[slot] = row
        return placed

    def resize(self, capacity: int, old: int, buffer: Buffer, generator: torch.Generator) -> list[int]:
        stay = list(range(len(buffer)))
        losses = buffer.view("loss").double().cpu().numpy().copy()
        for u in torch.rand(max(len(buffer) - capacity, 0), generator=generator, dtype=torch.float64).tolist():
            gone = chosen(losses, u)
            del stay[gone]
            losses = np.delete(losses, gone)
        return stay

    def merge(
        self, buffer: Buffer, other: Buffer, capacity: int, generator: torch.Generator
    ) -> tuple[list[int], list[int]]:
        raise UsageError(
            "loss-aware buffers chose their rows by the losses of different models at different times, so they cannot "
            "be merged; merge reservoirs"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"uniforms": self._uniforms.rest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._uniforms.block, self._uniforms.used = state["uniforms"].clone(), 0


def _held(buffer: Buffer, offered: list[float], placed: Mapping[int, int]) -> np.ndarray:
    """The losses of all stored rows, those of this batch among them, float64 [capacity]."""
    losses = buffer.columns["loss"].double().cpu().numpy().copy()
    for slot, row in placed.items():
        losses[slot] = offered[row]
    return np.asarray(losses)


def chosen(losses: np.ndarray, u: float) -> int:
    """The index that gives way: drawn with probability proportional to (largest loss - own loss), `u` in [0, 1).

    >>> [chosen(np.array([3.0, 1.0, 2.0]), u) for u in (0.0, 0.6, 0.7, 0.99)]
    [1, 1, 2, 2]
    """
    finite = losses[np.isfinite(losses)]
    largest = float(finite.max()) if len(finite) else 0.0
    weights = np.where(np.isfinite(losses), largest - losses, 0.0)
    total = weights.cumsum()
    if not total[-1] > 0:
        return int(u * len(losses))
    index = int(np.searchsorted(total, u * total[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))
