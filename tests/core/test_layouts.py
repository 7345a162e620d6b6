"""Gaps between parameters stay zero, and a state that was saved with other gaps, or none, loads by name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import perdure
from perdure import parameters
from perdure.methods import AGEM, EWC, GEM, L2, SI, Joint, Method

pytestmark = pytest.mark.filterwarnings("ignore::perdure.errors.PerdureWarning")


def build(methods: list[Method] | None = None) -> perdure.Learner:
    """Layers whose sizes fill no cache line, and state of every kind that is aligned with the parameters."""
    methods = [EWC(strength=1), SI(strength=0.1), L2(strength=0.1, mode="all")] if methods is None else methods
    return perdure.Learner(
        perdure.models.MLP(64, [7, 1, 5], 10, seed=1), partial(torch.optim.Adam, lr=1e-2), methods, scenario="domain"
    )


def train(learner: perdure.Learner, name: str) -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(len(name)))
    learner.fit_task(name, (x, torch.arange(40) % 10), batch_size=8)


def vectors(learner: perdure.Learner) -> dict[str, Tensor]:
    """Every aligned vector of every method, by parameter."""
    return {
        f"{method.name}.{attribute}.{name}": view.clone()
        for method in learner.methods
        for attribute in method.aligned
        if (vector := getattr(method, attribute)) is not None
        for name, view in learner.parameters.views(vector).items()
    }


def assert_gaps_are_zero(learner: perdure.Learner) -> None:
    gaps = ~learner.parameters.mask()
    held = [learner.parameters.theta, learner.parameters.gather()]
    held += [getattr(method, attribute) for method in learner.methods for attribute in method.aligned]
    assert not any(vector[gaps].any() for vector in held if vector is not None)


@pytest.mark.parametrize("boundary", [4, 64, 256], ids=["no gaps", "as now", "wide gaps"])
@pytest.mark.parametrize("methods", [None, [Joint()]], ids=["penalties", "joint"])
def test_a_learner_saved_in_another_layout_goes_on_as_if_it_had_been_this_one(
    boundary: int, methods: list[Method] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(parameters, "_ALIGNMENT_BYTES", boundary)
        saved = build(methods)
        if methods is None:
            train(saved, "a")
            train(saved, "ab")
        assert (saved.parameters.layout.length == len(saved.parameters)) == (boundary == 4)
        before = vectors(saved)
        saved.save(tmp_path / "learner")
    loaded = build(None if methods is None else [Joint()])
    perdure.saving.load_learner_state(loaded, perdure.checkpoint.load_state(tmp_path / "learner")["learner"])
    assert loaded.parameters.layout.length == len(loaded.parameters.theta) > len(loaded.parameters)
    after = vectors(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_gaps_are_zero(loaded)
    if methods is None:
        train(saved, "abc")
        train(loaded, "abc")
        for name, value in saved.model.state_dict().items():
            torch.testing.assert_close(loaded.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
        for name, value in vectors(saved).items():
            torch.testing.assert_close(vectors(loaded)[name], value, rtol=1e-3, atol=1e-5)
        assert_gaps_are_zero(loaded)


@pytest.mark.parametrize("projection", [GEM, AGEM])
@pytest.mark.parametrize("solver", ["grad", "prox"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_nothing_is_ever_written_between_two_parameters(
    solver: str, optimizer: type[torch.optim.Optimizer], projection: Callable[..., Method]
) -> None:
    methods: list[Method] = [
        EWC(strength=1, solver=solver, normalise=True),
        SI(strength=0.1, xi=1e-50, solver=solver),
        L2(strength=0.1, solver=solver),
        projection(per_task=5),
    ]
    learner = perdure.Learner(
        perdure.models.MLP(64, [7, 1, 5], 10, seed=1), partial(optimizer, lr=1e-2), methods, scenario="domain"
    )
    for name in ("a", "ab", "abc"):
        train(learner, name)
        assert_gaps_are_zero(learner)
    assert learner.parameters.theta.isfinite().all()
    assert learner.methods[-1].importance.isfinite().all()
