"""Which class columns belong to which task, which have been seen, and what that means for loss and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perdure.batch import Allowed
from perdure.errors import UsageError


class ClassTable:
    """Class columns by task.

    Parameters
    ----------
    active
        Columns in the training loss outside the task-incremental scenario: "all", or those "seen" so far.
    """

    def __init__(self, active: str, device: torch.device) -> None:
        self.active = active
        self.device = device
        self.by_task: dict[int, tuple[int, ...]] = {}
        self._table: Tensor | None = None
        self._all: list[int] = []
        self._unread: list[Tensor] = []
        self._marks: Tensor | None = None
        self._marked = 0

    def open(self, task: int, classes: Sequence[int]) -> None:
        """A task begins: its columns count as seen."""
        if classes:
            self.by_task[task] = tuple(classes)
            self._all = sorted({*self._all, *classes})
            self._table = self._marks = None

    def see(self, y: Any, wait: bool = False) -> list[int]:
        """Labels arrive, int64 [rows], whose tasks nobody tells; returns the columns that are new.

        Labels on another device than the CPU are read later, when somebody asks for what was seen, unless `wait`.
        Negative labels mark rows to be ignored and are no classes.
        """
        if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point():
            return []
        if y.device.type != "cpu" and not wait:
            self._unread.append(y.clone())
            if len(self._unread) >= 256:
                self._read()
            return []
        new = sorted(label for label in set(y.tolist()).difference(self._all) if label >= 0)
        if new:
            self._all, self._marks = sorted({*self._all, *new}), None
        return new

    def _read(self) -> list[int]:
        if self._unread:
            waiting, self._unread, self._marks = torch.cat(self._unread), [], None
            self.see(waiting.cpu())
        return self._all

    @property
    def _seen(self) -> list[int]:
        return self._read() if self._unread else self._all

    @property
    def seen(self) -> tuple[int, ...]:
        """Columns of all tasks begun so far, and where tasks are not announced of all labels so far; sorted."""
        return tuple(self._seen)

    @property
    def width(self) -> int:
        """One more than the highest column seen."""
        return self._seen[-1] + 1 if self._seen else 0

    @property
    def waiting(self) -> bool:
        """Whether labels have come that were not read from their device yet."""
        return bool(self._unread)

    def marks(self, width: int) -> Tensor:
        """Boolean [width] on the device: the columns seen, all if there are none. Unread labels count and stay unread.

        The tensor never changes: what is seen later is in the next one.
        """
        if self._marks is None or len(self._marks) != width + 1 or self._marks.device != self.device:
            read = torch.zeros(width + 1, dtype=torch.bool)
            read[[column for column in self._all if column < width]] = True
            self._marks, self._marked = read.to(self.device), 0
        for labels in self._unread[self._marked :]:
            columns = labels.to(self.device, torch.int64)
            # What is no column goes behind the last one.
            self._marks = self._marks.index_fill(0, columns.where(columns >= 0, width).clamp(max=width), True)
        self._marked = len(self._unread)
        seen = self._marks[:width]
        return seen | ~seen.any()

    def allowed(self, tasks: Tensor | None, current: int | None, scenario: str | None, width: int) -> Allowed:
        """Columns, of `width` in all, that count in the loss of rows of `tasks` [rows] (None: of the current task)."""
        if scenario == "task" and tasks is not None:
            return self.mask(tasks, width)
        if scenario == "task":
            return self._columns(self.by_task.get(-1 if current is None else current, ()), width)
        return self._columns(self._seen, width) if self.active == "seen" else None

    def index(self, columns: Sequence[int]) -> slice | Tensor | None:
        """Columns as something to index outputs with; None for all if there are none."""
        if not columns:
            return None
        block = _block(columns)
        return block if block is not None else torch.tensor(list(columns), device=self.device)

    def _columns(self, columns: Sequence[int], width: int) -> Allowed:
        block = _block(columns) if columns else None
        if block is not None or not columns:
            return block
        mask = torch.zeros(1, width, dtype=torch.bool)
        mask[0, list(columns)] = True
        return mask.to(self.device)

    def argmax(self, outputs: Tensor, task: int | None = None) -> Tensor:
        """Predicted columns, int64 [rows]: among a task's, else among those seen, else among all."""
        if task is not None and task not in self.by_task:
            raise UsageError(f"task {task} has not begun; there are {sorted(self.by_task) or 'none'}")
        chosen = self._seen if task is None else self.by_task[task]
        return among(outputs, chosen)

    def mask(self, tasks: Tensor, width: int) -> Tensor:
        """Boolean [rows, width]: the columns of each row's task."""
        if self._table is None or self._table.shape[1] != width:
            table = torch.zeros(max(self.by_task) + 1, width, dtype=torch.bool)
            for task, classes in self.by_task.items():
                table[task, list(classes)] = True
            self._table = table.to(self.device)
        chosen: Tensor = self._table.index_select(0, tasks.to(self.device))
        return chosen

    def state_dict(self) -> dict[str, Any]:
        tasks = {str(task): list(classes) for task, classes in self.by_task.items()}
        return {"by_task": tasks, "seen": list(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.by_task, self._all, self._unread, self._table = {}, list(state.get("seen", ())), [], None
        self._marks = None
        for task, classes in state["by_task"].items():
            self.open(int(task), classes)


def among(outputs: Tensor, columns: Sequence[int]) -> Tensor:
    """The column with the largest output among `columns` (all if empty), int64 [rows]."""
    if not columns:
        return _argmax(outputs)
    block = _block(columns)
    if isinstance(block, slice):
        return _argmax(outputs[..., block]) + int(block.start)
    chosen = torch.tensor(list(columns), device=outputs.device)
    return chosen[_argmax(outputs[..., chosen])]


def _argmax(outputs: Tensor) -> Tensor:
    """`outputs.argmax(-1)`; NumPy finds the same column (the first of equal ones) four times as fast."""
    if outputs.device.type == "cpu" and outputs.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.asarray(outputs.detach().numpy().argmax(-1)))
    return outputs.argmax(-1)


def _block(columns: Sequence[int]) -> slice | None:
    """The columns as a slice if they are consecutive."""
    first, last = columns[0], columns[-1]
    return slice(first, last + 1) if list(columns) == list(range(first, last + 1)) else None
