"""How late detectors are, how often they are wrong, and what EWC keeps with the boundaries they find.

    PERDURE_DATA=... python -m benchmarks.detection

Permuted MNIST has a boundary every so many steps. The electricity market of New South Wales (elec2: 45,312 half hours,
M. Harries 1999) is in two thirds of the stream without prices of the neighbouring state, which it then begins to show:
a change known to the half hour; what else changes in a market is not known, so other alarms are only counted.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import perdure
from perdure.detection import ADWIN, KSWIN, Boundary, Detector, PageHinkley, WindowDetector
from perdure.errors import PerdureWarning
from perdure.methods import EWC

BATCH = 128
ELEC_BATCH = 32


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


def permuted(tasks: int, strength: float, boundaries: Any, rows: int | None = None, seed: int = 0) -> Any:
    """One pass over permuted MNIST; returns learner, results and the steps of a task."""
    stream = perdure.benchmarks.permuted_mnist(tasks=tasks, seed=seed)
    steps = (rows or len(stream[0].train)) // BATCH
    learner = perdure.Learner(
        perdure.models.MLP(784, [100], 10, seed=seed),
        partial(torch.optim.SGD, lr=0.1),
        [EWC(strength=strength, n_samples=1000)] if strength else [],
        boundaries=boundaries,
        seed=seed,
    )
    results = learner.fit(stream, steps=steps, batch_size=BATCH, eval_future=True)
    return learner, results, steps


def kept(results: Any) -> float:
    """Final accuracy on all tasks but the last: what is left of what was learned before."""
    return float(results.matrix[-1, :-1].mean())


def elec2(detector: Detector) -> tuple[list[Boundary], int, int]:
    """Prequential training on elec2 in the order of time: boundaries, the known change's step, and all steps."""
    path = Path(os.environ["PERDURE_DATA"]) / "streams" / "elec2.csv"
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1)).float()
    x, y = table[:, 2:-1], table[:, -1].long()
    begins = int((table[:, 5] != table[0, 5]).nonzero()[0]) // ELEC_BATCH
    learner = perdure.Learner(
        perdure.models.MLP(x.shape[1], [32], 2, seed=0), partial(torch.optim.SGD, lr=0.1), boundaries=detector
    )
    for start in range(0, len(x) - ELEC_BATCH + 1, ELEC_BATCH):
        learner.step(x[start : start + ELEC_BATCH], y[start : start + ELEC_BATCH])
    assert learner.boundaries is not None
    return learner.boundaries.found, begins, len(x) // ELEC_BATCH


def main() -> None:
    """Print everything as lines."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PerdureWarning)
    detectors: list[Detector] = [PageHinkley(), ADWIN(), KSWIN(), WindowDetector()]
    tasks, strength = 5, 30.0
    given = kept(permuted(tasks, strength, None)[1])
    without = kept(permuted(tasks, 0.0, None)[1])
    print(f"permuted MNIST, {tasks} tasks: old tasks' accuracy {given:.4f} with given boundaries, {without:.4f} plain")
    for detector in detectors:
        learner, results, steps = permuted(tasks, strength, detector)
        changes = [steps * task for task in range(1, tasks)]
        print(f"  {detector.name}: {kept(results):.4f}", judged(learner.boundaries.found, changes, 100))
    for detector in detectors:
        found, begins, steps = elec2(detector)
        print(f"elec2, {steps} steps, {detector.name}: {judged(found, [begins], 100)} at {[b.step for b in found]}")


if __name__ == "__main__":
    main()
