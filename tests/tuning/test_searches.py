"""What each search runs and chooses, with scores from a formula in place of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest

from perdure.errors import UsageError
from perdure.tuning.searches import Framework, Halving, Search, search_of
from perdure.tuning.settings import Tuning
from perdure.tuning.space import space_of
from perdure.tuning.trials import Memory, Outcome, Trial, Unit
from perdure.tuning.working import sampler, work

Formula = Callable[[Unit, Mapping[str, Any]], float | None]


def run(search: Search, formula: Formula, tuning: Tuning | None = None) -> tuple[list[Unit], dict[str, Trial]]:
    """The units in the order in which one worker runs them, and what came of them."""
    ran: list[Unit] = []

    def evaluate(unit: Unit, params: Mapping[str, Any]) -> Outcome:
        ran.append(unit)
        return Outcome(formula(unit, params), 0.0)

    memory = Memory()
    work(memory, search, evaluate, sampler(tuning.space, tuning.rules) if tuning else lambda unit, ledger: {})
    return ran, memory.trials


def test_halving_promotes_exactly_the_best_third() -> None:
    quality = [(7 * i) % 27 for i in range(27)]
    search = Halving([{"x": i} for i in range(27)], [2, 6, 18, 20], reduction=3)
    ran, trials = run(search, lambda unit, params: quality[params["x"]] / 27)
    rungs = [[unit.params["x"] for unit in ran if unit.params and unit.budget == budget] for budget in (2, 6, 18, 20)]
    assert [len(rung) for rung in rungs] == [27, 9, 3, 1]
    for lower, upper in pairwise(rungs):
        stayed = set(lower) - set(upper)
        assert min(quality[x] for x in upper) > max(quality[x] for x in stayed)
    assert [unit.budget for unit in ran] == [2] * 27 + [6] * 9 + [18] * 3 + [20]
    assert search.best(trials).params == {"x": quality.index(26)}
    assert (search.total, search.cost) == (40, 27 * 2 + 9 * 6 + 3 * 18 + 20)


def test_halving_begins_no_rung_before_the_one_below_is_complete() -> None:
    search = Halving([{"x": i} for i in range(6)], [1, 2], reduction=3)
    first = search.ready({})
    assert {unit.budget for unit in first} == {1}
    done = {unit.key: Trial(unit, unit.params or {}, Outcome(0.5, 0)) for unit in first[:5]}
    assert {unit.budget for unit in search.ready(done)} == {1}


def test_the_last_rung_decides_and_not_a_lucky_first_one() -> None:
    search = Halving([{"x": i} for i in range(9)], [1, 3], reduction=3)
    _, trials = run(search, lambda unit, params: params["x"] if unit.budget == 1 else -params["x"])
    assert search.best(trials).params == {"x": 6}


def test_diverged_trials_are_neither_promoted_nor_chosen() -> None:
    search = Halving([{"x": i} for i in range(6)], [1, 3], reduction=3)
    _, trials = run(search, lambda unit, params: None if params["x"] > 1 else params["x"] / 10)
    assert search.best(trials).params == {"x": 1}
    _, trials = run(search, lambda unit, params: None)
    with pytest.raises(UsageError, match="no trial has a score"):
        search.best(trials)


SPACE = space_of({"lr": [0.1, 0.2, 0.4], "ewc.strength": {"low": 1, "high": 1000}})


def plasticity(unit: Unit, params: Mapping[str, Any]) -> float:
    """A new task's accuracy: best with rate 0.2, and lower the stronger the penalty."""
    top = 0.9 - abs(math.log2(params["train.lr"] / 0.2)) / 10
    return top if unit.bare else top / (1 + params["ewc.strength"] / 100)


def test_the_framework_is_plastic_first_and_then_as_stable_as_the_new_task_can_bear() -> None:
    search = Framework(SPACE, "ewc.strength", tolerance=0.2, decay=0.5)
    ran, trials = run(search, plasticity)
    assert [unit.bare for unit in ran] == [True] * 3 + [False] * (len(ran) - 3)
    strengths = [unit.params["ewc.strength"] for unit in ran if unit.params and not unit.bare]
    assert {unit.params["train.lr"] for unit in ran[3:] if unit.params} == {0.2}
    # 0.9 / (1 + s / 100) >= 0.8 * 0.9 holds from s = 25 downwards, and the sequence is 1000 / 2^i.
    assert strengths == [1000, 500, 250, 125, 62.5, 31.25, 15.625]
    assert search.best(trials).params == {"train.lr": 0.2, "ewc.strength": 15.625}
    assert search.is_within(trials)


def test_the_framework_stops_at_the_strongest_value_if_that_will_do() -> None:
    search = Framework(SPACE, "ewc.strength", tolerance=0.99, decay=0.5)
    ran, trials = run(search, plasticity)
    assert search.best(trials).params["ewc.strength"] == 1000
    assert len(ran) == 4


def test_the_framework_says_when_nothing_will_do() -> None:
    search = Framework(SPACE, "ewc.strength", tolerance=0.2, decay=0.5)
    _, trials = run(search, lambda unit, params: 0.9 if unit.bare else 0.1)
    assert search.best(trials).params["ewc.strength"] == pytest.approx(1000 / 2**9)
    assert not search.is_within(trials)


def tuning(sampler: str, trials: int, seed: int = 1000) -> Tuning:
    space = {"ewc.strength": "loguniform(1, 1e6)", "train.lr": [0.001, 0.01]}
    rules = {"sampler": sampler, "trials": trials, "seed": seed}
    return Tuning.from_mapping({"methods": ["ewc"], "space": space, "tune": rules})


def valley(unit: Unit, params: Mapping[str, Any]) -> float:
    return -abs(math.log10(params["ewc.strength"]) - 4) - (params["train.lr"] == 0.01)


def params_of(trials: dict[str, Trial]) -> list[Mapping[str, Any]]:
    return [trials[key].params for key in sorted(trials, key=lambda key: int(key.split()[-1]))]


@pytest.mark.parametrize("name", ["random", "tpe", "halving"])
def test_the_same_seed_draws_the_same_trials_and_another_seed_others(name: str) -> None:
    pytest.importorskip("optuna")
    drawn = []
    for seed in (1000, 1000, 1001):
        chosen = tuning(name, 8, seed)
        drawn.append({k: t.params for k, t in run(search_of(chosen), valley, chosen)[1].items()})
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len({str(values) for values in drawn[0].values()}) > 5


def test_tpe_learns_where_random_draws_do_not() -> None:
    pytest.importorskip("optuna")
    near = {}
    for name in ("random", "tpe"):
        late: list[float] = []
        for seed in range(1000, 1006):
            chosen = tuning(name, 30, seed)
            values = params_of(run(search_of(chosen), valley, chosen)[1])
            late += [abs(math.log10(v["ewc.strength"]) - 4) for v in values[15:]]
        near[name] = sum(late) / len(late)
    assert near["tpe"] < 0.6 * near["random"]


def test_random_draws_do_not_depend_on_their_number() -> None:
    pytest.importorskip("optuna")
    few, many = (params_of(run(search_of(tuning("random", n)), valley)[1]) for n in (4, 9))
    assert many[:4] == few
