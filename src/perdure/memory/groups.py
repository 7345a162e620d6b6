"""Rows by class or by task: what the policies share that keep a buffer balanced over groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from perdure.errors import UsageError

KINDS = {"y": "class", "task": "task"}


def groups_of(columns: Mapping[str, Any], column: str, count: int, policy: str) -> list[int]:
    """The group of every row: integers [count] of column "y" or "task".

    Raises
    ------
    UsageError
        If there is no such column, or it does not hold one integer a row.
    """
    values = columns.get(column)
    if isinstance(values, int):
        return [values] * count
    if not isinstance(values, Tensor) or values.ndim != 1 or values.is_floating_point():
        kind = KINDS.get(column, column)
        raise UsageError(
            f"the {policy} writing policy needs integer {kind} labels in column '{column}' [rows]; use reservoir"
        )
    found: list[int] = values.tolist()
    return found


def take_from_largest(members: dict[int, list[int]], u: float) -> tuple[int, int]:
    """Remove a uniformly random slot from the largest groups (all their rows alike where several tie).

    `u` is uniform in [0, 1). Returns the group and the slot.
    """
    size = max(map(len, members.values()))
    largest = [group for group, slots in members.items() if len(slots) == size]
    donor, index = divmod(int(u * len(largest) * size), size)
    slots = members[largest[donor]]
    slots[index], slots[-1] = slots[-1], slots[index]
    return largest[donor], slots.pop()


def renumbered(members: dict[int, list[int]]) -> list[int]:
    """The slots that are left, ascending; `members` gets their new numbers 0, 1, ... in place."""
    stay = sorted(slot for slots in members.values() for slot in slots)
    moved = {slot: new for new, slot in enumerate(stay)}
    for slots in members.values():
        slots[:] = [moved[slot] for slot in slots]
    return stay


def union(mine: dict[int, list[int]], theirs: dict[int, list[int]], offset: int) -> dict[int, list[int]]:
    """The members of two buffers; slots of the second count on from `offset`."""
    joined = {group: list(slots) for group, slots in mine.items()}
    for group, slots in theirs.items():
        joined.setdefault(group, []).extend(slot + offset for slot in slots)
    return joined


def parted(stay: list[int], offset: int) -> tuple[list[int], list[int]]:
    """Slots of a union as those of the first and those of the second buffer."""
    return [slot for slot in stay if slot < offset], [slot - offset for slot in stay if slot >= offset]
