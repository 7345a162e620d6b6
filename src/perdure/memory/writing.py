"""Which offered rows a buffer keeps, and in which slot.

A policy sees the stream once, row by row, and draws one uniform number a row from the buffer's writing generator. The
numbers are drawn ahead in blocks and consumed by position, so cutting the same stream into other batches gives the same
buffer, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from perdure.memory.buffer import Buffer

BLOCK = 512


class WritingPolicy(ABC):
    """Decides what is stored. Slots `0 .. len(buffer) - 1` are always the filled ones."""

    name = ""

    @abstractmethod
    def place(
        self, count: int, columns: Mapping[str, Any], buffer: Buffer, capacity: int, generator: torch.Generator
    ) -> dict[int, int]:
        """Return slot -> row of the offered batch; of two rows for one slot the later one has won already."""

    @abstractmethod
    def resize(self, capacity: int, old: int, buffer: Buffer, generator: torch.Generator) -> list[int]:
        """Return the slots that stay when the capacity changes from `old`, in the order of their new slots."""

    @abstractmethod
    def merge(
        self, buffer: Buffer, other: Buffer, capacity: int, generator: torch.Generator
    ) -> tuple[list[int], list[int]]:
        """Return the slots of `buffer` and of `other` that form the merged buffer, in the order of their new slots."""

    def state_dict(self) -> dict[str, Any]:
        """What the policy remembers beside the buffer: nothing by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take over what `state_dict` gave: nothing by default."""


class Uniforms:
    """Uniform numbers in [0, 1) drawn ahead, `BLOCK` at a time, and consumed in order."""

    def __init__(self) -> None:
        self.block = torch.empty(0, dtype=torch.float64)
        self.used = 0

    @property
    def left(self) -> int:
        return len(self.block) - self.used

    def refill(self, generator: torch.Generator) -> None:
        """Draw the next block; the last one must have been used up."""
        self.block, self.used = torch.rand(BLOCK, generator=generator, dtype=torch.float64), 0

    def take(self, count: int, generator: torch.Generator) -> list[float]:
        taken: list[float] = []
        while len(taken) < count:
            if not self.left:
                self.refill(generator)
            end = min(self.used + count - len(taken), len(self.block))
            taken += self.block[self.used : end].tolist()
            self.used = end
        return taken

    def rest(self) -> Tensor:
        return self.block[self.used :].clone()


def smallest_dropped_key(held: int, seen: int, draw: np.random.Generator) -> float:
    """The (held + 1)-th smallest of `seen` uniform keys, 1 if nothing was dropped."""
    return 1.0 if held == seen else float(draw.beta(held + 1, seen - held))


def numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """A numpy generator (which knows the beta law) seeded with one draw of `generator`."""
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
