"""A whole search: into a folder or a shared storage, by one or several workers, and on from there after a stop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from perdure.errors import PerdureWarning, StorageError, UsageError
from perdure.experiments.config import Experiment, read_yaml
from perdure.experiments.folders import is_empty
from perdure.files import write_atomically
from perdure.registry import homes_of_additions
from perdure.tuning.processes import run_workers
from perdure.tuning.sampling import optuna
from perdure.tuning.scoring import check, scored
from perdure.tuning.searches import Framework, Search, search_of
from perdure.tuning.settings import Tuning
from perdure.tuning.study import StudyLedger
from perdure.tuning.trials import Ledger, Trial
from perdure.tuning.working import sampler, work

SETTINGS, STUDY = "tuning.yaml", "study.db"
DEFAULT_STUDY = "perdure"

Event = dict[str, Any]
Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes
    ----------
    tuning, best, trials
        The search, its choice, and all finished trials in the order of the plan.
    experiment
        The experiment with the chosen values, as `perdure run` takes it.
    """

    tuning: Tuning
    best: Trial
    trials: list[Trial]
    experiment: Experiment


def tune(
    tuning: Tuning,
    folder: Path,
    *,
    storage: str | None = None,
    study: str = DEFAULT_STUDY,
    workers: int = 1,
    on_event: Listener | None = None,
) -> Found:
    """Search, or go on with a search: what has finished is neither lost nor done again.

    Parameters
    ----------
    folder
        Where the settings go, and the trials if there is no `storage`: a new or an empty folder, or that of the same
        search.
    storage, study
        The URL of an optuna storage that several machines share, and the name of the study in it.
    workers
        Processes on this machine. With more than one, TPE knows less when it draws; other samplers do not depend on it.
    on_event
        Called for each trial that finishes, of whichever worker, with `key`, `params`, `score`, `done`, `total` and
        `left`, an estimate in seconds; and before that, if some had finished earlier, with `done` and `total`.

    Raises
    ------
    UsageError, DataError, ModelError
        For what cannot work, before anything is written or trained; or if no trial has a score.
    MissingExtraError
        If optuna is not installed.
    StorageError
        If the folder or the storage cannot be written.
    """
    if workers < 1:
        raise UsageError(f"workers is {workers}, it must be at least 1")
    optuna()
    search = search_of(tuning)
    check(tuning)
    claim_folder(folder)
    url = storage or f"sqlite:///{(folder / STUDY).resolve()}"
    ledger = StudyLedger(url, study, tuning.space, tuning.identity())
    write_atomically(folder / SETTINGS, _settings(tuning, storage, study).encode())
    watch = _Watch(ledger, search, workers, on_event)
    if workers == 1:
        work(ledger, search, scored(tuning, search.measure), sampler(tuning.space, tuning.rules), watch.look)
    else:
        modules = sorted(homes_of_additions())
        run_workers(work_aside, (tuning.to_mapping(), url, study), workers, modules, watch.look)
    finished, _ = ledger.look()
    planned = [finished[unit.key] for unit in search.ready(finished)]
    best = search.best(finished)
    if isinstance(search, Framework) and not search.is_within(finished):
        warnings.warn(
            f"not even the weakest {search.stability} lets the new tasks come within {tuning.rules.tolerance:.0%} of "
            "fine-tuning; lower the range, or raise tune.tolerance",
            PerdureWarning,
            stacklevel=2,
        )
    return Found(tuning, best, planned, tuning.experiment(best.params))


def work_aside(mapping: Mapping[str, Any], url: str, study: str) -> None:
    """Work at a search in a process of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever started it has shown them
        tuning = Tuning.from_mapping(mapping)
        search = search_of(tuning)
        ledger = StudyLedger(url, study, tuning.space, tuning.identity())
        work(ledger, search, scored(tuning, search.measure), sampler(tuning.space, tuning.rules))


def claim_folder(folder: Path) -> None:
    """Make the folder, or see that it is one of a search.

    Raises
    ------
    UsageError
        If something else is there.
    StorageError
        If it cannot be made.
    """
    if not is_empty(folder) and not (folder / SETTINGS).is_file() and not (folder / STUDY).is_file():
        raise UsageError(f"{folder} is not empty and holds no search; --out must be a new or an empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {(error.strerror or str(error)).lower()}") from error


def read_search(folder: Path) -> tuple[Tuning, str | None, str]:
    """The search in a folder, its storage if that is elsewhere, and its study.

    Raises
    ------
    UsageError
        If the folder holds no search.
    """
    if not (folder / SETTINGS).is_file():
        raise UsageError(f"'{folder}' holds no search: it has no {SETTINGS}; start one with --out {folder}")
    mapping = read_yaml(folder / SETTINGS)
    storage, study = mapping.pop("storage", None), mapping.pop("study", DEFAULT_STUDY)
    return Tuning.from_mapping(mapping), storage, study


def _settings(tuning: Tuning, storage: str | None, study: str) -> str:
    mapping = tuning.to_mapping() | ({} if storage is None else {"storage": storage, "study": study})
    return yaml.safe_dump(mapping, sort_keys=False)


class _Watch:
    """Tells of trials that have finished since the last look, with an estimate of the time that is left."""

    def __init__(self, ledger: Ledger, search: Search, workers: int, on_event: Listener | None) -> None:
        self.ledger, self.search, self.workers, self.on_event = ledger, search, workers, on_event
        self._told: set[str] = set(ledger.look()[0])
        if self._told and on_event is not None:
            on_event({"event": "search_resumed", "done": len(self._told), "total": search.total})

    def look(self) -> None:
        if self.on_event is None:
            return
        finished, _ = self.ledger.look()
        new = [trial for key, trial in finished.items() if key not in self._told]
        for trial in new:
            self._told.add(trial.unit.key)
            told = [finished[key] for key in self._told]
            spent, cost = sum(t.outcome.seconds for t in told), sum(t.unit.cost for t in told)
            left = max(0.0, (self.search.cost - cost) * spent / cost / self.workers)
            self.on_event(
                {
                    "event": "trial_end",
                    "key": trial.unit.key,
                    "params": dict(trial.params),
                    "score": trial.outcome.score,
                    "done": len(told),
                    "total": self.search.total,
                    "left": left,
                }
            )
