"""The wrapper of SI: a loop by hand gathers what the method does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from wrapped import Batches, adam, batches, build, register, train, weights

from perdure.continual import SynapticIntelligence
from perdure.errors import DivergedError
from perdure.models.heads import GrowingHead


def loop(si: SynapticIntelligence, optimizer: Any, data: Batches, penalised: bool = False) -> None:
    """The document's loop: `update_importance` before `step`."""
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(si.model(x), y)
        if penalised:
            loss = loss + si.get_regularization_loss()
        loss.backward()
        si.update_importance(loss)
        optimizer.step()


def kept(si: SynapticIntelligence) -> tuple[Tensor | None, Tensor | None]:
    return si.method.importance, si.method.anchor


def test_a_loop_by_hand_equals_the_method_bit_for_bit() -> None:
    found = []
    for own in (True, False):
        model = build()
        si, optimizer = SynapticIntelligence(model, importance=2.0), adam(model)
        si.register_task(1)
        if own:
            loop(si, optimizer, batches(1))
        else:
            train(si, optimizer, batches(1), 1)
        si.register_task(2)
        train(si, optimizer, batches(2), 2)
        si.register_task(3)
        found.append((*kept(si), weights(model)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert found[0][0].sum() > 0


def test_a_penalty_in_the_loop_is_not_part_of_the_path() -> None:
    found = []
    for how in ("loop", "twice", "half", "method"):
        model = build(dtype=torch.float64)
        data = [[(x.double(), y) for x, y in batches(task)] for task in (1, 2)]
        si = SynapticIntelligence(model, importance=8.0 if how == "half" else 4.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(si, optimizer, data[0], 1)
        si.register_task(2)
        if how == "method":
            train(si, optimizer, data[1], 2)
        elif how == "loop":
            loop(si, optimizer, data[1], penalised=True)
        elif how == "half":
            for x, y in data[1]:
                optimizer.zero_grad()
                (0.5 * si.get_regularization_loss() + F.cross_entropy(model(x), y)).backward()
                si.update_importance(0.0)
                optimizer.step()
        else:
            for x, y in data[1]:
                optimizer.zero_grad()
                si.get_regularization_loss()  # only looked at
                (0.25 * si.get_regularization_loss() + F.cross_entropy(model(x), y)).backward()
                (0.75 * si.get_regularization_loss()).backward()
                si.update_importance(0.0)
                optimizer.step()
        si.register_task(3)
        found.append((*kept(si), weights(model)))
    for one in found[:3]:
        for ours, theirs in zip(one, found[3], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


def test_the_path_is_the_fall_of_the_loss() -> None:
    model = build(dtype=torch.float64)
    x, y = batches(1, rows=64)[0]
    x = x.double()
    si, optimizer = SynapticIntelligence(model), torch.optim.SGD(model.parameters(), lr=1e-4)
    si.register_task(1)
    first = F.cross_entropy(model(x), y).item()
    loop(si, optimizer, [(x, y)] * 200)
    si._settle()
    fall = first - F.cross_entropy(model(x), y).item()
    assert fall > 0
    assert si.method.path.sum().item() == pytest.approx(fall, rel=1e-3)


def test_the_last_step_counts_and_a_loss_that_is_not_finite_is_refused() -> None:
    model = build()
    si, optimizer = SynapticIntelligence(model), torch.optim.SGD(model.parameters(), lr=0.5)
    si.register_task(1)
    loop(si, optimizer, batches(1)[:1])
    assert si.method.path.sum() == 0, "there is no step yet when the importance is updated"
    si.register_task(2)
    assert si.method.importance is not None
    assert si.method.importance.sum() > 0
    with pytest.raises(DivergedError, match="the loss is nan"):
        si.update_importance(torch.tensor(float("nan")))


def test_gradients_stay_the_callers_and_parameters_without_one_do_not_count() -> None:
    model = build()
    si = SynapticIntelligence(model)
    model[0].bias.requires_grad_(False)
    F.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    before = [p.grad for p in model.parameters()]
    si.update_importance(1.0)
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    assert before[1] is None
    # Another wrapper takes the parameters to storage of its own in the middle of a step.
    SynapticIntelligence(model)
    F.cross_entropy(model(batches(1)[1][0]), batches(1)[1][1]).backward()
    si.update_importance(1.0)
    assert all((p.grad is None) == (g is None) for p, g in zip(model.parameters(), before, strict=True))


def test_training_that_belongs_to_no_task_is_not_on_the_path() -> None:
    model = build()
    si, optimizer = SynapticIntelligence(model), adam(model)
    loop(si, optimizer, batches(7))
    fresh = build()
    fresh.load_state_dict(model.state_dict())
    other, theirs = SynapticIntelligence(fresh), adam(fresh)
    theirs.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match="trained outside"):
        train(si, optimizer, batches(1), 1)
    train(other, theirs, batches(1), 1)
    si.register_task(2)
    other.register_task(2)
    assert all(torch.equal(a, b) for a, b in zip(kept(si), kept(other), strict=True))


def test_a_head_may_grow_between_two_steps_of_a_loop_by_hand() -> None:
    found = []
    for grows in (True, False):
        head = GrowingHead(9, 3, seed=1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), head)
        si = SynapticIntelligence(model)
        si.register_task(1)
        loop(si, adam(model), batches(1))
        if grows:
            head.grow(4)
        register(si, 2, batches(2))
        assert si.method.importance is not None
        assert si.method.importance.shape == si.learner.parameters.theta.shape
        found.append(si.learner.parameters.views(si.method.importance))
    grown, plain = found
    assert torch.equal(grown["2.weight"][:3], plain["2.weight"])
    assert torch.equal(grown["0.weight"], plain["0.weight"])
    assert grown["2.weight"][3:].abs().sum() == 0
