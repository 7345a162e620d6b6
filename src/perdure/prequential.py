"""Accuracy on what arrives, before it is learned: every new row is a test first and training data afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.classes import ClassTable

if TYPE_CHECKING:
    from perdure.batch import Batch

NUMPY_TYPES = (torch.float32, torch.float64)


class Prequential:
    """Counts the current rows that were predicted rightly by the outputs their own step computed before its update.

    A prediction is the largest output among the columns that could be predicted when the batch arrived: those of its
    task where the scenario tells it, else those of the classes seen before, or all while there are none. Rows with a
    negative label, which are to be ignored, do not count, nor do exemplars of the past. On another device than the CPU
    the counts stay there until they are read, so no step waits for them.

    They are the outputs of the training step: in training mode, and of augmented rows where the learner augments.

    Where a method replaces the step or the prediction there are no outputs that predict, and where targets are no class
    columns there is nothing to count: then `correct` is None from there on.

    Source: A. P. Dawid, Present Position and Potential Developments: Some Personal Views: Statistical Theory: The
    Prequential Approach, 1984.
    """

    def __init__(self, classes: ClassTable) -> None:
        self.classes = classes
        self._known: int | None = 0
        self._rows = 0
        self._pending: Tensor | None = None
        self._width: int | None = None
        self._marks: Tensor | None = None
        self._columns: tuple[int, ...] = ()
        self._index: slice | Tensor | None = None
        self._numpy: slice | npt.NDArray[np.int64] | None = None

    @property
    def correct(self) -> int | None:
        """Rows that were predicted rightly so far; reading it waits for the device."""
        self._settle()
        return self._known

    @property
    def rows(self) -> int:
        """Rows that were counted so far; reading it waits for the device."""
        self._settle()
        return self._rows

    def _settle(self) -> None:
        if self._pending is not None:
            right, rows = self._pending.tolist()
            self._known, self._rows = None if self._known is None else self._known + right, self._rows + rows
            self._pending = None

    @property
    def accuracy(self) -> float | None:
        """The share of the rows so far; None without any, or where nothing could be counted."""
        return self.correct / self.rows if self.rows and self.correct is not None else None

    def ask(self, scenario: str | None, task: int | None) -> None:
        """Take down which columns can be predicted: before the labels of the batch are known."""
        known = scenario == "task" and task is not None
        self._marks = None
        if not known and self.classes.waiting and self._width is not None:
            self._marks = self.classes.marks(self._width)
            return
        columns = self.classes.by_task.get(task, ()) if known else self.classes.seen  # type: ignore[arg-type]
        if columns != self._columns:
            self._columns, self._index = columns, self.classes.index(columns)
            self._numpy = np.array(columns) if isinstance(self._index, Tensor) else self._index

    def count(self, batch: Batch, outputs: Tensor | None) -> None:
        """Compare the predictions for the current rows of a finished step with their targets; `outputs` is detached."""
        y, size = batch.now.y, batch.now.size
        if outputs is None or outputs.dim() != 2 or not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point():
            self._known = None
        if self._known is None or outputs is None:
            self._rows += size
            return
        self._width, new = outputs.shape[1], batch.now.new
        if outputs.device.type == "cpu" and outputs.dtype in NUMPY_TYPES and self._marks is None:
            labels = y.numpy()
            counted = labels >= 0 if new is None else (labels >= 0) & new.numpy()
            right = self._predicted(outputs.numpy()[:size], self._numpy) == labels
            self._known += int(np.count_nonzero(right & counted))
            self._rows += int(np.count_nonzero(counted))
        else:
            counted = y >= 0 if new is None else (y >= 0) & new.to(y.device, non_blocking=True)
            if self._marks is None:
                predicted = self._predicted(outputs[:size], self._index)
            else:
                seen = F.pad(self._marks, (0, self._width - len(self._marks)))
                predicted = outputs[:size].masked_fill(~seen, float("-inf")).argmax(1)
            found = torch.stack([(predicted == y) & counted, counted]).sum(1)
            self._pending = found if self._pending is None else self._pending.add_(found)

    @staticmethod
    def _predicted(outputs: Any, index: Any) -> Any:
        """The column of the largest output of each row among those of the index: of a tensor or an array."""
        if index is None:
            return outputs.argmax(1)
        if isinstance(index, slice):
            return outputs[:, index].argmax(1) + index.start
        return index[outputs[:, index].argmax(1)]

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"correct": self.correct, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved counts."""
        self._known, self._rows, self._pending = state["correct"], state["rows"], None
