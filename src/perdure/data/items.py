"""Reading the items of a `Dataset` so that what they draw at random is part of the stream, as the order of rows is."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class Items(Dataset[Any]):
    """The items of `dataset`, batch by batch: the same batch has the same items whoever else draws random numbers.

    A data set that augments draws from the global generators of torch, NumPy and Python, and so do dropout and many
    models: with dropout and replay in the model, other pictures would arrive than without.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, request: Sequence[int]) -> list[Any]:
        """The items of a batch, asked for as [number of the batch, row, row, ...], which seeds whatever is drawn."""
        _, *index = request
        with _seeded(hashlib.sha256(repr(list(request)).encode()).digest()):
            if hasattr(self.dataset, "__getitems__"):
                items: list[Any] = self.dataset.__getitems__(index)
                return items
            return [self.dataset[row] for row in index]


@contextmanager
def _seeded(digest: bytes) -> Iterator[None]:
    """Global generators (torch's of the CPU) seeded inside, and as they were afterwards."""
    draw = torch.default_generator
    before = draw.get_state(), np.random.get_state(), random.getstate()
    try:
        draw.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        np.random.seed(np.frombuffer(digest, np.uint32))
        random.seed(digest)
        yield
    finally:
        draw.set_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
