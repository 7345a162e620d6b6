"""Whether a search finds as good a strength for EWC as a grid of 12 points, in half its trials.

python -m benchmarks.tune --out runs/tune               # Split MNIST: minutes, and on from there after a stop
python -m benchmarks.tune --benchmark split-digits      # the embedded digits: under a minute

Both choose on the first three tasks of a seed that is not reported, on held-out training data. The chosen strengths are
then run on all tasks with every seed, and compared on the test data.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.tuning import Kept, accuracy_of
from perdure.experiments.folders import write_json
from perdure.tuning.run import Found, tune
from perdure.tuning.settings import Tuning

GRID = {"low": 1.0, "high": 1e7, "log": True, "points": 12}
HALF = GRID["points"] // 2
GOAL = 2.0
"""Points of final average accuracy that the search may be below the best of the grid."""


@dataclass(frozen=True)
class Row:
    """A search: its choice, its held-out score and its trials, and the test accuracy of each seed in percent."""

    search: str
    strength: float
    trials: int
    held_out: float
    test: list[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return sum(self.test) / len(self.test)

    def __str__(self) -> str:
        test = ", ".join(f"{value:.2f}" for value in self.test)
        found = f"{self.search:<8}{self.trials:>3} trials  strength {self.strength:<10.4g}"
        return f"{found} held out {self.held_out:6.2f} %  test {self.mean:6.2f} % ({test})"


def searched(benchmark: str, scenario: str, sampler: str, seed: int, folder: Path, workers: int) -> Found:
    """Choose the strength with a sampler and a seed of its own."""
    mapping: dict[str, Any] = {"benchmark": benchmark, "scenario": scenario, "methods": ["ewc"]}
    mapping |= {"space": {"ewc.strength": GRID}, "tune": {"sampler": sampler, "trials": HALF, "seed": seed}}
    return tune(Tuning.from_mapping(mapping), folder / f"{sampler}-{seed}", workers=workers)


def measured(found: Found, name: str, seeds: Sequence[int], kept: Kept) -> Row:
    """Run the chosen strength on all tasks with every seed; the same strength is run once."""
    strength = float(found.best.params["ewc.strength"])
    experiment = found.experiment
    test = []
    for seed in seeds:
        results = kept.run(f"runs/strength-{strength:.6g}/seed-{seed}", replace(experiment, seeds=(seed,)))
        test.append(100 * accuracy_of(results))
    return Row(name, strength, len(found.trials), 100 * found.best.score, test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", default="split_mnist")
    parser.add_argument("--scenario", default="domain")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1 are reported")
    parser.add_argument("--searches", type=int, default=3, help="searches with TPE, each with a seed of its own")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        kept = Kept(folder)
        seeds = range(given.seeds)
        grid = searched(given.benchmark, given.scenario, "grid", 1000, folder, given.workers)
        rows = [measured(grid, "grid", seeds, kept)]
        print(rows[0], flush=True)
        for number in range(given.searches):
            found = searched(given.benchmark, given.scenario, "tpe", 1000 + number, folder, given.workers)
            rows.append(measured(found, f"tpe {number}", seeds, kept))
            print(rows[-1], flush=True)
        write_json(folder / "tune.json", {"goal": GOAL, "rows": [{**vars(row), "mean": row.mean} for row in rows]})
        for what in ("held_out", "mean"):
            behind = [getattr(rows[0], what) - getattr(row, what) for row in rows[1:]]
            said = ", ".join(f"{value:+.2f}" for value in behind)
            inside = "inside" if max(behind) <= GOAL else "OUTSIDE"
            data = "held-out training data, first tasks" if what == "held_out" else "test data, all tasks"
            print(f"points below the best of the grid, {data}: {said}; at most {GOAL:g}: {inside}")


if __name__ == "__main__":
    main()
