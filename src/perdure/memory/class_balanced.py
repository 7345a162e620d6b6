"""A reservoir a class, or a task: the buffer stays as balanced as the stream allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from perdure.errors import UsageError
from perdure.memory.groups import KINDS, groups_of, parted, renumbered, take_from_largest
from perdure.memory.writing import Uniforms, WritingPolicy, numpy_generator, smallest_dropped_key

if TYPE_CHECKING:
    from perdure.memory.buffer import Buffer


class ClassBalanced(WritingPolicy):
    """Class-balancing reservoir sampling: small classes are kept whole, large ones are uniform subsets of their rows.

    While there is room everything is stored. Then a row of a class that never was among the largest replaces a random
    row of the largest class; a row of any other class c replaces a random row of its own with probability
    stored_c / seen_c. Once every class was seen at least capacity / classes times, counts differ by at most one.

    After growth, rows of a class that had lost some enter the free room with probability stored_c / seen_c, until the
    class has its share of the capacity, so that old and new rows of a class stay about equally likely.

    Source: Chrysakis and Moens 2020, Online Continual Learning from Imbalanced Data (ICML).

    Parameters
    ----------
    column
        What is balanced: "y" (the policy "class_balanced") or "task" ("task_balanced", the same law over tasks).
    """

    def __init__(self, column: str = "y") -> None:
        self.column = column
        self.name = f"{KINDS.get(column, column)}_balanced"
        self.seen: dict[int, int] = {}
        self.members: dict[int, list[int]] = {}  # class -> its slots
        self.full: set[int] = set()  # classes that are or once were among the largest of a full buffer
        self.rates: dict[int, float] = {}  # probability of entering free room, where it is not 1
        self._uniforms = Uniforms()

    def place(
        self, count: int, columns: Mapping[str, Any], buffer: Buffer, capacity: int, generator: torch.Generator
    ) -> dict[int, int]:
        labels = groups_of(columns, self.column, count, self.name)
        placed: dict[int, int] = {}
        filled = len(buffer)
        if not capacity:
            return placed
        for row, (label, u) in enumerate(zip(labels, self._uniforms.take(count, generator), strict=True)):
            self.seen[label] = self.seen.get(label, 0) + 1
            own = self.members.setdefault(label, [])
            if filled < capacity and (label not in self.rates or len(own) * len(self.members) < capacity):
                if u < self.rates.get(label, 1.0):
                    own.append(filled)
                    placed[filled] = row
                    filled += 1
                    self._mark_largest(filled == capacity)
            elif label in self.full:
                index = int(u * self.seen[label])
                if index < len(own):
                    placed[own[index]] = row
            else:
                slot = self._evict(u)
                own.append(slot)
                placed[slot] = row
                self._mark_largest(True)
        return placed

    def _largest(self) -> list[int]:
        size = max(map(len, self.members.values()))
        return [label for label, slots in self.members.items() if len(slots) == size]

    def _mark_largest(self, buffer_is_full: bool) -> None:
        if buffer_is_full:
            self.full.update(self._largest())

    def _evict(self, u: float) -> int:
        """Take a uniformly random slot from the largest classes (all their rows alike where several tie)."""
        label, slot = take_from_largest(self.members, u)
        self.full.add(label)
        return slot

    def resize(self, capacity: int, old: int, buffer: Buffer, generator: torch.Generator) -> list[int]:
        held = len(buffer)
        for u in torch.rand(max(held - capacity, 0), generator=generator, dtype=torch.float64).tolist():
            self._evict(u)
        stay = renumbered(self.members)
        self._settle(capacity)
        return stay

    def _settle(self, capacity: int) -> None:
        """Bring the marks and rates into line with new members or a new capacity."""
        for label in [label for label, slots in self.members.items() if not slots]:
            del self.members[label]
            self.seen.pop(label)
            self.full.discard(label)
        stored = sum(map(len, self.members.values()))
        lost = {label for label, slots in self.members.items() if len(slots) < self.seen[label]}
        self.full |= lost
        self.rates = {label: len(self.members[label]) / self.seen[label] for label in sorted(lost)}
        self._mark_largest(bool(stored) and stored == capacity)

    def merge(
        self, buffer: Buffer, other: Buffer, capacity: int, generator: torch.Generator
    ) -> tuple[list[int], list[int]]:
        theirs = other.writing
        if not isinstance(theirs, ClassBalanced) or theirs.column != self.column:
            raise UsageError(f"a {self.name} buffer cannot merge one written by '{theirs.name}'; use two of a kind")
        draw = numpy_generator(generator)
        mine = len(buffer)
        union: dict[int, list[int]] = {}  # slots of `buffer`, and of `other` counted on from `mine`
        for label in [*self.members, *(label for label in theirs.members if label not in self.members)]:
            keyed: list[tuple[float, int]] = []
            bounds = []
            for policy, offset in ((self, 0), (theirs, mine)):
                slots = policy.members.get(label, [])
                bound = smallest_dropped_key(len(slots), policy.seen.get(label, 0), draw)
                keyed += zip((draw.random(len(slots)) * bound).tolist(), (slot + offset for slot in slots), strict=True)
                bounds.append(bound)
            union[label] = [slot for key, slot in keyed if key < min(bounds)]
            self.seen[label] = self.seen.get(label, 0) + theirs.seen.get(label, 0)
        self.members, self.full = union, self.full | theirs.full
        for u in draw.random(max(sum(map(len, union.values())) - capacity, 0)).tolist():
            self._evict(u)
        stay = renumbered(self.members)
        self._settle(capacity)
        return parted(stay, mine)

    def state_dict(self) -> dict[str, Any]:
        classes = list(self.members)
        return {
            "classes": classes,
            "seen": [self.seen[label] for label in classes],
            "members": [list(self.members[label]) for label in classes],
            "full": sorted(self.full),
            "rates": [self.rates.get(label, 1.0) for label in classes],
            "uniforms": self._uniforms.rest(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        classes = [int(label) for label in state["classes"]]
        self.seen = dict(zip(classes, map(int, state["seen"]), strict=True))
        self.members = {label: list(map(int, slots)) for label, slots in zip(classes, state["members"], strict=True)}
        self.full = set(map(int, state["full"]))
        self.rates = {label: rate for label, rate in zip(classes, state["rates"], strict=True) if rate != 1.0}
        self._uniforms.block, self._uniforms.used = state["uniforms"].clone(), 0
