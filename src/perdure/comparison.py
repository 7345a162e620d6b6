"""Several runs side by side: mean, spread and interval over seeds, and a paired test of the differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from perdure.errors import UsageError
from perdure.metrics import DESCRIPTIONS

if TYPE_CHECKING:
    from perdure.results import Results

Summary = dict[str, dict[str, float | None]]

TABLE = (
    "final_average_accuracy",
    "average_incremental_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "learning_accuracy",
    "task_restricted_accuracy",
    "minimum_accuracy",
)
IF_MEASURED = ("prequential_accuracy",)
"""Further columns, which nobody misses where they are not there."""
EXACT_UP_TO = 20


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t for `probability` between 0 and 1 and whole `degrees` of freedom.

    Inverts the finite trigonometric sum for P(|t| < x) (Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4) by bisection of
    the angle atan(x / sqrt(degrees)), to the last bits of a double.

    >>> round(t_quantile(0.975, 2), 3)
    4.303
    """
    if not 0 < probability < 1 or degrees < 1:
        raise UsageError(f"a t quantile needs 0 < probability < 1 and degrees >= 1, not {probability} and {degrees}")
    inside = abs(2 * probability - 1)
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < inside else (low, middle)
    return math.copysign(math.sqrt(degrees) * math.tan((low + high) / 2), probability - 0.5)


def summarise(runs: Sequence[Results]) -> Summary:
    """Mean, standard deviation (n - 1) and half width of the 95 % interval (Student's t) of each metric over seeds.

    A metric that some run does not have has no summary; with one run `std` and `ci95` are `None`.

    Returns
    -------
    `{"mean": {...}, "std": {...}, "ci95": {...}}`, each keyed like `Results.metrics()`.
    """
    if not runs:
        raise UsageError("a summary needs at least one run")
    measured = [run.metrics() for run in runs]
    summary: Summary = {"mean": {}, "std": {}, "ci95": {}}
    for name in dict.fromkeys(name for values in measured for name in values):
        found = [value for values in measured if (value := values.get(name)) is not None]
        complete, spread = len(found) == len(runs), len(found) == len(runs) > 1
        std = float(np.std(found, ddof=1)) if spread else None
        summary["mean"][name] = float(np.mean(found)) if complete else None
        summary["std"][name] = std
        summary["ci95"][name] = None if std is None else t_quantile(0.975, len(runs) - 1) * std / math.sqrt(len(runs))
    return summary


def sign_flip_test(differences: npt.ArrayLike, *, draws: int = 100_000) -> float:
    """Two-sided p of paired `differences` [n] under random signs (Fisher, 1935).

    p is the share of the 2^n ways to sign the differences whose sum is at least as far from 0 as the one found; exact
    up to n = 20, and beyond from `draws` random signings with a private generator. The smallest p that n pairs can
    give is 2^(1-n).

    >>> sign_flip_test([0.1, 0.2, 0.3])
    0.25
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or not len(d) or np.isnan(d).any():
        raise UsageError("a paired test needs at least one difference [n] and no NaN")
    if len(d) <= EXACT_UP_TO:
        # A global flip of all signs keeps the distance from 0, so the first sign can stay.
        sums = d[:1]
        for value in d[1:]:
            sums = np.concatenate([sums + value, sums - value])
    else:
        generator = np.random.default_rng(0)
        sums = np.array([generator.choice([-1.0, 1.0], size=len(d)) @ d for _ in range(draws)])
        sums = np.append(sums, d.sum())
    # The same sum added in another order differs in the last bits, and a tie must count.
    tolerance = 1e-12 * np.abs(d).sum()
    return float(np.mean(np.abs(sums) >= abs(d.sum()) - tolerance))


@dataclass(frozen=True)
class Difference:
    """How far `first` is above `second` in one metric, over the seeds that both have.

    `p` is of the paired sign-flip test, `adjusted` the same after Holm's correction for all pairs of the comparison.
    """

    first: str
    second: str
    seeds: int
    mean: float
    p: float
    adjusted: float


@dataclass(frozen=True)
class Comparison:
    """Methods side by side; print it for the table and what may be concluded from it.

    `summaries` maps each label to its `summarise`; `costs` to the means of its `seconds`, `peak_memory_bytes` and
    `state_bytes`.
    """

    metric: str
    seeds: dict[str, list[int]]
    summaries: dict[str, Summary]
    costs: dict[str, dict[str, float | None]]
    differences: list[Difference]
    reasons: dict[str, str]

    @property
    def notes(self) -> list[str]:
        """In words: which differences the seeds can and do support."""
        label = label_of(self.metric)
        if len(self.summaries) < 2:
            return []
        if not self.differences:
            return [f"No two methods have {label} for the same seeds, so their differences are not tested."]
        notes = []
        few = [d for d in self.differences if 2.0 ** (1 - d.seeds) >= 0.05]
        for n in sorted({d.seeds for d in few}):
            whose = "" if len(few) == len(self.differences) else " for some of the pairs"
            notes.append(
                f"{n} shared seed{'s' * (n > 1)}{whose}: the smallest two-sided p that a paired permutation test can "
                f"give is {2.0 ** (1 - n):g}, so no difference can reach p < .05, however large; that takes at least "
                "6 seeds."
            )
        for d in self.differences:
            if d not in few:
                verdict = "significant" if d.adjusted < 0.05 else "not significant"
                above = "above" if d.mean >= 0 else "below"
                notes.append(
                    f"{d.first} is {100 * abs(d.mean):.2f} points {above} {d.second} in {label} over {d.seeds} seeds: "
                    f"paired permutation test p = {d.p:.2g}, {d.adjusted:.2g} after Holm's correction for "
                    f"{len(self.differences)} pair{'s' * (len(self.differences) > 1)}, {verdict} at .05."
                )
        return notes

    @property
    def columns(self) -> list[str]:
        """The metrics of the table that at least one method has."""
        columns = (*TABLE, *IF_MEASURED)
        return [name for name in columns if any(s["mean"].get(name) is not None for s in self.summaries.values())]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return {
            "metric": self.metric,
            "seeds": self.seeds,
            "summaries": self.summaries,
            "costs": self.costs,
            "differences": [vars(difference) for difference in self.differences],
            "reasons": self.reasons,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        head = ["in %", *(label_of(name) for name in self.columns), "train time", "peak memory", "state"]
        rows = [
            [label, *(spread(summary, name) for name in self.columns), *human_costs(self.costs[label])]
            for label, summary in self.summaries.items()
        ]
        # A heading of several words stands on several lines, which keeps eight metrics on a screen.
        words = [title.replace("average", "avg").replace("-", "- ").split() for title in head]
        words[0] = head[:1]
        height = max(len(parts) for parts in words)
        header = [[""] * (height - len(parts)) + parts for parts in words]
        widths = [max(map(len, [*header[c], *(row[c] for row in rows)])) for c in range(len(head))]
        lines = [_aligned([parts[line] for parts in header], widths) for line in range(height)]
        lines += ["  ".join("-" * width for width in widths), *(_aligned(row, widths) for row in rows)]
        remarks = [*self.reasons.values(), *self.notes]
        return "\n".join([*lines, *([""] if remarks else []), *remarks])


def compare(groups: Mapping[str, Sequence[Results]], *, metric: str = "final_average_accuracy") -> Comparison:
    """Put the runs of each label beside those of the others and test every pair of labels over their shared seeds.

    Parameters
    ----------
    groups
        Runs of the same benchmark, scenario and number of tasks, by label; the runs of a label differ in their seed.
    metric
        The metric that is tested.

    Raises
    ------
    UsageError
        If there is nothing to compare, a seed occurs twice in a label, or the runs do not belong together.
    """
    check_groups(groups)
    values = {label: {run.seed: run.metrics().get(metric) for run in runs} for label, runs in groups.items()}
    if not any(metric in run.metrics() for runs in groups.values() for run in runs):
        raise UsageError(f"unknown metric '{metric}'; {', '.join(DESCRIPTIONS)} are allowed")
    paired = []
    for first, second in combinations(groups, 2):
        pairs = [(a, values[second].get(seed)) for seed, a in values[first].items()]
        d = [a - b for a, b in pairs if a is not None and b is not None]
        if d:
            paired.append((first, second, len(d), float(np.mean(d)), sign_flip_test(d)))
    adjusted = _holm([row[-1] for row in paired])
    summaries = {label: summarise(runs) for label, runs in groups.items()}
    reasons = {}
    for name in TABLE:
        if all(summary["mean"].get(name) is None for summary in summaries.values()):
            sentences = [run.reasons()[name] for runs in groups.values() for run in runs if name in run.reasons()]
            reasons[name] = sentences[0]
    return Comparison(
        metric=metric,
        seeds={label: [run.seed for run in runs] for label, runs in groups.items()},
        summaries=summaries,
        costs={label: _costs(runs) for label, runs in groups.items()},
        differences=[Difference(*row, adjusted=p) for row, p in zip(paired, adjusted, strict=True)],
        reasons=reasons,
    )


def check_groups(groups: Mapping[str, Sequence[Results]]) -> None:
    """Raise `UsageError` unless the runs can stand in one table."""
    if not groups or not all(groups.values()):
        empty = [label for label, runs in groups.items() if not runs]
        raise UsageError(f"a comparison needs at least one run a label; {empty[0] if empty else 'it'} has none")
    runs = [run for group in groups.values() for run in group]
    kinds = {
        "benchmarks": {run.benchmark for run in runs},
        "scenarios": {run.scenario for run in runs},
        "numbers of tasks": {str(len(run.task_names)) for run in runs},
    }
    for what, names in kinds.items():
        if len(names) > 1:
            found = ", ".join(sorted(names))
            raise UsageError(f"runs of different {what} ({found}) cannot stand in one table; compare them separately")
    for label, group in groups.items():
        seeds = [run.seed for run in group]
        if len(set(seeds)) < len(seeds):
            raise UsageError(f"'{label}' has two runs of the same seed {seeds}; runs of one label differ in their seed")


def label_of(name: str) -> str:
    """What the metric `name` is called in print."""
    return DESCRIPTIONS[name].label if name in DESCRIPTIONS else name.replace("_", " ")


def spread(summary: Summary, name: str) -> str:
    """A metric as the tables show it, in percent: `91.2 ± 0.5`, `91.2` with one seed, `-` where it is not defined.

    Only the named metrics are known to be fractions; an `extra` one is shown as it is, to four digits.
    """
    mean, std = summary["mean"].get(name), summary["std"].get(name)
    if mean is None:
        return "-"
    if name not in DESCRIPTIONS:
        return f"{mean:.4g}" if std is None else f"{mean:.4g} ± {std:.2g}"
    # Adding 0 keeps a rounded -0.0 from being printed with a sign.
    value = f"{round(100 * mean, 1) + 0.0:.1f}"
    return value if std is None else f"{value} ± {100 * std:.1f}"


def human_seconds(seconds: float | None) -> str:
    """`0.42 s`, `12.3 s`, `3 min 05 s`, `2 h 10 min`; `-` for nothing.

    >>> human_seconds(185)
    '3 min 05 s'
    """
    if seconds is None:
        return "-"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    if seconds < 3599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60:02d} min"


def human_bytes(size: float | None) -> str:
    """Bytes with a decimal unit: `0 B`, `1.5 MB`; `-` for nothing.

    >>> human_bytes(1_500_000)
    '1.5 MB'
    """
    if size is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def human_costs(costs: Mapping[str, float | None]) -> list[str]:
    """Training time, peak memory and state, in words."""
    return [human_seconds(costs["seconds"]), human_bytes(costs["peak_memory_bytes"]), human_bytes(costs["state_bytes"])]


def _within(angle: float, degrees: int) -> float:
    """P(|t| < tan(angle) sqrt(degrees))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (1979), in the order given."""
    adjusted = [0.0] * len(p)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda k: p[k])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def _costs(runs: Sequence[Results]) -> dict[str, float | None]:
    return {
        "seconds": _mean([run.seconds.get("train") for run in runs]),
        "peak_memory_bytes": _mean([run.peak_memory_bytes for run in runs]),
        "state_bytes": _mean([sum(run.state_bytes.values()) for run in runs]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if len(found) == len(values) else None


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([cells[0].ljust(widths[0]), *numbers]).rstrip()
