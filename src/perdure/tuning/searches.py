"""Which trials there are, and what is chosen of them: functions of what has finished, so that any worker may go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from perdure.errors import UsageError
from perdure.tuning.sampling import drawn
from perdure.tuning.settings import LEARNING_RATE, Tuning
from perdure.tuning.space import Range, Space, grid_of
from perdure.tuning.trials import Trial, Unit

Finished = Mapping[str, Trial]


class Search(Protocol):
    """A plan of trials.

    Attributes
    ----------
    total, cost
        How many trials there will be, at most, and what they take together, in units of `Unit.cost`.
    measure
        What they are scored by: "final" average accuracy, or accuracy of every "new" task.
    """

    @property
    def measure(self) -> str: ...

    @property
    def total(self) -> int: ...

    @property
    def cost(self) -> int: ...

    def ready(self, finished: Finished) -> list[Unit]:
        """The units that may be run, given what has finished, those among them; the search ends when these are all."""

    def best(self, finished: Finished) -> Trial:
        """The trial that is chosen; of several as good, the one that comes first in the plan."""


@dataclass(frozen=True)
class Listed:
    """Units that are all known from the start, with their values or with none, which the sampler then draws."""

    units: tuple[Unit, ...]
    measure: str = "final"

    @property
    def total(self) -> int:
        """How many there are."""
        return len(self.units)

    @property
    def cost(self) -> int:
        """All units alike."""
        return self.total

    def ready(self, finished: Finished) -> list[Unit]:
        """All of them."""
        return list(self.units)

    def best(self, finished: Finished) -> Trial:
        """The best score."""
        return _best([finished[unit.key] for unit in self.units if unit.key in finished])


class Halving:
    """Successive halving: all configurations begin with a small budget, and only the best get a larger one.

    Of n configurations in a rung the `n // reduction` best (one at least) are trained again from the beginning with the
    next budget. A rung is complete before the next begins, so who is promoted depends neither on the number of workers
    nor on their speed.

    Source: K. Jamieson, A. Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, 2016,
    arXiv:1502.07943; the budgets grow as in L. Li et al., A System for Massively Parallel Hyperparameter Tuning, 2020,
    arXiv:1810.05934.
    """

    measure = "final"

    def __init__(self, configurations: list[dict[str, Any]], budgets: list[int], reduction: int) -> None:
        self.configurations, self.budgets, self.reduction = configurations, budgets, reduction
        self.sizes = [len(configurations)]
        while len(self.sizes) < len(budgets):
            self.sizes.append(max(1, self.sizes[-1] // reduction))

    @property
    def total(self) -> int:
        """Trials of all rungs."""
        return sum(self.sizes)

    @property
    def cost(self) -> int:
        """Epochs or steps of all rungs."""
        return sum(size * budget for size, budget in zip(self.sizes, self.budgets, strict=True))

    def ready(self, finished: Finished) -> list[Unit]:
        """All rungs up to the first that is not complete."""
        found: list[Unit] = []
        for rung in self._rungs(finished):
            found += rung
        return found

    def best(self, finished: Finished) -> Trial:
        """The best of the highest rung that anybody has finished."""
        for rung in reversed(self._rungs(finished)):
            there = [finished[unit.key] for unit in rung if unit.key in finished]
            if there:
                return _best(there)
        return _best([])

    def _rungs(self, finished: Finished) -> list[list[Unit]]:
        numbers = list(range(len(self.configurations)))
        rungs = []
        for level, budget in enumerate(self.budgets):
            rung = {n: Unit(f"rung {level}, {n}", self.configurations[n], budget) for n in numbers}
            rungs.append(list(rung.values()))
            if level + 1 == len(self.budgets) or any(unit.key not in finished for unit in rung.values()):
                break
            order = sorted(numbers, key=lambda n: (-finished[rung[n].key].score, n))
            numbers = sorted(order[: self.sizes[level + 1]])
        return rungs


class Framework:
    """The continual hyper-parameter framework: plasticity first, then as much stability as the new task can bear.

    First fine-tuning with every learning rate: the best accuracy on new tasks, A, is what can be had. Then the method
    with that rate, from its strongest value on, each `decay` times the last, until the accuracy on new tasks is at
    least (1 - tolerance) A. The accuracy on a new task is measured on its held-out part when it has been learned, so no
    decision needs data of an older task. The published framework does this anew for every task; here the first tasks
    share one rate and one strength, because a run has one of each, and their accuracies from the second task on are
    averaged.

    Source: M. De Lange et al., A Continual Learning Survey: Defying Forgetting in Classification Tasks, 2021,
    arXiv:1909.08383, section 4; M. Masana et al., 2022, arXiv:2010.15277.
    """

    measure = "new"

    def __init__(self, space: Space, stability: str, tolerance: float, decay: float) -> None:
        self.rates = [Unit(f"rate {i}", values, bare=True) for i, values in enumerate(grid_of(_only_rate(space)))]
        entry = space[stability]
        assert isinstance(entry, Range)
        self.stability, self.tolerance = stability, tolerance
        self.strengths: list[float] = [entry.high]
        while self.strengths[-1] * decay >= entry.low * (1 - 1e-9):
            self.strengths.append(self.strengths[-1] * decay)
        if entry.whole:
            self.strengths = list(dict.fromkeys(round(value) for value in self.strengths))

    @property
    def total(self) -> int:
        """All rates, and all strengths if none but the weakest will do."""
        return len(self.rates) + len(self.strengths)

    @property
    def cost(self) -> int:
        """All units alike."""
        return self.total

    def ready(self, finished: Finished) -> list[Unit]:
        """All rates at once; then strength after strength."""
        if any(unit.key not in finished for unit in self.rates):
            return list(self.rates)
        found = list(self.rates)
        for unit in self._relaxed(finished):
            found.append(unit)
            if unit.key not in finished or self._is_plastic(finished, unit):
                break
        return found

    def best(self, finished: Finished) -> Trial:
        """The strongest value that is within the tolerance; the weakest if none is."""
        tried = [unit for unit in self._relaxed(finished) if unit.key in finished]
        if not tried:
            return _best([])
        return finished[tried[-1].key]

    def is_within(self, finished: Finished) -> bool:
        """Whether the chosen strength keeps the new tasks within the tolerance."""
        return self._is_plastic(finished, self.best(finished).unit)

    def _relaxed(self, finished: Finished) -> list[Unit]:
        rate = self._best_rate(finished).params[LEARNING_RATE]
        return [
            Unit(f"strength {i}", {LEARNING_RATE: rate, self.stability: strength})
            for i, strength in enumerate(self.strengths)
        ]

    def _is_plastic(self, finished: Finished, unit: Unit) -> bool:
        return finished[unit.key].score >= (1 - self.tolerance) * self._best_rate(finished).score

    def _best_rate(self, finished: Finished) -> Trial:
        return _best([finished[unit.key] for unit in self.rates if unit.key in finished])


def search_of(tuning: Tuning) -> Search:
    """The search that the settings describe."""
    rules, space = tuning.rules, tuning.space
    if rules.policy == "chf":
        return Framework(space, tuning.stability(), rules.tolerance, rules.decay)
    if rules.sampler == "grid":
        return Listed(tuple(Unit(f"grid {i}", values) for i, values in enumerate(grid_of(space))))
    if rules.sampler == "tpe":
        return Listed(tuple(Unit(f"trial {i}", None) for i in range(rules.trials)))
    drawn_at_random = [drawn(space, "random", (rules.seed, i)) for i in range(rules.trials)]
    if rules.sampler == "halving":
        return Halving(drawn_at_random, tuning.budgets(), rules.reduction)
    return Listed(tuple(Unit(f"trial {i}", values) for i, values in enumerate(drawn_at_random)))


def _only_rate(space: Space) -> Space:
    return {LEARNING_RATE: space[LEARNING_RATE]}


def _best(trials: list[Trial]) -> Trial:
    """The best of trials in the order of their plan."""
    able = [trial for trial in trials if trial.outcome.score is not None]
    if not able:
        why = f"; the first says: {trials[0].outcome.why}" if trials else ""
        raise UsageError(f"no trial has a score{why or ', because none has finished'}")
    return max(able, key=lambda trial: trial.score)
