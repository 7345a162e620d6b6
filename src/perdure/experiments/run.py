"""Running an experiment: its seeds one by one or in processes, into a folder, and on from there after a stop."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perdure.errors import PerdureWarning, UsageError
from perdure.experiments.build import Prepared, device_of, on_this_machine, prepare
from perdure.experiments.config import Experiment, read_yaml
from perdure.experiments.executors import cores, run_each
from perdure.experiments.folders import CONFIG, RESULTS, NewFolder, check_free, seed_folder, write_summary
from perdure.files import write_atomically
from perdure.results import Results

if TYPE_CHECKING:
    from perdure.streams.task import Stream

Event = dict[str, Any]
Listener = Callable[[Event], None]


def run(
    experiment: Experiment,
    folder: str | Path | None = None,
    *,
    overwrite: bool = False,
    jobs: int = 1,
    on_event: Listener | None = None,
) -> list[Results]:
    """Run every seed of an experiment.

    Parameters
    ----------
    folder
        Where configuration, log, checkpoints and results go; nothing is written without it.
    overwrite
        Whether an earlier run in the folder may be replaced.
    jobs
        Processes that share the seeds: each has the experiment's threads, or one if they are left open. The results do
        not depend on their number.
    on_event
        Called with the events of `Learner.fit`, each with `seed` and the number of `tasks` added; with several
        processes, once for each seed that has finished, with `label`, `seed`, `accuracy`, `done` and `total`.

    Raises
    ------
    UsageError, DataError, ModelError
        For what cannot work, before anything is written or trained.
    StorageError
        If the folder cannot be written.

    >>> experiment = Experiment.from_mapping({"methods": ["replay"], "train": {"epochs": 1}, "seeds": [3]})
    >>> [results.seed for results in run(experiment)]
    [3]
    """
    if jobs > 1 and experiment.threads is None:
        experiment = dataclasses.replace(experiment, threads=1)
    experiment = on_this_machine(experiment)
    if folder is None:
        return _run_seeds(experiment, dict.fromkeys(experiment.seeds), jobs, on_event)
    check_free(Path(folder), overwrite)
    first = prepare(experiment, experiment.seeds[0])
    new = NewFolder(Path(folder))
    try:
        return _run_into(experiment, new.path, jobs, on_event, first)
    except Exception:
        if not new.resumable:
            new.discard()
        raise


def resume(
    folder: str | Path,
    *,
    data_root: str | None = None,
    device: str | None = None,
    jobs: int = 1,
    on_event: Listener | None = None,
) -> list[Results]:
    """Continue the run in a folder to the result that it would have had without the stop.

    Parameters
    ----------
    data_root, device
        Where the data are now, and where to train now, if that has changed.
    jobs, on_event
        See `run`.

    Raises
    ------
    UsageError
        If the folder holds no run.
    CheckpointError
        If all its checkpoints are damaged.
    """
    experiment = read_run(folder)
    experiment = dataclasses.replace(
        experiment, data_root=data_root or experiment.data_root, device=device or experiment.device
    )
    return _run_into(on_this_machine(experiment), Path(folder), jobs, on_event)


def usual_jobs(experiment: Experiment) -> int:
    """As many processes as have cores for their threads; one where all would share a GPU."""
    experiment = on_this_machine(experiment)
    if device_of(experiment.device).type != "cpu":
        return 1
    return max(1, min(len(experiment.seeds), cores() // (experiment.threads or 1)))


def read_run(folder: str | Path) -> Experiment:
    """The experiment that a run's folder was made by; raises UsageError if it is none."""
    config = Path(folder) / CONFIG
    if not config.is_file():
        raise UsageError(f"'{folder}' holds no run: it has no {CONFIG}; start one with 'perdure run --out {folder}'")
    return Experiment.from_mapping(read_yaml(config))


def run_seed(experiment: Experiment, seed: int, folder: Path | None, on_event: Listener | None = None) -> Results:
    """Run one seed from its beginning, into the folder of its own if one is given."""
    prepared = prepare(experiment, seed)
    if folder is not None:
        write_config(experiment, seed, folder)
    return _run_seed(experiment, seed, folder, on_event, prepared)


def run_narrowed(experiment: Experiment, seed: int, narrow: Callable[[Stream], Stream]) -> Results:
    """Run one seed on what `narrow` makes of its stream; nothing is written."""
    return _run_seed(experiment, seed, None, None, prepare(experiment, seed, narrow))


def run_quietly(mapping: Mapping[str, Any], seed: int, folder: Path | None) -> Results:
    """`run_seed` of an experiment as a mapping, without the warnings that whoever spreads runs has shown already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run_seed(Experiment.from_mapping(mapping), seed, folder)


def write_config(experiment: Experiment, seed: int | None, folder: Path) -> None:
    """Write `config.yaml`: of one seed, or of all if `seed` is None."""
    written = experiment if seed is None else dataclasses.replace(experiment, seeds=(seed,))
    write_atomically(folder / CONFIG, written.to_yaml().encode())


def _run_into(
    experiment: Experiment, folder: Path, jobs: int, on_event: Listener | None, first: Prepared | None = None
) -> list[Results]:
    write_config(experiment, None, folder)
    folders: dict[int, Path | None] = {seed: seed_folder(folder, seed, experiment.seeds) for seed in experiment.seeds}
    runs = _run_seeds(experiment, folders, jobs, on_event, first)
    if len(runs) > 1:
        write_summary(folder, runs)
    return runs


def _run_seeds(
    experiment: Experiment,
    folders: Mapping[int, Path | None],
    jobs: int,
    on_event: Listener | None,
    first: Prepared | None = None,
) -> list[Results]:
    """The results of every seed in its folder, in order; what has finished there is read."""
    done = {seed: Results.load(own) for seed, own in folders.items() if own is not None and (own / RESULTS).is_file()}
    missing = {seed: own for seed, own in folders.items() if seed not in done}
    if min(jobs, len(missing)) > 1:
        if first is None:
            prepare(experiment, next(iter(missing)))
        done |= _spread(experiment, missing, jobs, on_event)
        return [done[seed] for seed in folders]
    for seed, own in missing.items():
        if own is not None and len(folders) > 1:
            write_config(experiment, seed, own)
        done[seed] = _run_seed(experiment, seed, own, on_event, first if seed == experiment.seeds[0] else None)
    return [done[seed] for seed in folders]


def _spread(
    experiment: Experiment, folders: Mapping[int, Path | None], jobs: int, on_event: Listener | None
) -> dict[int, Results]:
    done: dict[int, Results] = {}

    def finished(seed: int, end: tuple[Results, list[Warning | str]]) -> None:
        done[seed], said = end
        for warning in said:
            warnings.warn(warning, stacklevel=2)
        if on_event is not None:
            accuracy = done[seed].metrics()["final_average_accuracy"]
            counts = {"done": len(done), "total": len(folders)}
            on_event({"event": "run_end", "label": experiment.label, "seed": seed, "accuracy": accuracy, **counts})

    mapping = experiment.to_mapping()
    arguments = {seed: (mapping, seed, own) for seed, own in folders.items()}
    run_each(_run_aside, arguments, jobs, finished, experiment.threads or 1)
    return done


def _run_aside(mapping: Mapping[str, Any], seed: int, folder: Path | None) -> tuple[Results, list[Warning | str]]:
    """One seed in a process of its own, and the warnings of its training: those before it the caller has shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        experiment = Experiment.from_mapping(mapping)
        prepared = prepare(experiment, seed)
    if folder is not None:
        write_config(experiment, seed, folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", PerdureWarning)
        results = _run_seed(experiment, seed, folder, None, prepared)
    return results, [warning.message for warning in said]


def _run_seed(
    experiment: Experiment, seed: int, folder: Path | None, on_event: Listener | None, prepared: Prepared | None = None
) -> Results:
    device = torch.device(experiment.device or "cpu")
    with _own_randomness(seed, device), with_threads(experiment.threads or torch.get_num_threads()):
        ready = prepared or prepare(experiment, seed)
        listener = None if on_event is None else _marked(on_event, seed=seed, tasks=len(ready.stream))
        results: Results = ready.learner.fit(
            ready.stream, **ready.fit_options, folder=folder, resume=folder is not None, on_event=listener
        )
    return results


def _marked(on_event: Listener, **marks: Any) -> Listener:
    return lambda event: on_event(marks | event)


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators, which layers such as dropout draw from, seeded for the run and put back after it."""
    gpus = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """The number of threads of a run: it decides both its time and, by the order of sums, its last bits."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
