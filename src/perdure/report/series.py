"""The numbers behind the pictures: accuracies over the stream, with their spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from perdure import metrics
from perdure.errors import UsageError
from perdure.metrics import Array
from perdure.results import Results


@dataclass(frozen=True)
class Series:
    """One method's line: `mean` [n] and `std` [n] over seeds at the numbers of tasks trained `x` [n]; NaN is a gap."""

    label: str
    x: list[int]
    mean: Array
    std: Array | None

    @property
    def points(self) -> list[tuple[int, float, float]]:
        """(x, mean, std) where there is a value; std is 0 with one seed."""
        std = np.zeros(len(self.x)) if self.std is None else self.std
        return [(x, float(m), float(s)) for x, m, s in zip(self.x, self.mean, std, strict=True) if not math.isnan(m)]


def seen_average(groups: Mapping[str, Sequence[Results]]) -> list[Series]:
    """For each label the average accuracy over the tasks seen, after each task."""
    return [
        _series(label, list(range(1, len(runs[0].matrix) + 1)), np.array([_seen(run) for run in runs]))
        for label, runs in groups.items()
    ]


def per_task(groups: Mapping[str, Sequence[Results]], task: int) -> list[Series]:
    """For each label the accuracy on one task after each task, and before any (x = 0) if that was evaluated at all."""
    start = 1 if all(np.isnan(run.untrained).all() for runs in groups.values() for run in runs) else 0
    lines = []
    for label, runs in groups.items():
        values = np.array([[run.untrained[task], *run.matrix[:, task]] for run in runs])[:, start:]
        lines.append(_series(label, list(range(start, len(runs[0].matrix) + 1)), values))
    return lines


def mean_matrix(runs: Sequence[Results]) -> tuple[Array, Array]:
    """The accuracy matrix [T, T] and the untrained row [T] averaged over seeds; NaN where any seed has none."""
    return np.mean([run.matrix for run in runs], axis=0), np.mean([run.untrained for run in runs], axis=0)


def task_names(groups: Mapping[str, Sequence[Results]]) -> list[str]:
    """The tasks' names, or numbers from 1 if the seeds name them differently (each has its own class order)."""
    names = {tuple(run.task_names) for runs in groups.values() for run in runs}
    first = next(iter(names))
    return list(first) if len(names) == 1 else [str(k + 1) for k in range(len(first))]


def accuracy_range(lines: Sequence[Series]) -> tuple[float, float, float]:
    """Bottom, top and tick step of an accuracy axis: tenths around the values, from 0 unless all of them are high."""
    values = [v for line in lines for _, m, s in line.points for v in (m - s, m + s)] or [0.0, 1.0]
    bottom = 0.0 if min(values) < 0.4 else math.floor(10 * min(values) - 0.2) / 10
    top = min(1.0, max(bottom + 0.2, math.ceil(10 * max(values) + 0.2) / 10))
    bottom = min(bottom, top - 0.2)
    span = top - bottom
    return bottom, top, 0.25 if span > 0.75 else 0.1 if span > 0.25 else 0.05


def _seen(run: Results) -> list[float]:
    averages = []
    for i in range(len(run.matrix)):
        try:
            averages.append(metrics.average_accuracy(run.matrix, after=i))
        except UsageError:
            averages.append(math.nan)
    return averages


def _series(label: str, x: list[int], values: Array) -> Series:
    """`values` [seeds, n]; a mean over fewer seeds than the others would be another quantity, so it is a gap."""
    return Series(label, x, values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else None)
