"""First in, first out: the newest rows of every task or class."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from perdure.errors import UsageError
from perdure.memory.groups import KINDS, groups_of
from perdure.memory.writing import WritingPolicy

if TYPE_CHECKING:
    from perdure.memory.buffer import Buffer


class Ring(WritingPolicy):
    """Every task (or class) keeps its newest rows, each as many as every other: capacity / tasks seen.

    A row takes free room, else the place of the oldest row of its own group, or of the largest group as long as that is
    larger. So what a group holds are always its last rows, without a hole. Draws no random number. Where the task is
    not known, the rows of the whole stream are one group.

    Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840 (per task); Chaudhry et al. 2019, arXiv 1902.10486 (per class).

    Parameters
    ----------
    column
        The groups: "task" (the policy "ring") or "y" ("class_ring").
    """

    def __init__(self, column: str = "task") -> None:
        self.column = column
        self.name = "ring" if column == "task" else f"{KINDS.get(column, column)}_ring"
        self.queues: dict[int, deque[int]] = {}  # group -> its slots, oldest first

    def place(
        self, count: int, columns: Mapping[str, Any], buffer: Buffer, capacity: int, generator: torch.Generator
    ) -> dict[int, int]:
        placed: dict[int, int] = {}
        filled = len(buffer)
        groups = groups_of(columns, self.column, count, self.name)
        if not capacity:
            return placed
        for row, group in enumerate(groups):
            own = self.queues.setdefault(group, deque())
            if filled < capacity:
                slot = filled
                filled += 1
            else:
                slot = self._drop_oldest(own)
            own.append(slot)
            placed[slot] = row
        return placed

    def _drop_oldest(self, own: deque[int] | None = None) -> int:
        """Free the oldest slot of the largest group; of `own` if it is one of the largest."""
        group, largest = max(self.queues.items(), key=lambda item: len(item[1]))
        if own is not None and len(own) == len(largest):
            return own.popleft()
        slot = largest.popleft()
        if not largest:
            del self.queues[group]
        return slot

    def resize(self, capacity: int, old: int, buffer: Buffer, generator: torch.Generator) -> list[int]:
        for _ in range(len(buffer) - capacity):
            self._drop_oldest()
        stay = sorted(slot for queue in self.queues.values() for slot in queue)
        moved = {slot: new for new, slot in enumerate(stay)}
        self.queues = {group: deque(moved[slot] for slot in queue) for group, queue in self.queues.items()}
        return stay

    def merge(
        self, buffer: Buffer, other: Buffer, capacity: int, generator: torch.Generator
    ) -> tuple[list[int], list[int]]:
        raise UsageError(
            "a ring keeps the newest rows, and two streams do not say which of their rows are newer; merge reservoirs"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"groups": list(self.queues), "queues": [list(queue) for queue in self.queues.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pairs = zip(state["groups"], state["queues"], strict=True)
        self.queues = {int(group): deque(map(int, queue)) for group, queue in pairs}
