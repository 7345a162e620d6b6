"""Which stored rows a buffer gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perdure.memory.groups import KINDS

if TYPE_CHECKING:
    from perdure.memory.buffer import Buffer


class ReadingPolicy(ABC):
    """Draws slots; every draw comes from a CPU generator, so that it does not depend on the device."""

    name = ""

    @abstractmethod
    def choose(self, count: int, available: Tensor | None, buffer: Buffer, generator: torch.Generator) -> Tensor:
        """Return up to `count` different slots, int64 on the CPU, out of `available` (None: every filled slot)."""


class Uniform(ReadingPolicy):
    """Every set of that many rows is equally likely."""

    name = "uniform"

    def choose(self, count: int, available: Tensor | None, buffer: Buffer, generator: torch.Generator) -> Tensor:
        if available is None:
            return distinct(count, len(buffer), generator)
        return available[distinct(count, len(available), generator)]


class Balanced(ReadingPolicy):
    """As many rows of every group as of every other, as far as there are enough; uniform within a group.

    Parameters
    ----------
    column
        The groups: "y" (class-balanced) or "task" (task-balanced).
    """

    def __init__(self, column: str) -> None:
        self.column = column
        self.name = f"{KINDS.get(column, column)}_balanced"

    def choose(self, count: int, available: Tensor | None, buffer: Buffer, generator: torch.Generator) -> Tensor:
        if not len(buffer):
            return torch.empty(0, dtype=torch.int64)
        group = buffer.view(self.column).cpu()
        slots = torch.arange(len(group)) if available is None else available
        order = torch.randperm(len(slots), generator=generator)
        order = order[group[slots][order].argsort(stable=True)]
        _, sizes = group[slots].unique(return_counts=True)
        rank = torch.arange(len(slots)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        # All first rows of the groups, then all second ones, ...; the random fraction orders those of one turn.
        turn = rank + torch.rand(len(slots), generator=generator, dtype=torch.float64)
        return slots[order[turn.argsort()[:count]]]


def distinct(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`min(count, size)` different numbers below `size` in random order, every ordered choice equally likely, int64.

    >>> distinct(10, 4, torch.Generator().manual_seed(0)).sort().values.tolist()
    [0, 1, 2, 3]
    """
    if size <= 1024 or 32 * count > size:
        return torch.randperm(size, generator=generator)[:count]
    # The first steps of a Fisher-Yates shuffle of a list that is never written out.
    moved: dict[int, int] = {}
    chosen = []
    for i, u in enumerate(torch.rand(count, generator=generator, dtype=torch.float64).tolist()):
        j = i + int(u * (size - i))
        chosen.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return torch.tensor(chosen, dtype=torch.int64)
