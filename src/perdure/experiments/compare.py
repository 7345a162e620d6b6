"""Several sets of methods on the same stream and seeds, spread over the cores of this machine."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perdure.comparison import Comparison
from perdure.errors import StorageError, UsageError
from perdure.experiments.build import on_this_machine
from perdure.experiments.config import SECTIONS, Experiment
from perdure.experiments.executors import run_each
from perdure.experiments.folders import COMPARISON, is_empty, seed_folder, write_json, write_summary
from perdure.experiments.run import Listener, run_quietly, write_config
from perdure.registry import nearest
from perdure.results import Results

Groups = dict[str, list[Results]]
Key = tuple[str, int]
"""A label and a seed."""


def experiments_of(mapping: Mapping[str, Any], sets: list[list[str]], overrides: list[str]) -> dict[str, Experiment]:
    """One experiment for each set of method names, by label; an override of a method applies wherever the method is.

    Raises
    ------
    UsageError
        As `Experiment.from_mapping`; or if a set is listed twice, or an override fits none.
    """
    _check_sections(sets, overrides)
    experiments: dict[str, Experiment] = {}
    for names in sets:
        here = {*SECTIONS, *(name.replace("-", "_") for name in names)}
        own = [text for text in overrides if _section(text) in here or not _section(text)]
        experiment = Experiment.from_mapping({**mapping, "methods": names}, own)
        if experiment.label in experiments:
            raise UsageError(f"the methods '{experiment.label}' are listed twice; list them once")
        experiments[experiment.label] = experiment
    return experiments


def run_all(
    experiments: Mapping[str, Experiment], folder: Path, *, jobs: int = 1, on_event: Listener | None = None
) -> Groups:
    """Run every seed of every experiment into `folder` and return the results by label, in the order given.

    Each run has one thread, so the results do not depend on `jobs`, the number of processes.
    """
    experiments = {label: on_this_machine(dataclasses.replace(e, threads=1)) for label, e in experiments.items()}
    tasks = [(label, seed) for label, experiment in experiments.items() for seed in experiment.seeds]
    done: dict[Key, Results] = {}

    def finished(key: Key, results: Results) -> None:
        done[key] = results
        if on_event is not None:
            accuracy = results.metrics()["final_average_accuracy"]
            count = {"done": len(done), "total": len(tasks)}
            on_event({"event": "run_end", "label": key[0], "seed": key[1], "accuracy": accuracy, **count})

    arguments = {
        (label, seed): (
            experiments[label].to_mapping(),
            seed,
            seed_folder(folder / label, seed, experiments[label].seeds),
        )
        for label, seed in tasks
    }
    run_each(run_quietly, arguments, jobs, finished)
    groups = {label: [done[label, seed] for seed in e.seeds] for label, e in experiments.items()}
    for label, runs in groups.items():
        write_config(experiments[label], None, folder / label)
        if len(runs) > 1:
            write_summary(folder / label, runs)
    return groups


class ComparisonFolder:
    """A folder that appears when everything in it is there, in place of an earlier comparison.

    Parameters
    ----------
    path
        A new or empty folder, or one that `perdure compare` wrote.

    Raises
    ------
    UsageError
        If something else is there.
    StorageError
        If nothing can be written there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_empty(path) and not (path / COMPARISON).is_file():
            raise UsageError(f"{path} is not empty and holds no comparison; --out must be a new or an empty folder")
        self.work = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._made = [folder for folder in path.parents if not folder.exists()]

    def __enter__(self) -> ComparisonFolder:
        try:
            for left in self.path.parent.glob(f".{self.path.name}.*.partial"):
                if not _is_alive(left.suffixes[-2].lstrip(".")):
                    shutil.rmtree(left, ignore_errors=True)
            self.work.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"cannot write to {self.path}: {(error.strerror or str(error)).lower()}") from error
        return self

    def publish(self, groups: Groups, comparison: Comparison) -> None:
        """Put the finished folder in its place."""
        write_json(self.work / COMPARISON, {"folders": list(groups), **comparison.to_dict()})
        old = self.path.with_name(f".{self.path.name}.{os.getpid()}.old")
        try:
            if self.path.exists():
                os.replace(self.path, old)
            os.replace(self.work, self.path)
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {(error.strerror or str(error)).lower()}") from error
        shutil.rmtree(old, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def _check_sections(sets: list[list[str]], overrides: list[str]) -> None:
    known = [*SECTIONS, *dict.fromkeys(name.replace("-", "_") for names in sets for name in names)]
    for text in overrides:
        section = _section(text)
        if section and section not in known:
            hint = nearest(section, known) or ";"
            raise UsageError(f"unknown section '{section}' in --set '{text}'{hint} it is one of {', '.join(known)}")


def _section(text: str) -> str:
    left, equals, _ = text.partition("=")
    section, dot, _ = left.partition(".")
    return section.strip().replace("-", "_") if equals and dot else ""
