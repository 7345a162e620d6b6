"""A run on disk: the log of what happened, the last two checkpoints, and the result."""

from __future__ import annotations

import base64
import json
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from perdure.checkpoint import is_checkpoint, load_state, save_state
from perdure.errors import CheckpointError, PerdureWarning, StorageError
from perdure.pictures import FOLDER as PICTURES

KEPT = 2


class RunFolder:
    """The folder of one run with one seed.

    `log.jsonl` has one event a line and only grows; `checkpoint/000123/` is the state after so many updates, the last
    two are kept; `results.json` appears when the run is finished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.log = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoint"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot create {self.path}: {error.strerror}; choose another folder") from error

    def write(self, event: dict[str, Any]) -> None:
        """Append one event to the log."""
        try:
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(event, allow_nan=False) + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot write {self.log}: {error.strerror}; free space or choose another folder"
            ) from error

    def events(self) -> list[dict[str, Any]]:
        """The events of the log; a last line that was torn by a crash is dropped."""
        return read_log(self.log)

    def truncate(self, count: int) -> None:
        """Forget what was logged after the first `count` events (what a resumed run will log again)."""
        kept = self.events()[:count]
        partial = self.log.with_name(".log.jsonl.partial")
        try:
            partial.write_text("".join(json.dumps(event, allow_nan=False) + "\n" for event in kept), encoding="utf-8")
            partial.replace(self.log)
        except OSError as error:
            raise StorageError(
                f"cannot write {self.log}: {error.strerror}; free space or choose another folder"
            ) from error

    def clear(self) -> None:
        """Forget an earlier run: its checkpoints would outlive those of the new one, and be resumed instead."""
        try:
            if self.checkpoints.exists():
                shutil.rmtree(self.checkpoints)
            shutil.rmtree(self.path / PICTURES, ignore_errors=True)
            (self.path / "results.json").unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot clear {self.path}: {error.strerror}; choose another folder") from error
        self.truncate(0)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint and drop all but the last two."""
        save_state(self.checkpoints / f"{step:09d}", state)
        for old in self.saved()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def saved(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(p for p in self.checkpoints.iterdir() if not p.name.startswith(".") and is_checkpoint(p))

    def load(self, device: Any = "cpu") -> dict[str, Any] | None:
        """The newest checkpoint that is intact, or None if there is none; a damaged one is warned about.

        Raises
        ------
        CheckpointError
            If there are checkpoints and all of them are damaged.
        """
        failures: list[CheckpointError] = []
        for path in reversed(self.saved()):
            try:
                state: dict[str, Any] = load_state(path, device)
            except CheckpointError as error:
                failures.append(error)
                continue
            for failure in failures:
                warnings.warn(f"{failure}; continuing from {path.name}", PerdureWarning, stacklevel=3)
            return state
        if failures:
            raise failures[0]
        return None


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The events of a `log.jsonl`; a torn last line is dropped.

    Raises
    ------
    CheckpointError
        If a line before the last is not valid.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    events = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            events.append(json.loads(line))
        except ValueError:
            if number == len(lines) - 1:
                break
            raise CheckpointError(
                f"line {number} of {path} is damaged; resume from a checkpoint to rewrite it"
            ) from None
    return events


def pack_predictions(columns: np.ndarray | None) -> str | None:
    """Predicted class columns, int16 [n], as compressed text for the log."""
    if columns is None:
        return None
    return base64.b85encode(zlib.compress(columns.astype("<i2").tobytes(), 9)).decode()


def unpack_predictions(text: str | None) -> np.ndarray | None:
    """The opposite of `pack_predictions`."""
    if text is None:
        return None
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype="<i2").astype(np.int16)
