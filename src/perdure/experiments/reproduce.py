"""Published tables run again: every seed once, kept in a folder, and judged by the rule of its protocol."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from perdure.errors import CheckpointError, PerdureError, StorageError
from perdure.experiments.config import Experiment, read_yaml
from perdure.experiments.executors import run_each
from perdure.experiments.folders import CONFIG, RESULTS, clear
from perdure.experiments.protocol import Check, Protocol, Row, Verdict
from perdure.experiments.run import Listener, run_quietly
from perdure.results import Results
from perdure.version import versions

Run = tuple[str, str]
"""A protocol's name and one of its runs."""


@dataclass(frozen=True)
class Outcome:
    """A row and what came of it; `first` is the verdict on three seeds where three further ones were needed."""

    protocol: str
    name: str
    row: Row
    verdict: Verdict
    seconds: float
    first: Verdict | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, accuracies in percent and `seconds` the sum over the seeds' runs."""
        return {
            "protocol": self.protocol,
            "id": self.name,
            "grade": self.row.grade,
            "metric": self.row.metric,
            "published": self.row.published,
            **self.verdict.to_dict(),
            "seconds": round(self.seconds, 2),
            "first": None if self.first is None else self.first.to_dict(),
            "finding": self.row.finding,
        }


@dataclass(frozen=True)
class Difference:
    """A check of two rows: the differences in points by seed, and whether their mean is large enough."""

    protocol: str
    check: Check
    values: dict[int, float]

    @property
    def ours(self) -> float:
        return fmean(self.values.values())

    @property
    def inside(self) -> bool:
        return self.ours >= self.check.at_least

    def to_dict(self) -> dict[str, Any]:
        return {
            "protocol": self.protocol,
            **dataclasses.asdict(self.check),
            "difference": round(self.ours, 2),
            "inside": self.inside,
            "seeds": list(self.values),
            "values": [round(value, 2) for value in self.values.values()],
        }


@dataclass(frozen=True)
class Reproduction:
    """All rows that were asked for, in the order of their protocols, and the checks between them."""

    protocols: list[Protocol]
    rows: list[Outcome]
    checks: list[Difference] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "protocols": [protocol.name for protocol in self.protocols],
            "rows": [row.to_dict() for row in self.rows],
            "checks": [check.to_dict() for check in self.checks],
            "versions": versions(),
        }


def reproduce(
    protocols: Sequence[Protocol],
    rows: Mapping[str, Sequence[str]],
    folder: str | Path,
    *,
    seeds: int | None = None,
    jobs: int = 1,
    fresh: bool = False,
    data_root: str | None = None,
    on_event: Listener | None = None,
) -> Reproduction:
    """Run rows of published tables and judge them.

    Parameters
    ----------
    protocols
        See `protocol_of`.
    rows
        Names of rows by the name of the protocol: see `choose_rows`.
    folder
        Where runs are kept, as `folder/protocol/run/seed-0`. What has finished there with the same settings and
        versions is not run again, and what was stopped continues.
    seeds
        Seeds of each row; by default what the protocol says. Three seeds outside the band are followed by three more.
    jobs
        Processes, of one thread each; the results do not depend on their number.
    fresh
        Run everything again.
    on_event
        Called at the event "start" with the counts of runs that are `missing` and `kept`, and after each run, at
        "run_end", with its `label`, `seed`, `accuracy`, and the counts `done` and `total`.

    Raises
    ------
    DataError
        If the data are not there, before anything is trained.
    StorageError
        If the folder cannot be written.
    """
    bench = _Bench({p.name: p for p in protocols}, Path(folder), jobs, fresh, data_root, on_event)
    chosen = [
        (protocol, name, protocol.rows[name], protocol.seeds_of(protocol.rows[name], seeds))
        for protocol in protocols
        for name in rows.get(protocol.name, ())
    ]
    bench.run(((protocol.name, row.run), seed) for protocol, _, row, own in chosen for seed in own)
    verdicts = [protocol.judge(row, bench.values(protocol, row, own)) for protocol, _, row, own in chosen]
    further = [
        protocol.more_seeds(row, verdict) for (protocol, _, row, _), verdict in zip(chosen, verdicts, strict=True)
    ]
    bench.run(
        ((protocol.name, row.run), seed)
        for (protocol, _, row, _), more in zip(chosen, further, strict=True)
        for seed in more
    )
    outcomes = []
    for (protocol, name, row, own), verdict, more in zip(chosen, verdicts, further, strict=True):
        all_seeds = [*own, *more]
        final = protocol.judge(row, bench.values(protocol, row, all_seeds)) if more else verdict
        seconds = bench.seconds(protocol, row, all_seeds)
        outcomes.append(Outcome(protocol.name, name, row, final, seconds, verdict if more else None))
    return Reproduction(list(protocols), outcomes, _differences(protocols, outcomes))


class _Bench:
    """The runs of all protocols by seed: kept, continued or made."""

    def __init__(
        self,
        protocols: Mapping[str, Protocol],
        folder: Path,
        jobs: int,
        fresh: bool,
        data_root: str | None,
        on_event: Listener | None,
    ) -> None:
        self.protocols, self.folder, self.jobs = protocols, folder, jobs
        self.fresh, self.data_root, self.on_event = fresh, data_root, on_event
        self.done: dict[tuple[Run, int], Results] = {}
        self.begun = False

    def run(self, wanted: Iterable[tuple[Run, int]]) -> None:
        """Bring every run and seed that is wanted into `done`."""
        missing: dict[tuple[str, int], tuple[Run, Experiment, Path]] = {}
        for run, seed in dict.fromkeys(wanted):
            if (run, seed) in self.done:
                continue
            protocol, name = run
            experiment = self.protocols[protocol].experiment_of(name, seed, self.data_root)
            folder = self.folder / protocol / name / f"seed-{seed}"
            kept = None if self.fresh else kept_results(folder, experiment)
            if kept is None:
                missing[f"{protocol} {name}", seed] = (run, experiment, folder)
            else:
                self.done[run, seed] = kept
        self._check_data(experiment for _, experiment, _ in missing.values())
        for _, experiment, folder in missing.values():
            _prepare(folder, keep=not self.fresh and is_of(folder, experiment))
        if self.on_event is not None and (missing or not self.begun):
            self.on_event({"event": "start", "missing": len(missing), "kept": len(self.done)})
        self.begun, count = True, 0

        def finished(key: tuple[str, int], results: Results) -> None:
            nonlocal count
            count += 1
            run, _, folder = missing[key]
            self.done[run, key[1]] = results
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            if self.on_event is not None:
                accuracy = results.metrics()["final_average_accuracy"]
                counts = {"done": count, "total": len(missing)}
                self.on_event({"event": "run_end", "label": key[0], "seed": key[1], "accuracy": accuracy, **counts})

        arguments = {key: (e.to_mapping(), key[1], folder) for key, (_, e, folder) in missing.items()}
        run_each(run_quietly, arguments, self.jobs, finished)

    def _check_data(self, experiments: Iterable[Experiment]) -> None:
        """Build one stream of each kind, so that missing data are known before anything is emptied or trained."""
        kinds = {(experiment.benchmark, experiment.scenario): experiment for experiment in experiments}
        for experiment in kinds.values():
            experiment.source.build(experiment.scenario, experiment.seeds[0], experiment.stream, experiment.data_root)

    def values(self, protocol: Protocol, row: Row, seeds: Sequence[int]) -> dict[int, float]:
        """The row's metric in percent by seed."""
        found = {}
        for seed in seeds:
            results = self.done[(protocol.name, row.run), seed]
            value = results.metrics()[row.metric]
            if value is None:
                raise PerdureError(f"{protocol.name}, {row.run}: {results.reasons()[row.metric]}")
            found[seed] = 100 * value
        return found

    def seconds(self, protocol: Protocol, row: Row, seeds: Sequence[int]) -> float:
        return sum(self.done[(protocol.name, row.run), seed].seconds["total"] for seed in seeds)


def kept_results(folder: Path, experiment: Experiment) -> Results | None:
    """The finished run in a folder, if it was made with these settings and by these versions."""
    if not is_of(folder, experiment) or not (folder / RESULTS).is_file():
        return None
    try:
        results = Results.load(folder)
    except CheckpointError:
        return None
    return results if results.versions == versions() else None


def is_of(folder: Path, experiment: Experiment) -> bool:
    """Whether a folder holds a run, finished or not, with exactly these settings, wherever the data lie."""
    try:
        written = Experiment.from_mapping(read_yaml(folder / CONFIG))
    except PerdureError:
        return False
    return dataclasses.replace(written, data_root=None) == dataclasses.replace(experiment, data_root=None)


def _prepare(folder: Path, keep: bool) -> None:
    """Make the folder of a run, without an earlier one unless that is to be kept and continued."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not keep:
            clear(folder)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {(error.strerror or str(error)).lower()}") from error


def _differences(protocols: Sequence[Protocol], outcomes: Sequence[Outcome]) -> list[Difference]:
    values = {(outcome.protocol, outcome.name): outcome.verdict.values for outcome in outcomes}
    found = []
    for protocol in protocols:
        for check in protocol.checks:
            better, than = values.get((protocol.name, check.better)), values.get((protocol.name, check.than))
            if better and than:
                shared = {seed: value - than[seed] for seed, value in better.items() if seed in than}
                found.append(Difference(protocol.name, check, shared))
    return found
