"""Spaces from YAML: what is allowed, what a grid takes, and one sentence for everything else."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from perdure.errors import UsageError
from perdure.tuning.settings import Tuning
from perdure.tuning.space import Choices, Range, grid_of, space_of

ZOO = {
    "batch": [8, 16, 32, 128],
    "lr": "loguniform(1e-4, 1e-1)",
    "l2_reg": "loguniform(1e-6, 1e-2)",
    "dropout": "uniform(0.1, 0.5)",
}


def test_the_model_zoos_space_stands_as_it_is() -> None:
    assert space_of(ZOO) == {
        "train.batch_size": Choices((8, 16, 32, 128)),
        "train.lr": Range(low=1e-4, high=1e-1, log=True),
        "train.weight_decay": Range(low=1e-6, high=1e-2, log=True),
        "model.dropout": Range(low=0.1, high=0.5),
    }


def test_a_logarithmic_grid_has_equal_ratios_and_both_ends() -> None:
    values = Range(low=0.003, high=7e5, log=True, points=12).grid()
    ratios = [b / a for a, b in pairwise(values)]
    assert (len(values), values[0], values[-1]) == (12, 0.003, 7e5)
    assert max(ratios) / min(ratios) == pytest.approx(1, abs=1e-9)


def test_a_grid_is_every_combination_once() -> None:
    space = space_of({"ewc.strength": {"low": 0, "high": 1, "step": 0.25}, "train.optimizer": ["sgd", "adam"]})
    combinations = [(c["ewc.strength"], c["train.optimizer"]) for c in grid_of(space)]
    assert combinations == [(s, o) for s in (0, 0.25, 0.5, 0.75, 1) for o in ("sgd", "adam")]


def test_a_setting_that_takes_whole_numbers_gets_whole_numbers() -> None:
    space = {"replay.capacity": {"low": 10, "high": 1000, "log": True, "points": 4}, "ewc.strength": "uniform(1, 4)"}
    tuning = Tuning.from_mapping({"methods": ["replay", "ewc"], "space": space})
    (capacity, strength) = tuning.space.values()
    assert isinstance(capacity, Range)
    assert isinstance(strength, Range)
    assert (capacity.whole, strength.whole) == (True, False)
    assert [type(value) for value in capacity.grid()] == [int] * 4
    assert capacity.grid()[0] == 10
    assert capacity.grid()[-1] == 1000


def test_a_search_survives_its_file() -> None:
    mapping = {"methods": ["ewc"], "space": {"lr": [0.1, 0.2], "ewc.strength": "loguniform(1, 1e3)"}}
    tuning = Tuning.from_mapping(mapping, ["train.epochs=3"])
    again = Tuning.from_mapping(tuning.to_mapping())
    assert again == tuning
    assert again.experiment({"train.lr": 0.2}).train.epochs == 3
    assert again.identity() == tuning.identity()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "the key 'space' is missing"),
    ({"space": {}}, "it must be a mapping of settings"),
    ({"space": {"strength": [1]}}, "the space's 'strength' is not SECTION.KEY"),
    ({"space": {"droput": [1]}}, "did you mean 'dropout'"),
    ({"space": {"ewc.strength": []}}, "an empty list"),
    ({"space": {"ewc.strength": [1, 1]}}, "names a value twice"),
    ({"space": {"ewc.strength": 3}}, "must be a list of values"),
    ({"space": {"ewc.strength": "normal(1, 2)"}}, "must be a list of values"),
    ({"space": {"ewc.strength": {"low": 2, "high": 1}}}, "low must be below high"),
    ({"space": {"ewc.strength": {"low": 0, "high": 1, "log": True}}}, "it must begin above 0"),
    ({"space": {"ewc.strength": {"low": 1, "hihg": 2}}}, "did you mean 'high'"),
    ({"space": {"ewc.strength": {"low": 1, "high": 2, "points": 1}}}, "it must be at least 2"),
    ({"space": {"train.batch_size": {"low": 1.5, "high": 3}}}, "it takes whole numbers"),
    ({"space": {"lr": [0.1], "train.lr": [0.2]}}, "names train.lr twice"),
    ({"space": {"ewc.strenght": [1]}}, "did you mean 'strength'"),
    ({"space": {"si.strength": [1]}}, "'si' is not in this run"),
    ({"space": {"train.optimizer": ["sgd", "sdg"]}}, 'space.train.optimizer cannot be "sdg"'),
    ({"space": {"ewc.strength": [1, -1]}}, "space.ewc.strength cannot be -1"),
    ({"space": {"lr": [1]}, "tune": {"sampler": "tpa"}}, "tune.sampler is 'tpa'"),
    ({"space": {"lr": [1]}, "tune": {"trials": 0}}, "tune.trials is 0"),
    ({"space": {"lr": [1]}, "tune": {"held_out": 1}}, "tune.held_out is 1"),
    ({"space": {"lr": [1]}, "tune": {"seed": 1}, "seeds": 2}, "among the seeds to be reported"),
    ({"space": {"lr": [1]}, "tune": {"sampler": "halving"}, "train": {"epochs": 2}}, "halving begins with 2 epochs"),
    ({"space": {"epochs": [5, 9]}, "tune": {"sampler": "halving"}}, "halving cuts train.epochs itself"),
    ({"space": {"ewc.strength": [1]}, "tune": {"policy": "chf"}}, "policy chf chooses train.lr and then relaxes"),
    ({"space": {"lr": [1], "ewc.strength": [1]}, "tune": {"policy": "chf"}}, "a mapping with low above 0"),
    ({"space": {"lr": [1], "train.momentum": "uniform(0.1, 1)"}, "tune": {"policy": "chf"}}, "and train.momentum is"),
]


@pytest.mark.parametrize(("mapping", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_cannot_work_is_one_sentence_before_anything_runs(mapping: dict[str, Any], said: str) -> None:
    sgd = {"train": {"optimizer": "sgd"}} if "train.momentum" in mapping.get("space", {}) else {}
    with pytest.raises(UsageError) as caught:
        Tuning.from_mapping({"methods": ["ewc"], **sgd, **mapping})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_grid_of_a_range_needs_its_points() -> None:
    with pytest.raises(UsageError, match="a grid needs values of ewc"):
        list(grid_of(space_of({"ewc.strength": "uniform(1, 2)"})))
    assert math.isclose(next(iter(grid_of(space_of({"lr": [0.5]}))))["train.lr"], 0.5)
