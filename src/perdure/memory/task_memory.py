"""A fixed number of examples of every finished task; the current task's are kept apart until it ends."""

from __future__ import annotations

from typing import Any

import torch

from perdure.memory.buffer import Buffer
from perdure.memory.columns import present
from perdure.seeding import derive
from perdure.tree import cat, leaves, take, to_device, tree_map


class TaskMemory:
    """Uniform samples of the tasks so far, one a task; with `writing="class_balanced"` as many rows of every class.

    Attributes
    ----------
    finished
        One dictionary of columns ("x", "y", "task") a finished task, in order.
    """

    def __init__(self, seed: int, writing: str = "reservoir") -> None:
        self.seed = seed
        self.writing = writing
        self.finished: list[dict[str, Any]] = []
        self.current: Buffer | None = None
        self._opened = (0, 0)
        self._all: dict[str, Any] | None = None

    def open(self, task: int, quota: int) -> None:
        """Start to sample a task: `quota` of its examples, each with the same probability."""
        self._opened = (task, quota)
        self.current = Buffer(quota, writing=self.writing, seed=derive(self.seed, task))

    def add(self, columns: dict[str, Any]) -> None:
        """Offer a batch of the current task."""
        if self.current is not None:
            self.current.add(columns)

    def close(self) -> None:
        """The task is over: its sample becomes part of the memory."""
        if self.current is not None and len(self.current):
            kept = {name: tree_map(torch.clone, self.current.view(name)) for name in ("x", "y", "task")}
            # A memory that was loaded elsewhere may lie on another device than the rows that come now.
            self.finished.append(_moved(kept, _devices(self.finished[0] if self.finished else kept)))
            self._all = None
        self.current = None

    def __len__(self) -> int:
        return sum(len(memory["y"]) for memory in self.finished)

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Any] | None:
        """`count` different examples of all finished tasks (all if there are fewer), or None if there is none."""
        total = len(self)
        if not total:
            return None
        if self._all is None:
            self._all = {name: cat([memory[name] for memory in self.finished]) for name in self.finished[0]}
        drawn: dict[str, Any] = take(self._all, torch.randperm(total, generator=generator)[:count])
        return drawn

    def bytes(self) -> int:
        """Bytes of all stored columns."""
        kept = sum(leaf.numel() * leaf.element_size() for memory in self.finished for leaf in leaves(memory))
        return kept + (0 if self.current is None else self.current.bytes())

    def state_dict(self) -> dict[str, Any]:
        current = None if self.current is None else self.current.state_dict()
        devices = {name: str(device) for name, device in _devices(self.finished[0] if self.finished else {}).items()}
        return {"finished": self.finished, "devices": devices, "current": current, "opened": list(self._opened)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        devices = {name: present(device) for name, device in state["devices"].items()}
        # Copies: a tensor that was read from a file may lie where kernels round differently.
        self.finished = [tree_map(torch.clone, _moved(memory, devices)) for memory in state["finished"]]
        self.current, self._all = None, None
        if state["current"] is not None:
            self.open(*state["opened"])
            assert self.current is not None
            self.current.load_state_dict(state["current"])


def _devices(columns: dict[str, Any]) -> dict[str, torch.device]:
    """Where each column lives: task numbers may be on the CPU while the inputs are not."""
    return {name: leaves(column)[0].device for name, column in columns.items()}


def _moved(columns: dict[str, Any], devices: dict[str, torch.device]) -> dict[str, Any]:
    return {name: to_device(column, devices[name]) for name, column in columns.items()}
