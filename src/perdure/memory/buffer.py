"""A buffer of remembered examples: preallocated columns, filled by one policy and read by another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.errors import DataError, UnknownNameError, UsageError
from perdure.mapped import blocks, mapped_zeros, row_bytes
from perdure.memory.class_balanced import ClassBalanced
from perdure.memory.columns import OnDevices, padded, pairs, present, span
from perdure.memory.greedy_balanced import GreedyBalanced
from perdure.memory.loss_aware import LossAware
from perdure.memory.ranked import Ranked
from perdure.memory.reading import Balanced, ReadingPolicy, Uniform
from perdure.memory.reservoir import Reservoir
from perdure.memory.ring import Ring
from perdure.memory.writing import WritingPolicy
from perdure.registry import nearest
from perdure.seeding import Part, generator
from perdure.tree import leaves, rows, tree_map

WRITING: dict[str, Callable[[], WritingPolicy]] = {
    "reservoir": Reservoir,
    "class_balanced": ClassBalanced,
    "task_balanced": lambda: ClassBalanced("task"),
    "greedy_balanced": GreedyBalanced,
    "ring": Ring,
    "class_ring": lambda: Ring("y"),
    "loss_aware": LossAware,
    "herding": lambda: Ranked("herding"),
    "nearest_mean": lambda: Ranked("nearest_mean"),
    "k_center": lambda: Ranked("k_center"),
}
READING: dict[str, Callable[[], ReadingPolicy]] = {
    "uniform": Uniform,
    "class_balanced": lambda: Balanced("y"),
    "task_balanced": lambda: Balanced("task"),
}


class Buffer:
    """Remembered rows in preallocated columns, with a private generator for writing and one for reading.

    The first `add` decides the columns, their dtypes and their devices. A column is a tensor [rows, ...] or a tree of
    tensors. Column "logits" [rows, classes] may widen when a head grows; "valid" [rows] then says how many classes each
    row had when it was stored. Reading never changes what is stored, nor any other generator.

    Parameters
    ----------
    capacity
        Rows held at most; 0 stores nothing; None if only `bytes_budget` limits the size.
    writing
        "reservoir" (default), "class_balanced", "task_balanced", "greedy_balanced", "ring" (the newest of every task),
        "class_ring", "loss_aware" (needs a column "loss"), "herding", "nearest_mean", "k_center" (rows are added in
        the order of their rank), or a policy object.
    reading
        "uniform" (default), "class_balanced", "task_balanced", or a policy object. All without replacement.
    seed
        A number or a tuple of numbers and strings.
    bytes_budget
        The columns together take at most this many bytes; the capacity becomes what fits.
    device
        Where the columns live; by default where the first rows are.
    storage
        "memory", or "mapped": the columns are files without a name in `folder`, of which the system keeps in memory
        what is in use. For buffers larger than memory, on the CPU. Contents and draws are the same bit for bit.
    folder
        Where mapped columns are; the space is claimed when the first rows come.

    Raises
    ------
    UsageError
        For a negative capacity, no limit at all, unknown policies, or columns that do not fit those stored.

    >>> buffer = Buffer(2, seed=0)
    >>> buffer.add({"x": torch.tensor([[1.0], [2.0], [3.0]]), "y": torch.tensor([0, 1, 0])})
    >>> len(buffer), buffer.seen, buffer.bytes()
    (2, 3, 24)
    >>> sorted(buffer.sample(5))
    ['slot', 'x', 'y']
    """

    def __init__(
        self,
        capacity: int | None,
        *,
        writing: str | WritingPolicy = "reservoir",
        reading: str | ReadingPolicy = "uniform",
        seed: int | tuple[Part, ...] = 0,
        bytes_budget: int | None = None,
        device: str | torch.device | None = None,
        storage: str = "memory",
        folder: str | Path | None = None,
    ) -> None:
        if capacity is None and bytes_budget is None:
            raise UsageError("a buffer needs a capacity in rows or a bytes_budget; give one of them")
        for argument, value in (("capacity", capacity), ("bytes_budget", bytes_budget)):
            if value is not None and value < 0:
                raise UsageError(f"buffer {argument} is {value}, it must be 0 or more")
        if storage not in ("memory", "mapped") or (storage == "mapped") == (folder is None):
            raise UsageError(
                f"buffer storage is '{storage}' with folder {folder}; it must be 'memory' without a folder, or "
                "'mapped' with the folder for its files"
            )
        if storage == "mapped" and device is not None and torch.device(device).type != "cpu":
            raise UsageError(f"mapped columns are on the CPU, not on {device}; leave out device, or storage='mapped'")
        self.folder = None if folder is None else Path(folder).absolute()
        if self.folder is not None:
            device = "cpu"
        self.bytes_budget = bytes_budget
        self.device = None if device is None else torch.device(device)
        self.writing = _policy("writing", writing, WRITING, WritingPolicy)
        self.reading = _policy("reading", reading, READING, ReadingPolicy)
        self.columns: dict[str, Any] = {}
        self.seen = 0
        self.uneven = False  # whether rows differ in "valid", which is read only then
        self._names: dict[str, None] = {}
        self._limit = capacity
        self._capacity = capacity if bytes_budget is None or not capacity else None
        self._filled = 0
        parts = seed if isinstance(seed, tuple) else (seed,)
        self._writer = generator(*parts, "buffer", "write")
        self._reader = generator(*parts, "buffer", "read")

    @property
    def capacity(self) -> int | None:
        """Rows held at most; None until the first rows tell how many fit into the budget."""
        return self._capacity

    def __len__(self) -> int:
        return self._filled

    # -- writing ------------------------------------------------------------------------------------------------

    def add(self, columns: Mapping[str, Any]) -> None:
        """Offer a batch of rows: {"x": tensor or tree [b, ...], "y": [b], ...}; the writing policy stores some of them.

        A plain int in place of a column is the value of every row (int64 [b] on the CPU).

        Raises
        ------
        UsageError, DataError
            If the columns differ in name, shape, dtype or length from those stored.
        """
        count = rows(next(iter(columns.values())))
        if not self.columns:
            self._allocate(_written_out(columns, count))
        elif columns.keys() != self._names.keys():
            stored = ", ".join(sorted(self._names))
            raise UsageError(f"rows with columns {', '.join(sorted(columns))} do not fit a buffer of {stored}")
        if "logits" in columns:
            self._widen(columns["logits"].shape[1])
        capacity = self._capacity or 0
        placed = self.writing.place(count, columns, self, capacity, self._writer)
        if placed:
            slots, chosen = list(placed), list(placed.values())
            every = chosen == list(range(count))
            self._write(span(slots), None if every else torch.tensor(chosen), _written_out(columns, count), count)
            self._filled = max(self._filled, max(slots) + 1)
        self.seen += count

    def update(self, slots: Tensor, columns: Mapping[str, Any]) -> None:
        """Overwrite some columns of `slots` (int64 [n], different from each other) with `columns` of n rows each."""
        unknown = columns.keys() - self.columns.keys()
        if unknown:
            raise UsageError(f"the buffer has no column '{min(unknown)}', only {', '.join(sorted(self.columns))}")
        if slots.device.type == "cpu" and len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < self._filled:
            raise UsageError(f"slots to update must lie in 0 to {self._filled - 1}")
        if "logits" in columns:
            self._widen(columns["logits"].shape[1])
        self._write(slots, None, columns, len(slots))

    def _write(self, slots: Tensor | slice, chosen: Tensor | None, columns: Mapping[str, Any], count: int) -> None:
        indices, sources = OnDevices(slots), OnDevices(chosen)
        for name, offers in columns.items():
            for column, offered in pairs(name, self.columns[name], offers):
                if offered.shape[0] != count:
                    raise DataError(f"column '{name}' has {offered.shape[0]} rows, the batch has {count}")
                source = offered.detach()
                if chosen is not None:
                    source = source.index_select(0, sources.on(source.device))
                # Towards the CPU the copy has to be waited for, or the rows would be read before they arrive.
                source = source.to(column.device, column.dtype, non_blocking=source.device.type == "cpu")
                if name == "logits":
                    valid = self.columns["valid"]
                    where = indices.on(valid.device)
                    valid[where] = source.shape[1]
                    self.uneven |= source.shape[1] < column.shape[1]
                    source = padded(source, column.shape[1])
                where = indices.on(column.device)
                if isinstance(where, slice):
                    column[where] = source
                else:
                    column.index_copy_(0, where, source)

    # -- reading ------------------------------------------------------------------------------------------------

    def sample(self, n: int, *, where: Tensor | None = None) -> dict[str, Any]:
        """Draw `min(n, available)` different rows of every column, and their "slot" [n'] (int64, on the CPU).

        "valid" is among the columns only if rows differ in it.

        Parameters
        ----------
        where
            Draw only from these rows: a boolean mask over the filled rows [len], or slots (int64).
        """
        if n < 0:
            raise UsageError(f"cannot sample {n} rows, the number must be 0 or more")
        slots = self.reading.choose(n, self._available(where), self, self._reader)
        index = OnDevices(slots)
        drawn = {name: _selected(self.columns[name], index) for name in self._names}
        if self.uneven:
            drawn["valid"] = _selected(self.columns["valid"], index)
        drawn["slot"] = slots
        return drawn

    def take(self, slots: Tensor) -> dict[str, Any]:
        """Copies of the rows in `slots` (int64 [n]) of every column."""
        index = OnDevices(slots)
        return {name: _selected(column, index) for name, column in self.columns.items()}

    def view(self, name: str) -> Any:
        """The filled rows of one column, not copied."""
        return tree_map(lambda leaf: leaf[: self._filled], self.columns[name])

    def _available(self, where: Tensor | None) -> Tensor | None:
        if where is None:
            return None
        if where.dtype == torch.bool:
            if where.shape != (self._filled,):
                raise UsageError(f"the mask has shape {tuple(where.shape)}, the buffer holds {self._filled} rows")
            return where.nonzero().squeeze(1).cpu()
        return where.cpu()

    # -- size ---------------------------------------------------------------------------------------------------

    def resize(self, capacity: int) -> None:
        """Change the capacity. Shrinking drops rows without bias; see the writing policy for growth."""
        if capacity < 0:
            raise UsageError(f"buffer capacity is {capacity}, it must be 0 or more")
        self._limit = capacity
        if self.columns:
            self._change_capacity(self._fitting())
        else:
            self._capacity = capacity if self.bytes_budget is None or not capacity else None

    def merge(self, other: Buffer) -> None:
        """Take in another buffer as if this one had seen both streams; the capacity stays, `other` is left alone."""
        if not other.columns:
            return
        if not self.columns:
            self._allocate({name: column for name, column in other.columns.items() if name != "valid"})
        if other.columns.keys() != self.columns.keys():
            raise UsageError(
                f"a buffer of {', '.join(sorted(self.columns))} cannot merge one of {', '.join(sorted(other.columns))}"
            )
        if "logits" in self.columns:
            self._widen(other.columns["logits"].shape[1])
        capacity = self._capacity or 0
        mine, theirs = self.writing.merge(self, other, capacity, self._writer)
        self._keep(mine, capacity)
        self._filled += len(theirs)
        for part in blocks(len(theirs), other.row_bytes()):
            taken = other.take(torch.tensor(theirs[part], dtype=torch.int64))
            slots = torch.arange(len(mine) + part.start, len(mine) + part.stop)
            valid = taken.pop("valid", None)
            self._write(slots, None, taken, len(slots))
            if valid is not None:
                self.columns["valid"][slots.to(valid.device)] = valid.to(self.columns["valid"].device)
                self.uneven |= other.uneven
        self.seen += other.seen

    def to(self, device: str | torch.device) -> Buffer:
        """Move all columns, and those of later additions, to a device.

        Raises
        ------
        UsageError
            If the columns are files.
        """
        if self.folder is not None:
            raise UsageError(f"the buffer's columns are files in {self.folder}, which cannot move to {device}")
        self.device = torch.device(device)
        self.columns = {name: tree_map(lambda leaf: leaf.to(device), tree) for name, tree in self.columns.items()}
        return self

    def bytes(self) -> int:
        """Bytes reserved by all columns, filled or not."""
        return sum(leaf.numel() * leaf.element_size() for tree in self.columns.values() for leaf in leaves(tree))

    def row_bytes(self) -> int:
        """Bytes of one row in all columns."""
        return sum(row_bytes(leaf) for tree in self.columns.values() for leaf in leaves(tree))

    def stats(self) -> dict[str, Any]:
        """Capacity, rows held and seen, bytes, and how many rows there are of each class and of each task."""
        counts = {
            kind: dict(sorted(Counter(self.view(name).tolist()).items()))
            for kind, name in (("classes", "y"), ("tasks", "task"))
            if isinstance(self.columns.get(name), Tensor)
            and self.columns[name].ndim == 1
            and not self.columns[name].is_floating_point()
        }
        return {"capacity": self._capacity, "filled": self._filled, "seen": self.seen, "bytes": self.bytes(), **counts}

    def _allocate(self, columns: Mapping[str, Any]) -> None:
        for name in ("slot", "valid"):
            if name in columns:
                raise UsageError(f"'{name}' is the buffer's own column; name yours differently")
        empty = {name: tree_map(lambda leaf: leaf.new_empty((0, *leaf.shape[1:])), c) for name, c in columns.items()}
        if self.device is not None:
            empty = {name: tree_map(lambda leaf: leaf.to(self.device), column) for name, column in empty.items()}
        if "logits" in empty:
            empty["valid"] = torch.zeros(0, dtype=torch.int64, device=empty["logits"].device)
        self.columns, self.uneven, self._names = empty, False, dict.fromkeys(columns)
        try:
            capacity = self._fitting()
        except UsageError:
            self.columns = {}
            raise
        self._keep([], capacity)

    def _fitting(self) -> int:
        """How many rows the limit and the budget allow."""
        if self.bytes_budget is None:
            return self._limit or 0
        row = self.row_bytes()
        fitting = self.bytes_budget // max(row, 1)
        if not fitting and self.bytes_budget and self._limit != 0:
            raise UsageError(f"bytes_budget is {self.bytes_budget}, one row takes {row} bytes; give at least that")
        return fitting if self._limit is None else min(fitting, self._limit)

    def _widen(self, width: int) -> None:
        column = self.columns["logits"]
        if width > column.shape[1]:
            wider = self._zeros(column, (column.shape[0], width, *column.shape[2:]))
            for part in blocks(self._filled, row_bytes(wider)):
                wider[part] = padded(column[part], width)
            self.columns["logits"] = wider
            self.uneven |= self._filled > 0
            if self.bytes_budget is not None:
                self._change_capacity(self._fitting())

    def _change_capacity(self, capacity: int) -> None:
        old = self._capacity or 0
        if capacity != old:
            self._keep(self.writing.resize(capacity, old, self, self._writer), capacity)

    def _keep(self, slots: list[int], capacity: int) -> None:
        """Move the rows in `slots` to the front of columns of a new capacity."""
        lengths = {leaf.shape[0] for tree in self.columns.values() for leaf in leaves(tree)}
        if lengths == {capacity} and slots == list(range(self._filled)):
            return
        self.columns = self._copied(self.columns, torch.tensor(slots, dtype=torch.int64), capacity)
        self._capacity, self._filled = capacity, len(slots)

    def _copied(self, columns: Mapping[str, Any], slots: Tensor, capacity: int) -> dict[str, Any]:
        """New columns of `capacity` rows that begin with those in `slots`."""
        index = OnDevices(slots)

        def moved(leaf: Tensor) -> Tensor:
            fresh = self._zeros(leaf, (capacity, *leaf.shape[1:]))
            chosen = index.on(leaf.device)
            for part in blocks(len(slots), row_bytes(leaf)):
                if leaf.device == fresh.device:  # straight into its place: freed blocks of this size may stay claimed
                    torch.index_select(leaf, 0, chosen[part], out=fresh[part])
                else:
                    fresh[part] = leaf.index_select(0, chosen[part])
            return fresh

        return {name: tree_map(moved, column) for name, column in columns.items()}

    def _zeros(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.folder is None:
            return like.new_zeros(shape, device=self.device)
        return mapped_zeros(shape, like.dtype, self.folder)

    # -- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The filled rows, both generators, the policies' state and the counts.

        The rows are copies; those of mapped columns are the rows themselves, to be written to disk before the buffer
        changes (`save_state` copies them file to file, without the memory for them).
        """
        self.reading.settle(self._reader)
        copied = Tensor.clone if self.folder is None else Tensor.detach
        return {
            "capacity": self._capacity,
            "limit": self._limit,
            "seen": self.seen,
            "filled": self._filled,
            "uneven": self.uneven,
            "columns": {name: tree_map(copied, self.view(name)) for name in self.columns},
            "devices": {name: str(leaves(column)[0].device) for name, column in self.columns.items()},
            "write_generator": self._writer.get_state(),
            "read_generator": self._reader.get_state(),
            "writing": {"name": self.writing.name, **self.writing.state_dict()},
            "reading": {"name": self.reading.name},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; columns return to the device they were on, if this machine has it.

        Raises
        ------
        UsageError
            If the state is of a buffer with another writing policy.
        """
        written = state["writing"]["name"]
        if written != self.writing.name:
            raise UsageError(f"the saved buffer was written by '{written}', this one is by '{self.writing.name}'")
        self.writing.load_state_dict(state["writing"])
        self.reading.settle(self._reader)
        self._writer.set_state(state["write_generator"].cpu())
        self._reader.set_state(state["read_generator"].cpu())
        self.seen, self._limit = int(state["seen"]), state["limit"]
        self._filled, self._capacity = int(state["filled"]), state["capacity"]
        self.columns = {}
        for name, column in state["columns"].items():
            device = self.device or present(state["devices"][name])
            self.columns[name] = tree_map(lambda leaf, device=device: leaf.to(device), column)  # type: ignore[misc]
        self._names = {name: None for name in self.columns if name != "valid"}
        self.uneven = bool(state["uneven"])
        if self.columns:
            # Never the tensors of the state themselves: somebody else may load it too.
            self.columns = self._copied(self.columns, torch.arange(self._filled), int(state["capacity"]))


def _selected(column: Any, index: OnDevices) -> Any:
    if isinstance(column, Tensor):
        return column.index_select(0, index.on(column.device))
    return tree_map(lambda leaf: leaf.index_select(0, index.on(leaf.device)), column)


def _written_out(columns: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {
        name: torch.full((count,), column, dtype=torch.int64) if isinstance(column, int) else column
        for name, column in columns.items()
    }


def _policy(kind: str, policy: Any, known: Mapping[str, Callable[[], Any]], base: type) -> Any:
    if isinstance(policy, base):
        return policy
    if policy not in known:
        hint = nearest(str(policy), known) or ";"
        raise UnknownNameError(f"unknown {kind} policy '{policy}'{hint} there are {', '.join(known)}")
    return known[policy]()
