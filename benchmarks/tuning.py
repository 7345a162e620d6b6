"""Choosing a strength on the first tasks of a stream alone, on held-out training data, and keeping what was run."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure.experiments.config import Experiment, Part
from perdure.experiments.folders import clear, write_json
from perdure.experiments.reproduce import is_of, kept_results
from perdure.experiments.run import run_quietly
from perdure.registry import benchmarks
from perdure.results import Results
from perdure.streams.held_out import held_out as beginning
from perdure.streams.task import Stream

COST = "processor.json"
FURTHEST = 4
"""Decades that a grid may grow on either side."""

Score = Callable[[float], float]


@benchmarks.register("held_out")
def held_out(
    *,
    scenario: str = "task",
    seed: int = 0,
    root: str | None = None,
    of: str = "split_digits",
    first: int = 3,
    fraction: float = 0.1,
    options: dict[str, Any] | None = None,
) -> Stream:
    """The first tasks of a benchmark, tested on a part of their training data: `perdure.streams.held_out`."""
    whole: Stream = benchmarks.get(of)(scenario=scenario, seed=seed, root=root, **(options or {}))
    return beginning(whole, first, fraction)


def for_tuning(experiment: Experiment, first: int) -> Experiment:
    """The experiment on `held_out` in the place of its benchmark."""
    stream = {"of": experiment.benchmark, "first": first, "options": experiment.stream}
    return Experiment.from_mapping({**experiment.to_mapping(), "benchmark": "held_out", "stream": stream})


def with_strength(experiment: Experiment, strength: float) -> Experiment:
    """The experiment with another strength of its only method."""
    (method,) = experiment.methods
    return dataclasses.replace(experiment, methods=(Part(method.name, {**method.arguments, "strength": strength}),))


@dataclass(frozen=True)
class Choice:
    """The strength with the best score; `scores` has all that were tried, ascending."""

    strength: float
    scores: dict[float, float]

    @property
    def at_the_end(self) -> bool:
        """Whether nothing weaker, or nothing stronger, was tried."""
        return self.strength in (min(self.scores), max(self.scores))


def choose(score: Score, grid: Sequence[float]) -> Choice:
    """The best of a grid, of several equally good ones the weakest; while it lies at an end, the grid grows a decade.

    >>> choose(lambda strength: 5 - abs(math.log10(strength) - 2), [0.1, 1.0])
    Choice(strength=100.0, scores={0.1: 2.0, 1.0: 3.0, 10.0: 4.0, 100.0: 5.0, 1000.0: 4.0})
    """
    scores = {strength: score(strength) for strength in sorted(grid)}
    low, high = min(scores), max(scores)
    while True:
        best = max(scores, key=lambda strength: (scores[strength], -strength))
        if best == max(scores) < high * 10 ** (FURTHEST - 0.5):
            further = _decade(best, 1)
        elif best == min(scores) > low / 10 ** (FURTHEST - 0.5):
            further = _decade(best, -1)
        else:
            return Choice(best, dict(sorted(scores.items())))
        scores[further] = score(further)


def _decade(strength: float, step: int) -> float:
    """Ten times or a tenth of a number, without digits that are not its own: 0.1 / 10 is 0.01."""
    return float(f"{strength * 10.0**step:.6g}")


class Kept:
    """Runs in folders of their own: what has finished with the same settings is read, what was stopped goes on."""

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.folder, self.say = folder, say

    def run(self, name: str, experiment: Experiment) -> Results:
        """The results of an experiment of one seed, which lives in the folder `name`."""
        (seed,) = experiment.seeds
        folder = self.folder / name
        results = kept_results(folder, experiment)
        if results is None:
            folder.mkdir(parents=True, exist_ok=True)
            if not is_of(folder, experiment):
                clear(folder)
                (folder / COST).unlink(missing_ok=True)
            resumed = (folder / "checkpoint").is_dir()
            begun = time.process_time()
            results = run_quietly(experiment.to_mapping(), seed, folder)
            if not resumed:
                write_json(folder / COST, {"processor_seconds": time.process_time() - begun})
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        accuracy = accuracy_of(results)
        if math.isnan(accuracy):
            raise AssertionError(f"{name} has no final average accuracy")
        self.say(f"{name}: {100 * accuracy:.2f} %, {results.seconds['total']:.0f} s of wall time")
        return results

    def seconds(self, name: str) -> float | None:
        """Processor time of the run in the folder `name`; None if it was stopped and went on later."""
        file = self.folder / name / COST
        return float(json.loads(file.read_text())["processor_seconds"]) if file.is_file() else None


def accuracy_of(results: Results) -> float:
    """The final average accuracy."""
    return number_of(results, "final_average_accuracy")


def number_of(results: Results, metric: str) -> float:
    """A metric as a number; NaN where it is not defined."""
    value = results.metrics()[metric]
    return math.nan if value is None else float(value)
