"""Several sets of methods on the same stream and seeds, spread over the cores of this machine."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perdure.comparison import Comparison
from perdure.errors import PerdureError, StorageError, UsageError
from perdure.experiments.build import on_this_machine
from perdure.experiments.config import SECTIONS, Experiment
from perdure.experiments.folders import COMPARISON, is_empty, seed_folder, write_json, write_summary
from perdure.experiments.run import Listener, run_seed, write_config
from perdure.registry import nearest
from perdure.results import Results

Groups = dict[str, list[Results]]
Key = tuple[str, int]
"""A label and a seed."""
RunArguments = tuple[dict[str, Any], int, Path]
"""An experiment as a mapping, a seed, and the folder of its run."""


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
    run_each(arguments, jobs, finished)
    groups = {label: [done[label, seed] for seed in e.seeds] for label, e in experiments.items()}
    for label, runs in groups.items():
        write_config(experiments[label], None, folder / label)
        if len(runs) > 1:
            write_summary(folder / label, runs)
    return groups


def run_each(arguments: Mapping[Key, RunArguments], jobs: int, finished: Callable[[Key, Results], None]) -> None:
    """Run one seed for each key, in `jobs` processes; `finished` is called here, in the order in which they end."""
    jobs = min(jobs, len(arguments))
    if jobs > 1:
        _in_processes(arguments, jobs, finished)
        return
    for key, own in arguments.items():
        finished(key, _one(*own))


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


def _one(mapping: dict[str, Any], seed: int, folder: Path) -> Results:
    with warnings.catch_warnings():
        # The parent process has built every experiment once and shown its warnings.
        warnings.simplefilter("ignore")
        return run_seed(Experiment.from_mapping(mapping), seed, folder)


def _in_processes(arguments: Mapping[Key, RunArguments], jobs: int, finished: Callable[[Key, Results], None]) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        try:
            with _interrupts_held_back():
                futures: dict[Future[Results], Key] = {pool.submit(_one, *a): key for key, a in arguments.items()}
            for future in as_completed(futures):
                finished(futures[future], _result_of(future, futures[future]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _result_of(future: Future[Results], key: Key) -> Results:
    try:
        return future.result()
    except BrokenProcessPool as error:
        where = f"{key[0]}, seed {key[1]}"
        raise PerdureError(f"a worker process died during {where}; free memory, or try --jobs 1") from error


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started here see no Ctrl-C before `_start_worker`, where it would be a traceback in some import."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """A worker dies silently with Ctrl-C, and with its parent however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


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
