"""Rows that were ranked beforehand: every class of every task keeps the best of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perdure.errors import UsageError
from perdure.memory.groups import groups_of
from perdure.memory.selection import herding, k_center, nearest_mean
from perdure.memory.writing import WritingPolicy

if TYPE_CHECKING:
    from perdure.memory.buffer import Buffer

Group = tuple[int, int]
SELECTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "herding": herding,
    "nearest_mean": nearest_mean,
    "k_center": k_center,
}


class Ranked(WritingPolicy):
    """Rows are offered best first, class by class when a task ends; a class keeps the beginning of its list.

    The capacity is shared evenly by all classes of all tasks so far; what one cannot fill the others get. When it
    shrinks, or another task comes, lists lose their ends. Since a shorter selection is the beginning of a longer one,
    what is left is what would have been selected. The policy ranks nothing itself: whoever adds the rows has done it
    with `select`, by the features of a model (`perdure.methods.exemplars`). Draws no random number.

    Source: Rebuffi et al. 2017, iCaRL, arXiv 1611.07725 (algorithm 5).

    Parameters
    ----------
    name
        "herding", "nearest_mean" or "k_center": by what the rows were ranked.
    """

    def __init__(self, name: str = "herding") -> None:
        self.name = name
        self.select = SELECTIONS[name]
        self.lists: dict[Group, list[int]] = {}  # (task, class) -> its slots, best first

    def room(self, offered: Mapping[Group, int], capacity: int) -> dict[Group, int]:
        """How many rows of each new (task, class) would stay, if so many rows of each were offered."""
        shares = self._shares(offered, capacity)
        return {group: max(shares[group] - len(self.lists.get(group, ())), 0) for group in offered}

    def _shares(self, offered: Mapping[Group, int], capacity: int) -> dict[Group, int]:
        sizes = {group: len(slots) for group, slots in self.lists.items()}
        return fair(sizes | {group: sizes.get(group, 0) + count for group, count in offered.items()}, capacity)

    def place(
        self, count: int, columns: Mapping[str, Any], buffer: Buffer, capacity: int, generator: torch.Generator
    ) -> dict[int, int]:
        tasks, labels = (groups_of(columns, name, count, self.name) for name in ("task", "y"))
        offered: dict[Group, list[int]] = {}
        for row, group in enumerate(zip(tasks, labels, strict=True)):
            offered.setdefault(group, []).append(row)
        shares = self._shares({group: len(rows) for group, rows in offered.items()}, capacity)
        free = iter([*self._shorten(shares), *range(len(buffer), capacity)])
        placed: dict[int, int] = {}
        for group, rows in offered.items():
            slots = self.lists.setdefault(group, [])
            for row in rows[: max(shares[group] - len(slots), 0)]:
                slots.append(next(free))
                placed[slots[-1]] = row
        return placed

    def _shorten(self, lengths: Mapping[Group, int]) -> list[int]:
        """Cut every list to its length; returns the slots that became free, ascending."""
        free = []
        for group, slots in self.lists.items():
            free += slots[lengths[group] :]
            del slots[lengths[group] :]
        return sorted(free)

    def resize(self, capacity: int, old: int, buffer: Buffer, generator: torch.Generator) -> list[int]:
        self._shorten(self._shares({}, capacity))
        stay = sorted(slot for slots in self.lists.values() for slot in slots)
        moved = {slot: new for new, slot in enumerate(stay)}
        self.lists = {group: [moved[slot] for slot in slots] for group, slots in self.lists.items() if slots}
        return stay

    def merge(
        self, buffer: Buffer, other: Buffer, capacity: int, generator: torch.Generator
    ) -> tuple[list[int], list[int]]:
        theirs = other.writing
        if not isinstance(theirs, Ranked) or theirs.name != self.name:
            raise UsageError(f"a buffer of {self.name} cannot merge one written by '{theirs.name}'; use two of a kind")
        both = self.lists.keys() & theirs.lists.keys()
        if both:
            task, label = min(both)
            raise UsageError(
                f"both buffers hold class {label} of task {task}, and two selections have no common order; merge "
                "buffers of different tasks"
            )
        mine = len(buffer)
        self.lists |= {group: [slot + mine for slot in slots] for group, slots in theirs.lists.items()}
        stay = self.resize(capacity, capacity, buffer, generator)
        return [slot for slot in stay if slot < mine], [slot - mine for slot in stay if slot >= mine]

    def state_dict(self) -> dict[str, Any]:
        return {
            "groups": [list(group) for group in self.lists],
            "lists": [list(slots) for slots in self.lists.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pairs = zip(state["groups"], state["lists"], strict=True)
        self.lists = {(int(task), int(label)): list(map(int, slots)) for (task, label), slots in pairs}


def fair(sizes: Mapping[Group, int], capacity: int) -> dict[Group, int]:
    """Shares of the capacity, as even as the sizes allow; where it does not divide, the earlier groups get one more.

    >>> fair({(0, 0): 9, (0, 1): 1, (1, 2): 99}, 10)
    {(0, 0): 5, (0, 1): 1, (1, 2): 4}
    """
    level, waiting = capacity, len(sizes)
    for size in sorted(sizes.values()):
        level = capacity // waiting
        if size > level:
            break
        capacity, waiting = capacity - size, waiting - 1
    spare = capacity - level * waiting
    shares = {}
    for group, size in sizes.items():
        shares[group] = min(size, level + (size > level and spare > 0))
        spare -= size > level
    return shares
