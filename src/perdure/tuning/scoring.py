"""What a trial is worth: training on the first tasks, scored on held-out parts of their training data."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from perdure.errors import DivergedError, UsageError
from perdure.experiments.build import on_this_machine, prepare
from perdure.experiments.run import run_narrowed
from perdure.results import Results
from perdure.streams.held_out import held_out
from perdure.tuning.settings import Tuning
from perdure.tuning.trials import Outcome, Unit

Evaluate = Callable[[Unit, Mapping[str, Any]], Outcome]


def scored(tuning: Tuning, measure: str) -> Evaluate:
    """A function that trains a unit with its values and scores it by the `measure` of `perdure.tuning.searches`."""

    def evaluate(unit: Unit, params: Mapping[str, Any]) -> Outcome:
        experiment = on_this_machine(tuning.trial(params, unit.budget, unit.bare))
        begun = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # whoever started the search has seen them in `check`
                results = run_narrowed(experiment, tuning.rules.seed, narrowing(tuning))
        except DivergedError as error:
            return Outcome(None, time.perf_counter() - begun, str(error))
        return Outcome(score_of(results, measure), time.perf_counter() - begun)

    return evaluate


def check(tuning: Tuning) -> None:
    """Build what a trial with the first of all values needs, and train nothing.

    Raises
    ------
    UsageError, IncompatibleError, DataError, ModelError
        For whatever cannot work, before any training.
    """
    first = {key: entry.ends[0] for key, entry in tuning.space.items()}
    prepare(on_this_machine(tuning.trial(first, None, bare=False)), tuning.rules.seed, narrowing(tuning))


def narrowing(tuning: Tuning) -> Any:
    """What makes of the whole stream the part that a search may see."""
    return partial(held_out, first=tuning.rules.tasks, fraction=tuning.rules.held_out)


def score_of(results: Results, measure: str) -> float:
    """The final average accuracy, or that of every new task when it has been learned, the first one left out.

    Raises
    ------
    UsageError
        If it is not defined.
    """
    if measure == "final":
        value = results.metrics()["final_average_accuracy"]
        number = math.nan if value is None else float(value)
    else:
        learned = np.diag(results.matrix)
        number = float(learned[1:].mean() if len(learned) > 1 else learned[0])
    if math.isnan(number):
        raise UsageError(f"{results.benchmark} gives no accuracy to choose by; choose a benchmark with classes")
    return number
