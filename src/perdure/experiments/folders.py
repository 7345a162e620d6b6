"""The folders that runs live in: claimed before anything is written, cleared safely, read back as results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perdure.errors import CheckpointError, StorageError, UsageError
from perdure.files import write_atomically
from perdure.pictures import FOLDER as PICTURES
from perdure.results import Results, summarise

CONFIG, RESULTS, COMPARISON = "config.yaml", "results.json", "comparison.json"
_OURS = (CONFIG, RESULTS, "log.jsonl", "checkpoint", "report.html", "accuracy.png", PICTURES)


def seed_folder(folder: Path, seed: int, seeds: Sequence[int]) -> Path:
    """Where one seed lives: the folder itself if it is the only one."""
    return folder if len(seeds) == 1 else folder / f"seed-{seed}"


def is_empty(folder: Path) -> bool:
    """Whether nothing is there yet."""
    try:
        return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise StorageError(f"cannot read {folder}: {_reason(error)}; choose another folder") from error


def check_free(folder: Path, overwrite: bool = False) -> None:
    """Raise UsageError unless a new run may be written to `folder`."""
    if is_empty(folder):
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; --out must be a new or an empty folder")
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is not empty and holds no run; --out must be a new or an empty folder")
    if not overwrite:
        raise UsageError(f"{folder} holds a run already; continue it with --resume {folder}, or add --overwrite")


class NewFolder:
    """A folder of a run that is being written; `discard` leaves things as they were before.

    Parameters
    ----------
    path
        A folder that passed `check_free`; an earlier run in it is removed, and nothing else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            clear(path)
        except OSError as error:
            raise StorageError(f"cannot write to {path}: {_reason(error)}; choose another folder") from error

    @property
    def resumable(self) -> bool:
        """Whether there is a checkpoint or a result that would be a loss."""
        return any(self.path.glob("**/checkpoint/*/state.json")) or any(self.path.glob(f"**/{RESULTS}"))

    def discard(self) -> None:
        """Remove what was written and the folders that were made for it."""
        clear(self.path)
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def clear(folder: Path) -> None:
    """Remove a run's own files from a folder, and nothing else."""
    for entry in [*(folder / name for name in _OURS), *folder.glob("seed-*")]:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def write_summary(folder: Path, runs: Sequence[Results]) -> None:
    """Write the `results.json` of several seeds."""
    write_json(folder / RESULTS, summary_of(runs))


def summary_of(runs: Sequence[Results]) -> dict[str, Any]:
    """What several seeds are together: `runs`, and `mean`, `std`, `ci95` keyed like their `metrics`."""
    first = runs[0]
    return {
        "benchmark": first.benchmark,
        "scenario": first.scenario,
        "methods": list(first.methods),
        "seeds": [run.seed for run in runs],
        **summarise(runs),
        "runs": [run.to_dict() for run in runs],
    }


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_runs(folder: Path) -> list[Results]:
    """The finished runs in the folder of a run, one a seed.

    Raises
    ------
    UsageError
        If it is no folder of a run, or none of its seeds has finished.
    CheckpointError
        If a result is damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"'{folder}' is no folder; give the folders of finished runs")
    seeds = sorted(folder.glob(f"seed-*/{RESULTS}"), key=lambda path: (len(path.parent.name), path.parent.name))
    if seeds:
        return [Results.load(path) for path in seeds]
    if (folder / RESULTS).is_file():
        return [Results.load(folder)]
    if (folder / CONFIG).is_file():
        raise UsageError(f"the run in '{folder}' has not finished; continue it with 'perdure run --resume {folder}'")
    raise UsageError(f"'{folder}' holds no run: it has no {CONFIG}; 'perdure run --out DIR' makes one")


def read_groups(folders: Sequence[Path]) -> tuple[dict[str, list[Results]], dict[str, Path]]:
    """The runs in several folders by label, and the first folder of each label.

    Folders of `perdure compare` count as all that they hold. Runs of the same methods are one group if their seeds
    differ, else the folder's name tells them apart.
    """
    groups: dict[str, list[Results]] = {}
    found: dict[str, Path] = {}
    for folder in _expanded(folders):
        runs = read_runs(folder)
        label = runs[0].label
        taken = {run.seed for run in groups.get(label, [])}
        if taken & {run.seed for run in runs}:
            label = f"{label} ({folder.name})"
            number = 2
            while label in groups:
                label, number = f"{runs[0].label} ({folder.name}, {number})", number + 1
        groups.setdefault(label, []).extend(runs)
        found.setdefault(label, folder)
    return groups, found


def _expanded(folders: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for folder in folders:
        if (folder / COMPARISON).is_file():
            try:
                found += [folder / name for name in json.loads((folder / COMPARISON).read_bytes())["folders"]]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{folder / COMPARISON} is damaged: {error}") from error
        else:
            found.append(folder)
    return found


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
