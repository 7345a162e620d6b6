"""Small tools for columns: trees of tensors that share their first dimension, on whatever devices they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.errors import DataError


class OnDevices:
    """An index that is copied to each device once; the copy does not wait."""

    def __init__(self, index: Tensor | slice | None) -> None:
        self.index = index
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Any:
        if not isinstance(self.index, Tensor) or self.index.device == device:
            return self.index
        if device not in self._copies:
            self._copies[device] = self.index.to(device, non_blocking=True)
        return self._copies[device]


def span(slots: list[int]) -> Tensor | slice:
    """A slice if the slots follow each other, which fills a buffer without an index."""
    if slots == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return torch.tensor(slots)


def pairs(name: str, stored: Any, offered: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Stored and offered tensors side by side, checked against each other."""
    if isinstance(stored, Tensor) and isinstance(offered, Tensor):
        fixed = 2 if name == "logits" else 1
        fits = stored.shape[fixed:] == offered.shape[fixed:] and stored.ndim == offered.ndim
        alike = stored.dtype == offered.dtype or (stored.is_floating_point() and offered.is_floating_point())
        if not (fits and alike):
            raise DataError(
                f"rows of column '{name}' are {offered.dtype} {list(offered.shape[1:])}, "
                f"the buffer stores {stored.dtype} {list(stored.shape[1:])}"
            )
        yield stored, offered
    elif isinstance(stored, dict) and isinstance(offered, Mapping) and stored.keys() == offered.keys():
        for key, part in stored.items():
            yield from pairs(name, part, offered[key])
    elif isinstance(stored, (list, tuple)) and isinstance(offered, (list, tuple)) and len(stored) == len(offered):
        for part, other in zip(stored, offered, strict=True):
            yield from pairs(name, part, other)
    else:
        raise DataError(f"rows of column '{name}' have another structure than those stored")


def padded(logits: Tensor, width: int) -> Tensor:
    """Logits [n, classes, ...] with zeros in new columns up to `width`."""
    missing = width - logits.shape[1]
    return F.pad(logits, (0, 0) * (logits.ndim - 2) + (0, missing)) if missing else logits


def present(device: str) -> torch.device:
    """The device of that name, or the CPU if this machine lacks it."""
    wanted = torch.device(device)
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        return torch.device("cpu")
    return wanted
