"""How late detectors are, how often they are wrong, and what EWC keeps with the boundaries they find.

    PERDURE_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.detection --out docs/detection.md

Permuted MNIST has a boundary every so many steps. The electricity market of New South Wales (elec2: 45,312 half hours,
M. Harries 1999) is for its first part without prices of the neighbouring state, which it then begins to show: a change
known to the half hour; what else changes in a market is not known, so other alarms are only counted.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

import perdure
from benchmarks import pages
from benchmarks.pages import by_seed, commit_of, wrapped
from perdure.detection import ADWIN, KSWIN, Boundary, Detector, PageHinkley, WindowDetector
from perdure.errors import PerdureWarning
from perdure.methods import EWC
from perdure.version import versions

BATCH = 128
ELEC_BATCH = 32
TASKS = 5
STRENGTH = 30.0
SEEDS = (0, 1, 2)
WITHIN = 100
GOAL = 0.8
DETECTORS = (PageHinkley, ADWIN, KSWIN, WindowDetector)

PAGE = """\
# Boundaries found by detectors

Written by `python -m benchmarks.detection --out docs/detection.md` with perdure at commit {commit}, torch {torch},
Python {python} on {platform}. Every detector has its default arguments, and `Learner(boundaries=...)` its default
snapshots and rows. An alarm counts as the report of a change if it sounds within {within} steps after it; every other
alarm is false. The delay is from the change to the alarm, the error from the change to its estimated place, both in
steps (updates).
"""
PERMUTED = """\
{tasks} tasks, each all of MNIST with its pixels in another random order, one pass in batches of {batch}: {changes} \
changes for each of the seeds {seeds}, {steps} steps apart, and nobody announces them. MLP 784-100-10, SGD at 0.1, EWC \
with strength {strength:g} (a plain choice, not tuned here) and a Fisher of 1000 samples of the task, whether \
boundaries are given or found; the solver is "prox", because gradient steps on so strong a penalty diverged. "Kept" is \
the accuracy on all tasks but the last, after the last; the share is what EWC gains with found boundaries over plain \
training, as part of what it gains with given ones; the goal is at least {goal:.0%}.
"""
STATIONARY = """\
The last column is the number of false alarms while the first task alone is trained for as many steps: nothing changes \
there but the network.
"""
ELEC2 = """\
The electricity market of New South Wales (M. Harries 1999), {rows:,} half hours in the order of time, {batch} a step: \
{steps} steps. Each batch is scored and then trained on once (MLP {inputs}-32-2, SGD at 0.1). Prices and demand of the \
neighbouring state are constants up to step {begins}, where they begin: the one change whose place is known. Whatever \
else changes in a market is not known, so an alarm elsewhere is neither right nor wrong.
"""
UNSEEN = """\
No detector reports the change, and rightly so by what they watch, the loss or the accuracy: new inputs that cost the \
model nothing leave nothing to protect. To find such a change, give `Boundaries(signal=...)` a function of the inputs.
"""


def judged(found: Sequence[Boundary], changes: Sequence[int], within: int) -> dict[str, Any]:
    """Delay and error of the estimate for every change that was found within so many steps; the rest is false."""
    hits = [next((b for b in found if change <= b.step < change + within), None) for change in changes]
    own = [b for b in hits if b is not None]
    return {
        "changes": len(changes),
        "found": len(own),
        "delay": [b.step - change for b, change in zip(hits, changes, strict=True) if b is not None],
        "estimate": [b.change_point - change for b, change in zip(hits, changes, strict=True) if b is not None],
        "false": len(found) - len(own),
    }


def permuted(
    tasks: int, strength: float, boundaries: Any, rows: int | None = None, seed: int = 0, passes: int = 1
) -> Any:
    """Training on permuted MNIST, one pass a task; returns learner, results and the steps of a pass."""
    stream = perdure.benchmarks.permuted_mnist(tasks=tasks, seed=seed)
    steps = (rows or len(stream[0].train)) // BATCH
    learner = perdure.Learner(
        perdure.models.MLP(784, [100], 10, seed=seed),
        partial(torch.optim.SGD, lr=0.1),
        [EWC(strength=strength, n_samples=1000, solver="prox")] if strength else [],
        boundaries=boundaries,
        seed=seed,
    )
    results = learner.fit(stream, steps=passes * steps, batch_size=BATCH, eval_future=True)
    return learner, results, steps


def kept(results: Any) -> float:
    """Final accuracy on all tasks but the last: what is left of what was learned before."""
    return float(results.matrix[-1, :-1].mean())


@dataclass(frozen=True)
class Elec2:
    """What came of elec2: the boundaries, the known change's step, all steps, and the losses before every update."""

    found: list[Boundary]
    begins: int
    steps: int
    rows: int
    inputs: int
    losses: list[float]


def elec2(detector: Detector) -> Elec2:
    """Prequential training on elec2 in the order of time."""
    path = Path(os.environ["PERDURE_DATA"]) / "streams" / "elec2.csv"
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1)).float()
    x, y = table[:, 2:-1], table[:, -1].long()
    begins = int((table[:, 5] != table[0, 5]).nonzero()[0]) // ELEC_BATCH
    learner = perdure.Learner(
        perdure.models.MLP(x.shape[1], [32], 2, seed=0), partial(torch.optim.SGD, lr=0.1), boundaries=detector
    )
    losses = []
    for start in range(0, len(x) - ELEC_BATCH + 1, ELEC_BATCH):
        rows = slice(start, start + ELEC_BATCH)
        losses.append(float(learner.step(x[rows], y[rows])))
    assert learner.boundaries is not None
    return Elec2(learner.boundaries.found, begins, len(losses), len(x), x.shape[1], losses)


# -- the page ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What one detector did on permuted MNIST, one entry a seed."""

    name: str
    reports: list[dict[str, Any]]
    kept: list[float]
    quiet: list[int]

    def all(self, what: str) -> list[int]:
        return [value for report in self.reports for value in report[what]]


def shares(kept: Sequence[float], given: Sequence[float], plain: Sequence[float]) -> list[float]:
    """The part of the gain of given boundaries that found ones bring, one a seed.

    >>> shares([0.8, 0.9], [0.9, 0.9], [0.5, 0.4])
    [0.75, 1.0]
    """
    return [round((own - low) / (high - low), 6) for own, high, low in zip(kept, given, plain, strict=True)]


def permuted_section() -> str:
    """Run permuted MNIST with given boundaries, with none, and with each detector."""
    given, plain = ([kept(permuted(TASKS, strength, None, seed=s)[1]) for s in SEEDS] for strength in (STRENGTH, 0.0))
    found = []
    for make in DETECTORS:
        one = Found(make.name, [], [], [])
        for seed in SEEDS:
            learner, results, steps = permuted(TASKS, STRENGTH, make(), seed=seed)
            changes = [steps * task for task in range(1, TASKS)]
            one.reports.append(judged(learner.boundaries.found, changes, WITHIN))
            one.kept.append(kept(results))
            alone, _, _ = permuted(1, 0.0, make(), seed=seed, passes=TASKS)
            one.quiet.append(len(alone.boundaries.found))
        found.append(one)
        print(one, flush=True)
    return permuted_text(given, plain, found, steps)


def permuted_text(given: Sequence[float], plain: Sequence[float], found: Sequence[Found], steps: int) -> str:
    """The section on permuted MNIST."""
    seeds = " / ".join(map(str, SEEDS))
    settings = {"tasks": TASKS, "batch": BATCH, "steps": steps, "strength": STRENGTH, "goal": GOAL}
    about = PERMUTED.format(changes=TASKS - 1, seeds=", ".join(map(str, SEEDS)), **settings)
    head = ("boundaries", "found", "delay, median (largest)", "error, largest", "false", "false, nothing changes")
    detected = [
        (
            f"`{one.name}`",
            f"{sum(report['found'] for report in one.reports)} of {sum(report['changes'] for report in one.reports)}",
            f"{median(one.all('delay')):g} ({max(one.all('delay'))})" if one.all("delay") else "",
            f"{max(map(abs, one.all('estimate')))}" if one.all("estimate") else "",
            f"{sum(report['false'] for report in one.reports)}",
            f"{sum(one.quiet)}",
        )
        for one in found
    ]
    keeps = [("given", given, None), ("none, plain training", plain, None)]
    keeps += [(f"`{one.name}`", one.kept, shares(one.kept, given, plain)) for one in found]
    gains = [
        (
            name,
            f"{100 * fmean(values):.2f}",
            by_seed([100 * value for value in values]),
            "" if share is None else f"{fmean(share):.0%}",
            "" if share is None else " / ".join(f"{value:.0%}" for value in share),
            "" if share is None else "reached" if fmean(share) >= GOAL else "**missed**",
        )
        for name, values, share in keeps
    ]
    lines = ["", "## Permuted MNIST without announced boundaries", "", *wrapped(about), ""]
    lines += [*pages.table(head, detected), "", *wrapped(STATIONARY), ""]
    lines += pages.table(("boundaries", "kept", f"seeds {seeds}", "share of the gain", f"seeds {seeds}", ""), gains)
    return "\n".join(lines) + "\n"


def elec2_section() -> str:
    """Run elec2 with each detector."""
    runs = {make.name: elec2(make()) for make in DETECTORS}
    first = next(iter(runs.values()))
    about = ELEC2.format(rows=first.rows, batch=ELEC_BATCH, steps=first.steps, inputs=first.inputs, begins=first.begins)
    rows, seen = [], 0
    for name, run in runs.items():
        report = judged(run.found, [run.begins], WITHIN)
        seen += report["found"]
        late = f"{report['delay'][0]} steps late" if report["found"] else "not found"
        at = ", ".join(str(boundary.step) for boundary in run.found)
        rows.append((f"`{name}`", late, str(report["false"]), at or "none"))
        print(name, report, at, flush=True)
    before = first.losses[first.begins - WITHIN : first.begins]
    after = first.losses[first.begins : first.begins + WITHIN]
    spread = float(np.std(before))
    rise = (fmean(after) - fmean(before)) / spread
    said = (
        f"The loss of a step is {fmean(before):.3f} on average in the {WITHIN} steps before the known change, with a "
        f"standard deviation of {spread:.3f}, and {fmean(after):.3f} in the {WITHIN} steps after it: "
        f"{rise:+.1f} standard deviations. {UNSEEN if not seen and rise < 1 else ''}"
    )
    lines = ["", "## The electricity market (elec2)", "", *wrapped(about), ""]
    lines += [
        *pages.table(("detector", "the known change", "other alarms", "alarms at step"), rows),
        "",
        *wrapped(said),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the page to this Markdown file")
    chosen = parser.parse_args(arguments)
    if "PERDURE_DATA" not in os.environ:
        parser.error("MNIST and elec2 are needed: set PERDURE_DATA to the folder that holds them")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PerdureWarning)
    text = PAGE.format(within=WITHIN, **versions() | {"commit": commit_of()}) + permuted_section() + elec2_section()
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
