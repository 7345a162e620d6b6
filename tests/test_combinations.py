"""Every pair of methods trains, in any order and resumed in the middle, or is refused and both are named."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

import perdure
from perdure import registry
from perdure.checkpoint import load_state, save_state
from perdure.compatibility import SCENARIOS
from perdure.errors import IncompatibleError, PerdureWarning
from perdure.saving import learner_state, load_learner_state
from registered import METHODS

# What nobody may do beside another, as the methods' papers have it and not as the code declares it.
STEPS = {"gdumb", "la_maml", "look_ahead", "mer"}
PREDICTS = {"gdumb", "icarl", "vcl"}
DATA = {"bic", "icarl", "vcl", "wa"}
LOSSES = {"er_ace", "icarl"}
MASKS = {"hat", "packnet", "spg"}
PROJECTS = {"agem", "gem"}
PENALTIES = {"ewc", "l2", "mas", "si"}
EXCLUSIVE = (STEPS, PREDICTS, DATA, LOSSES, MASKS, PROJECTS, {"hat", "vcl"}, {"packnet", "vcl"})


def excluded(a: str, b: str) -> bool:
    """Whether the two cannot work together on any stream."""
    pair = {a, b}
    if any(pair <= owners for owners in EXCLUSIVE) or pair & STEPS:
        return True
    # Two Gaussians over one weight; and one mean a class, where every task has outputs of its own.
    return bool(("vcl" in pair and pair & PENALTIES) or ("icarl" in pair and pair & MASKS))


# Joint training is what methods are compared with, and none itself.
PAIRS = list(combinations(sorted(METHODS.keys() - {"joint"}), 2))
LEGAL = [pair for pair in PAIRS if not excluded(*pair)]
COMMON = {
    (a, b): [s for s in SCENARIOS if s in registry.methods.get(a).scenarios & registry.methods.get(b).scenarios]
    for a, b in LEGAL
}


def learner(names: tuple[str, ...], scenario: str) -> perdure.Learner:
    model = perdure.models.MLP(64, [8], 10, seed=3)
    if "vcl" in names:
        model = perdure.models.mean_field(model, seed=4)
    methods = [METHODS[name][0]() for name in names]
    return perdure.Learner(model, partial(torch.optim.SGD, lr=0.05), methods, scenario=scenario)


def tasks(scenario: str) -> list[perdure.Task]:
    stream = perdure.benchmarks.split_digits(scenario=scenario, seed=0)
    return [replace(task, train=task.train.subset(torch.arange(48))) for task in stream[:2]]


def run(
    trained: perdure.Learner, scenario: str, since: tuple[int, int] = (0, 0), until: tuple[int, int] = (9, 9)
) -> None:
    """Two tasks of three steps, from one (task, step) to another."""
    for task in tasks(scenario)[since[0] :]:
        trained.begin_task(task)
        assert trained.task is not None
        data = trained.task.train
        for step in range(3):
            if (task.index, step) == until:
                return
            if (task.index, step) >= since:
                rows = torch.arange(16 * step, 16 * step + 16) % len(data)
                trained.step(*data.gather(rows), index=rows)
        trained.end_task()


@pytest.mark.parametrize(("a", "b"), [pair for pair in LEGAL if COMMON[pair]])
def test_a_legal_pair_trains_in_any_order_and_resumes(a: str, b: str, tmp_path: Path) -> None:
    scenario = next(s for s in ("class", "task", "domain") if s in COMMON[a, b])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerdureWarning)
        whole, cut, other = (learner(names, scenario) for names in ((a, b), (b, a), (a, b)))
        run(whole, scenario)
        run(cut, scenario, until=(1, 1))
        save_state(tmp_path / "state", learner_state(cut))
        load_learner_state(other, load_state(tmp_path / "state"))
        run(other, scenario, since=(1, 1))
    assert whole.parameters.theta.isfinite().all()
    assert torch.equal(whole.parameters.theta, other.parameters.theta)
    x: Tensor = tasks(scenario)[0].test.gather(torch.arange(20))[0]  # type: ignore[union-attr]
    shown = 0 if scenario == "task" else None
    assert torch.equal(whole.predict(x, shown), other.predict(x, shown))


@pytest.mark.parametrize(("a", "b"), [pair for pair in PAIRS if pair not in LEGAL])
def test_an_impossible_pair_is_refused_and_both_are_named(a: str, b: str) -> None:
    with pytest.raises(IncompatibleError, match=f"(?s)(?=.*'{a}')(?=.*'{b}').*; "):
        learner((a, b), next(iter(registry.methods.get(a).scenarios)))


@pytest.mark.filterwarnings("ignore::perdure.errors.PerdureWarning")
def test_methods_without_a_stream_in_common_are_refused_on_each() -> None:
    apart = [pair for pair in LEGAL if not COMMON[pair]]
    for pair in apart:
        for scenario in SCENARIOS:
            with pytest.raises(IncompatibleError, match=r"is not defined on a|needs task boundaries|needs the task"):
                learner(pair, scenario)
