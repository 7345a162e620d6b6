"""Greedy balancing: as many rows of every class as of every other, whatever the stream does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from perdure.errors import UsageError
from perdure.memory.groups import groups_of, parted, renumbered, take_from_largest, union
from perdure.memory.writing import Uniforms, WritingPolicy

if TYPE_CHECKING:
    from perdure.memory.buffer import Buffer


class GreedyBalanced(WritingPolicy):
    """A row is taken as long as its class has less than an equal share, and pushes out a row of the largest class.

    While there is room, a row enters if its class holds fewer than capacity / classes seen. In a full buffer it enters
    if that makes the classes more even, in place of a random row of the largest. So at any time a class has its share,
    or all of its rows. Later rows of a class that has its share are not looked at: this is no uniform sample.

    Source: Prabhu, Torr and Dokania 2020, GDumb (ECCV).
    """

    name = "greedy_balanced"

    def __init__(self) -> None:
        self.members: dict[int, list[int]] = {}  # class -> its slots; also of classes that were seen and hold none
        self._uniforms = Uniforms()

    def place(
        self, count: int, columns: Mapping[str, Any], buffer: Buffer, capacity: int, generator: torch.Generator
    ) -> dict[int, int]:
        placed: dict[int, int] = {}
        filled = len(buffer)
        labels = groups_of(columns, "y", count, self.name)
        if not capacity:
            return placed
        for row, (label, u) in enumerate(zip(labels, self._uniforms.take(count, generator), strict=True)):
            own = self.members.setdefault(label, [])
            if filled < capacity:
                if len(own) * len(self.members) >= capacity:
                    continue
                slot = filled
                filled += 1
            elif max(map(len, self.members.values())) >= len(own) + 2:
                _, slot = take_from_largest(self.members, u)
            else:
                continue
            own.append(slot)
            placed[slot] = row
        return placed

    def resize(self, capacity: int, old: int, buffer: Buffer, generator: torch.Generator) -> list[int]:
        for u in torch.rand(max(len(buffer) - capacity, 0), generator=generator, dtype=torch.float64).tolist():
            take_from_largest(self.members, u)
        return renumbered(self.members)

    def merge(
        self, buffer: Buffer, other: Buffer, capacity: int, generator: torch.Generator
    ) -> tuple[list[int], list[int]]:
        theirs = other.writing
        if not isinstance(theirs, GreedyBalanced):
            raise UsageError(
                f"a greedily balanced buffer cannot merge one written by '{theirs.name}'; use two of a kind"
            )
        self.members = union(self.members, theirs.members, len(buffer))
        surplus = len(buffer) + len(other) - capacity
        for u in torch.rand(max(surplus, 0), generator=generator, dtype=torch.float64).tolist():
            take_from_largest(self.members, u)
        return parted(renumbered(self.members), len(buffer))

    def state_dict(self) -> dict[str, Any]:
        return {
            "classes": list(self.members),
            "members": [list(slots) for slots in self.members.values()],
            "uniforms": self._uniforms.rest(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pairs = zip(state["classes"], state["members"], strict=True)
        self.members = {int(label): list(map(int, slots)) for label, slots in pairs}
        self._uniforms.block, self._uniforms.used = state["uniforms"].clone(), 0
