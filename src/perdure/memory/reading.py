"""Which stored rows a buffer gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perdure.memory.groups import KINDS

if TYPE_CHECKING:
    from perdure.memory.buffer import Buffer


AHEAD = 1 << 14
"""Numbers that are drawn ahead at most, for all draws together."""


class ReadingPolicy(ABC):
    """Draws slots; every draw comes from a CPU generator, so that it does not depend on the device."""

    name = ""

    @abstractmethod
    def choose(self, count: int, available: Tensor | None, buffer: Buffer, generator: torch.Generator) -> Tensor:
        """Return up to `count` different slots, int64 on the CPU, out of `available` (None: every filled slot)."""

    def settle(self, generator: torch.Generator) -> None:  # noqa: B027
        """Put the generator where it is after the draws that were asked for: for a policy that draws ahead."""


class Uniform(ReadingPolicy):
    """Every set of that many rows is equally likely.

    As long as draws of the same size are asked of the same number of rows, they are made some ahead: in one go they
    take a fraction of the time. The numbers are the same, and so is the generator once `settle` has been called.
    """

    name = "uniform"

    def __init__(self) -> None:
        self._ahead: list[Tensor] = []
        self._used = 0
        self._kind = (-1, -1)
        self._start = torch.empty(0)  # the generator's state before the first of `_ahead`

    def choose(self, count: int, available: Tensor | None, buffer: Buffer, generator: torch.Generator) -> Tensor:
        kind = (count, len(buffer) if available is None else len(available))
        if self._used == len(self._ahead) or kind != self._kind:
            self._draw(kind, generator)
        slots = self._ahead[self._used]
        self._used += 1
        return slots if available is None else available[slots]

    def _draw(self, kind: tuple[int, int], generator: torch.Generator) -> None:
        again = kind == self._kind
        draws = max(1, min(2 * len(self._ahead), AHEAD // max(1, kind[1]))) if again else 1
        self.settle(generator)
        self._kind = kind
        if draws > 1:
            self._start = generator.get_state()
        self._ahead = [distinct(*kind, generator) for _ in range(draws)]

    def settle(self, generator: torch.Generator) -> None:
        if self._used < len(self._ahead):
            generator.set_state(self._start)
            for _ in range(self._used):
                distinct(*self._kind, generator)
        self._ahead, self._used = [], 0


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
