"""Reservoir sampling: a uniform random subset of everything that was offered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from perdure.errors import UsageError
from perdure.memory.writing import Uniforms, WritingPolicy, numpy_generator, smallest_dropped_key

if TYPE_CHECKING:
    from perdure.memory.buffer import Buffer


class Reservoir(WritingPolicy):
    """Every row seen is present with the same probability: a uniform random subset of the stream.

    Algorithm R: row n (counted from 0) takes slot n while there is room, afterwards slot floor(u (n + 1)) if that is
    below the capacity. Shrinking keeps a uniform subset and merging gives a uniform subset of both streams. What was
    dropped cannot come back when a buffer grows, so a grown buffer first holds fewer rows than it could: new rows enter
    with the probability that old ones had (every row carries a uniform key, and those below the smallest dropped key
    enter); once full it is again a uniform subset of the whole stream. A buffer that had been emptied starts afresh.

    Sources: Vitter 1985 (Algorithm R); Li 1994 (Algorithm L, whose falling threshold is used after growth).
    """

    name = "reservoir"

    def __init__(self) -> None:
        self.threshold: float | None = None  # None: Algorithm R. Else rows enter if their key is below it.
        self.origin = 0  # stream position from which rows are counted
        self._uniforms = Uniforms()
        self._plan: list[tuple[int, int]] | None = None  # accepted (index in the block, slot), ahead of the stream
        self._next = 0

    def place(
        self, count: int, columns: Mapping[str, Any], buffer: Buffer, capacity: int, generator: torch.Generator
    ) -> dict[int, int]:
        if self.threshold is not None:
            return self._place_by_key(self._uniforms.take(count, generator), len(buffer), capacity)
        placed: dict[int, int] = {}
        uniforms, row = self._uniforms, 0
        while row < count:
            if not uniforms.left:
                uniforms.refill(generator)
                self._plan = None
            if self._plan is None:
                self._plan, self._next = self._accepted(buffer.seen - self.origin + row, capacity), 0
            end = min(uniforms.used + count - row, len(uniforms.block))
            plan, first = self._plan, uniforms.used - row
            while self._next < len(plan) and plan[self._next][0] < end:
                index, slot = plan[self._next]
                placed[slot] = index - first
                self._next += 1
            row += end - uniforms.used
            uniforms.used = end
        return placed

    def _accepted(self, position: int, capacity: int) -> list[tuple[int, int]]:
        start = self._uniforms.used
        u = self._uniforms.block[start:]
        n = torch.arange(position, position + len(u))
        slot = torch.where(n < capacity, n, (u * (n + 1)).floor().long())
        accepted = (slot < capacity).nonzero().squeeze(1)
        return list(zip((accepted + start).tolist(), slot[accepted].tolist(), strict=True))

    def _place_by_key(self, keys: list[float], filled: int, capacity: int) -> dict[int, int]:
        placed: dict[int, int] = {}
        bound = self.threshold or 0.0
        for row, key in enumerate(keys):
            if key >= bound:
                continue
            if filled < capacity:
                placed[filled] = row
                filled += 1
                if filled == capacity:
                    bound *= max(key / bound, 2.0**-53) ** (1 / capacity)
            else:
                # Given that it is below the bound, the key is uniform again: its whole part chooses the slot and its
                # fraction draws the next bound, the largest of `capacity` keys.
                scaled = key / bound * capacity
                slot = min(int(scaled), capacity - 1)
                placed[slot] = row
                bound *= max(scaled - slot, 2.0**-30) ** (1 / capacity)
        self.threshold = bound
        return placed

    def resize(self, capacity: int, old: int, buffer: Buffer, generator: torch.Generator) -> list[int]:
        held, seen = len(buffer), buffer.seen - self.origin
        draw = numpy_generator(generator)
        self._plan = None
        if capacity == 0 or not held:
            self.threshold, self.origin = None, buffer.seen
        elif self.threshold is None:
            if held < min(capacity, seen):
                self.threshold = float(draw.beta(held + 1, seen - held))
        elif held == old:
            if capacity < held:
                self.threshold *= float(draw.beta(capacity, held - capacity))
            elif capacity > held:
                self.threshold += (1 - self.threshold) * float(draw.beta(1, seen - held))
        elif capacity <= held:
            self.threshold *= float(draw.beta(capacity, held - capacity + 1))
        if capacity >= held:
            return list(range(held))
        return sorted(torch.randperm(held, generator=generator)[:capacity].tolist())

    def merge(
        self, buffer: Buffer, other: Buffer, capacity: int, generator: torch.Generator
    ) -> tuple[list[int], list[int]]:
        theirs = other.writing
        if not isinstance(theirs, Reservoir):
            raise UsageError(f"a reservoir cannot merge a buffer written by '{theirs.name}'; use two reservoirs")
        draw = numpy_generator(generator)
        plain = True
        keys, bounds = [], []
        for part, policy in ((buffer, self), (other, theirs)):
            held, seen = len(part), part.seen - policy.origin
            key, bound = policy._keys(held, seen, held == part.capacity, draw)
            keys.append(key)
            bounds.append(bound)
            plain &= policy.threshold is None and (held == seen or held >= capacity)
        joined = np.concatenate(keys)
        order = np.argsort(joined, kind="stable")
        order = order[joined[order] < min(bounds)][:capacity]
        seen = buffer.seen - self.origin + other.seen - theirs.origin
        self.origin += theirs.origin
        self._plan = None
        if plain or len(order) == seen or capacity == 0:
            self.threshold = None
        else:
            self.threshold = float(joined[order[-1]]) if len(order) == capacity else min(bounds)
        chosen = np.sort(order)
        mine = len(keys[0])
        return chosen[chosen < mine].tolist(), (chosen[chosen >= mine] - mine).tolist()

    def _keys(self, held: int, seen: int, full: bool, draw: np.random.Generator) -> tuple[np.ndarray, float]:
        """Keys [held] as they could have been, and the smallest key that was dropped (1 if none was)."""
        if self.threshold is None:
            bound = smallest_dropped_key(held, seen, draw)
            return draw.random(held) * bound, bound
        keys = draw.random(held) * self.threshold
        if not full:
            return keys, self.threshold
        keys[draw.integers(held)] = self.threshold
        return keys, self.threshold + (1 - self.threshold) * float(draw.beta(1, seen - held))

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "origin": self.origin, "uniforms": self._uniforms.rest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.threshold, self.origin = state["threshold"], int(state["origin"])
        self._uniforms.block, self._uniforms.used, self._plan = state["uniforms"].clone(), 0, None
