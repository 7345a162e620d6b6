"""A protocol: how a published table was made, its numbers with their source, and when ours count as the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import numpy as np

from perdure.errors import UnknownNameError, UsageError
from perdure.experiments.config import Experiment, read_yaml
from perdure.experiments.typed import into
from perdure.registry import nearest

FOLDER = Path(__file__).with_name("protocols")
FURTHER_SEEDS = 3
SIGMAS = 2.5


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published number, in percent, and the run of ours that it is compared with.

    Attributes
    ----------
    run
        Several rows may come from the same run.
    floor
        Half the width of this row's narrowest band, if not the protocol's.
    accept
        The band itself, where it does not come from the publication.
    metric
        A name of `Results.metrics()`.
    sd, sem
        Spread over the published seeds: their standard deviation, or their standard error.
    grade
        A: a plausible bug moves the result out of the band. B: weaker. C: proves nothing about the method.
    seeds
        Seeds of this row, if not the protocol's.
    band_of
        Take the band of so many seeds, whatever the number that is run.
    median_at_least
        A second condition, for more than one seed.
    sd_of_six
        The standard deviation for six seeds, where the published one is known to be too small.
    single_seed_void, report_only
        No verdict on one seed, or none at all.
    finding
        What was found out about a row that is not reproduced.
    """

    run: str
    published: float
    grade: Literal["A", "B", "C"]
    sd: float | None = None
    sem: float | None = None
    floor: float | None = None
    accept: tuple[float, float] | None = None
    metric: str = "final_average_accuracy"
    seeds: int | None = None
    band_of: int | None = None
    median_at_least: float | None = None
    sd_of_six: float | None = None
    single_seed_void: bool = False
    report_only: bool = False
    finding: str = ""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A pair of rows whose difference, over the seeds that both have, must be at least so many points."""

    better: str
    than: str
    at_least: float


@dataclass(frozen=True)
class Verdict:
    """Our mean over `values` (percent by seed) beside a band; `inside` is None where no verdict is due."""

    values: dict[int, float]
    low: float
    high: float
    inside: bool | None

    @property
    def ours(self) -> float:
        return fmean(self.values.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "ours": round(self.ours, 2),
            "low": round(self.low, 2),
            "high": round(self.high, 2),
            "inside": self.inside,
            "seeds": list(self.values),
            "values": [round(value, 2) for value in self.values.values()],
        }


@dataclass(frozen=True)
class Protocol:
    """A published table.

    Attributes
    ----------
    experiment
        What all runs share, with the keys of an experiment's file; `runs` has what is their own.
    published_runs
        Seeds behind each published mean.
    floor
        Half the width of the narrowest band, in points.
    first_seed, seeds
        The seeds are the `seeds` numbers from `first_seed` on.
    class_order
        "as_given" in the experiment, or "numpy": see `numpy_class_order`.
    """

    name: str
    title: str
    source: str
    provenance: tuple[str, ...]
    notes: tuple[str, ...]
    published_runs: int
    floor: float
    first_seed: int
    seeds: int
    class_order: str
    experiment: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    rows: dict[str, Row]
    checks: tuple[Check, ...]

    def experiment_of(self, run: str, seed: int, data_root: str | None = None) -> Experiment:
        """The complete experiment of one seed; on the CPU with one thread, so that its bits are the same anywhere."""
        own = self.runs[run]
        mapping = {**self.experiment, **own}
        for section in ("train", "stream", "model"):
            mapping[section] = {**self.experiment.get(section, {}), **own.get(section, {})}
        if self.class_order == "numpy":
            mapping["stream"]["class_order"] = numpy_class_order(seed, 10)
        return Experiment.from_mapping(
            {**mapping, "seeds": [seed], "device": "cpu", "threads": 1, "data_root": data_root}
        )

    def seeds_of(self, row: Row, count: int | None = None) -> list[int]:
        """The seeds of a row; `count` replaces the protocol's number, and a row's own if it is 1 or larger."""
        own = row.seeds or self.seeds
        number = own if count is None or (row.seeds and 1 < count < own) else count
        return list(range(self.first_seed, self.first_seed + number))

    def more_seeds(self, row: Row, verdict: Verdict) -> list[int]:
        """Three further seeds where three miss the band: at 2.5 sigma one correct row in eighty does by chance."""
        if verdict.inside is not False or row.seeds or len(verdict.values) != FURTHER_SEEDS:
            return []
        following = max(verdict.values) + 1
        return list(range(following, following + FURTHER_SEEDS))

    def judge(self, row: Row, values: Mapping[int, float]) -> Verdict:
        """Accept a mean within max(floor, 2.5 sqrt(sd^2 / published_runs + sd^2 / seeds)) of the published one."""
        count = len(values)
        sd = row.sd if row.sd is not None else (row.sem or 0.0) * math.sqrt(self.published_runs)
        if row.sd_of_six is not None and count >= 2 * FURTHER_SEEDS:
            sd = row.sd_of_six
        low, high = band(
            row.published,
            sd,
            published_runs=self.published_runs,
            seeds=row.band_of if row.band_of and count > 1 else count,
            floor=self.floor if row.floor is None else row.floor,
        )
        if row.accept is not None:
            low, high = row.accept
        inside = low <= fmean(values.values()) <= high
        if row.median_at_least is not None and count > 1:
            inside = inside and median(values.values()) >= row.median_at_least
        no_verdict = row.report_only or (row.single_seed_void and count == 1)
        return Verdict(dict(values), low, high, None if no_verdict else inside)


def band(published: float, sd: float, *, published_runs: int, seeds: int, floor: float) -> tuple[float, float]:
    """What counts as the same as a published mean, in percent and on both sides of it.

    >>> [round(bound, 1) for bound in band(80.43, 1.89, published_runs=10, seeds=3, floor=1.0)]
    [77.3, 83.5]
    """
    width = max(floor, SIGMAS * math.sqrt(sd**2 / published_runs + sd**2 / seeds))
    return max(0.0, published - width), min(100.0, published + width)


def numpy_class_order(seed: int, classes: int) -> list[int]:
    """The label of every column if label l has column perm[l], perm = np.random.permutation after np.random.seed(seed).

    Seed 0 keeps the natural order, as in the code of van de Ven et al. 2022.

    >>> numpy_class_order(3, 10)
    [7, 2, 3, 8, 1, 0, 5, 6, 9, 4]
    """
    if seed == 0:
        return list(range(classes))
    order: list[int] = np.argsort(np.random.RandomState(seed).permutation(classes)).tolist()
    return order


def protocol_names() -> list[str]:
    """The names of all protocols, sorted."""
    return sorted(path.stem.replace("_", "-") for path in FOLDER.glob("*.yaml"))


def protocol_of(name: str) -> Protocol:
    """The protocol of that name; underscores count as hyphens.

    Raises
    ------
    UnknownNameError
        If there is none.

    >>> protocol_of("der-split-mnist").rows["er-200"].published
    80.43
    """
    key, known = name.replace("_", "-"), protocol_names()
    if key not in known:
        raise UnknownNameError(f"unknown protocol '{name}'{nearest(key, known) or ';'} there are {', '.join(known)}")
    return _read(FOLDER / f"{key.replace('-', '_')}.yaml")


def choose_rows(protocols: Sequence[Protocol], patterns: Sequence[str]) -> dict[str, list[str]]:
    """Names of rows by the name of their protocol; `*` and `?` stand for any characters, no pattern for all rows.

    Raises
    ------
    UnknownNameError
        If a pattern fits no row of any of the protocols.

    >>> choose_rows([protocol_of("vandeven-split-mnist")], ["class-n*", "task-er"])
    {'vandeven-split-mnist': ['task-er', 'class-none']}
    """
    from fnmatch import fnmatchcase

    wanted = [pattern.replace("_", "-") for pattern in patterns]
    everything = list(dict.fromkeys(row for protocol in protocols for row in protocol.rows))
    for pattern in wanted:
        if not any(fnmatchcase(row, pattern) for row in everything):
            hint = nearest(pattern.lower(), everything) or f"; there are {', '.join(everything)}"
            raise UnknownNameError(f"unknown row '{pattern}'{hint} ('er-*' takes several)")
    return {
        protocol.name: [row for row in protocol.rows if not wanted or any(fnmatchcase(row, p) for p in wanted)]
        for protocol in protocols
    }


@dataclass(frozen=True, kw_only=True)
class _Written:
    """The keys of a file."""

    title: str
    source: str
    published_runs: int
    floor: float
    first_seed: int
    seeds: int
    experiment: dict[str, Any]
    runs: dict[str, Any]
    rows: dict[str, Any]
    provenance: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    class_order: Literal["as_given", "numpy"] = "as_given"
    checks: Any = ()


@cache
def _read(path: Path) -> Protocol:
    written = into(_Written, read_yaml(path), path.stem.replace("_", "-"))
    rows = {name: into(Row, {"run": name, **entry}, f"rows.{name}") for name, entry in written.rows.items()}
    checks = tuple(into(Check, entry, "checks") for entry in written.checks)
    for name, row in rows.items():
        if row.run not in written.runs:
            raise UsageError(f"rows.{name}.run is '{row.run}', which is none of the runs {', '.join(written.runs)}")
        if [row.sd, row.sem, row.accept].count(None) != 2:
            raise UsageError(f"rows.{name} must have one of sd, sem and accept")
    fields = {name: value for name, value in vars(written).items() if name not in ("rows", "checks")}
    return Protocol(name=path.stem.replace("_", "-"), rows=rows, checks=checks, **fields)
