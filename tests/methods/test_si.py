"""Synaptic Intelligence: the path integral, and the gradient and movement that enter it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from small_problems import Watcher, batches, gradient_of, same_bits, sgd, toy_model, toy_stream, values, weights
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.methods import EWC, SI

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]]) + 0.3


def descend(rate: float, steps: int) -> tuple[float, float]:
    """The path sum and the fall of the loss over full-batch gradient steps on a quadratic."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    penalty = SI(strength=1.0)
    learner = perdure.Learner(
        model, partial(torch.optim.SGD, lr=rate), [penalty], criterion=lambda out, y: (out - y).square().sum(1)
    )
    learner.begin_task("a")
    x, y = X.double(), Y.double()
    start = float((model(x) - y).detach().square().mean())
    for _ in range(steps):
        learner.step(x, y)
    return float(penalty.path.sum()), start - float((model(x) - y).detach().square().mean())


def test_the_path_sum_is_the_fall_of_the_loss_up_to_the_order_of_the_rate() -> None:
    errors = []
    for rate in (0.04, 0.02, 0.01):
        path, fall = descend(rate, int(4 / rate))
        assert fall > 1
        errors.append(path / fall - 1)
    assert 0 < errors[2] < 0.03
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def test_weights_without_gradient_have_no_path() -> None:
    model = nn.Linear(4, 1)
    penalty = SI()
    learner = perdure.Learner(model, sgd, [penalty], criterion=lambda out, y: (out - y).square().sum(1))
    learner.begin_task("a")
    x = X.clone()
    x[:, 2] = 0
    for _ in range(5):
        learner.step(x, Y)
    path = values(learner.parameters, penalty.path)
    assert path[2] == 0
    assert (path[[0, 1, 3, 4]] != 0).all()


@pytest.mark.parametrize("solver", ["grad", "prox"])
@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.05}, {"clip_value": 0.01}], ids=["free", "norm", "value"])
def test_the_path_pairs_the_plain_gradient_with_the_whole_movement(clip: dict[str, float], solver: str) -> None:
    """Neither penalty nor clipping enters the gradient; momentum, penalty, clipping and prox enter the movement."""
    stream = toy_stream("domain")
    watcher = Watcher()
    model = toy_model(2)
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
    penalty = SI(strength=5.0, xi=0.01, solver=solver)
    learner = perdure.Learner(model, optimizer, [penalty, watcher], **clip)
    learner.fit_task(stream[0], batch_size=8)
    watcher.steps.clear()
    learner.begin_task(stream[1])
    expected = torch.zeros_like(weights(model))
    for x, y in batches(stream, 1):
        plain = gradient_of(F.cross_entropy(model(x), y), model)
        before = weights(model)
        learner.step(x, y)
        expected -= plain * (weights(model) - before)
        if solver == "grad":
            assert len(watcher.steps) == 1 or not torch.allclose(
                values(learner.parameters, watcher.steps[-1]["final"]), plain
            )
    assert torch.allclose(values(learner.parameters, penalty.path), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore:ewc and si each pull")
def test_the_path_with_another_penalty_that_changes_the_gradient() -> None:
    stream = toy_stream("domain")
    model = toy_model(2)
    learner = perdure.Learner(model, sgd, [SI(strength=0.0), ewc := EWC(strength=20.0)])
    penalty = learner.methods[1]
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    expected = torch.zeros_like(weights(model))
    for x, y in batches(stream, 1):
        plain, before = gradient_of(F.cross_entropy(model(x), y), model), weights(model)
        learner.step(x, y)
        expected -= plain * (weights(model) - before)
    assert ewc.penalty() > 0
    assert torch.allclose(values(learner.parameters, penalty.path), expected, rtol=1e-5, atol=1e-8)


def test_importance_is_the_relu_of_path_over_squared_distance_added_up_over_tasks() -> None:
    stream = toy_stream("domain")
    penalty = SI(strength=0.05, xi=1e-3)
    learner = perdure.Learner(toy_model(2), partial(torch.optim.SGD, lr=0.3, momentum=0.9), [penalty])
    expected = torch.zeros_like(penalty.path)
    negative = 0
    for task in stream:
        start = learner.parameters.theta.clone()
        learner.begin_task(task)
        for x, y in batches(stream, task.index):
            learner.step(x, y)
        path = penalty.path.clone()
        negative += int((path < 0).sum())
        expected += (path / ((learner.parameters.theta - start) ** 2 + 1e-3)).clamp_min(0)
        learner.end_task()
        assert torch.allclose(penalty.importance, expected, rtol=1e-6)
        assert (penalty.importance >= 0).all()
        assert not penalty.path.any()
        assert torch.equal(penalty.anchor, learner.parameters.theta)
    assert negative > 0, "without negative paths this would not see a missing relu"


def test_it_acts_and_its_importances_are_not_zero() -> None:
    """A published implementation kept views of the live weights: nothing had moved, and nothing was ever protected."""
    stream = toy_stream("domain")
    penalty = SI(strength=1.0)
    ours, plain = toy_model(2), toy_model(2)
    perdure.Learner(ours, sgd, [penalty]).fit(stream, batch_size=8)
    perdure.Learner(plain, sgd).fit(stream, batch_size=8)
    assert penalty.importance.sum() > 0
    assert not same_bits(ours, plain)


def test_strength_zero_keeps_the_path_but_moves_nothing() -> None:
    stream = toy_stream("domain")
    penalty = SI(strength=0.0)
    ours, plain = toy_model(2), toy_model(2)
    perdure.Learner(ours, sgd, [penalty]).fit(stream, batch_size=8)
    perdure.Learner(plain, sgd).fit(stream, batch_size=8)
    assert same_bits(ours, plain)
    assert penalty.importance.sum() > 0


@pytest.mark.parametrize("solver", ["grad", "prox"])
def test_training_equals_a_hand_written_loop(solver: str) -> None:
    stream = toy_stream("domain")
    ours, theirs = toy_model(2), toy_model(2)
    strength, xi, rate = 0.8, 0.05, 0.1
    perdure.Learner(ours, sgd, [SI(strength=strength, xi=xi, solver=solver)]).fit(stream, batch_size=8)
    omega = torch.zeros_like(weights(theirs))
    anchor = weights(theirs)
    for task in stream:
        path, start = torch.zeros_like(omega), weights(theirs)
        for x, y in batches(stream, task.index):
            before = weights(theirs)
            raw = gradient_of(F.cross_entropy(theirs(x), y), theirs)
            if solver == "grad":
                after: Tensor = before - rate * (raw + strength * omega * (before - anchor))
            else:
                after = before - rate * raw
                after = (after + rate * strength * omega * anchor) / (1 + rate * strength * omega)
            nn.utils.vector_to_parameters(after, theirs.parameters())
            path -= raw * (after - before)
        omega = omega + (path / ((weights(theirs) - start) ** 2 + xi)).clamp_min(0)
        anchor = weights(theirs)
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-6)


def test_micro_batches_make_one_path_step_an_update() -> None:
    stream = toy_stream("domain")
    found = []
    for pieces in (1, 4):
        penalty = SI(strength=1.0)
        learner = perdure.Learner(toy_model(2), sgd, [penalty], micro_batches=pieces)
        learner.begin_task(stream[0])
        for x, y in batches(stream, 0):
            learner.step(x, y)
        found.append(penalty.path.clone())
    assert found[0].sum() > 0
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_total_gradient_and_no_clamp_equal_a_hand_written_loop(momentum: float) -> None:
    """As in some published code: the penalty is part of the path, and negative importances count."""
    stream = toy_stream("domain")
    ours, theirs = toy_model(2), toy_model(2)
    strength, xi, rate = 0.05, 1e-3, 0.3
    penalty = SI(strength=strength, xi=xi, gradient="total", clamp=False)
    optimizer = partial(torch.optim.SGD, lr=rate, momentum=momentum)
    learner = perdure.Learner(ours, optimizer, [penalty])
    learner.fit(stream, batch_size=8)
    omega = torch.zeros_like(weights(theirs))
    anchor, velocity = weights(theirs), torch.zeros_like(omega)
    for task in stream:
        path, start = torch.zeros_like(omega), weights(theirs)
        for x, y in batches(stream, task.index):
            before = weights(theirs)
            total = gradient_of(F.cross_entropy(theirs(x), y), theirs) + strength * omega * (before - anchor)
            velocity = momentum * velocity + total
            nn.utils.vector_to_parameters(before - rate * velocity, theirs.parameters())
            path -= total * (weights(theirs) - before)
        omega = omega + path / ((weights(theirs) - start) ** 2 + xi)
        anchor = weights(theirs)
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-5)
    assert torch.allclose(values(learner.parameters, penalty.importance), omega, rtol=1e-3, atol=1e-4)
    assert bool((omega < 0).any()) == bool(momentum), "plain descent never goes against its own gradient"


def test_negative_importances_are_refused_where_they_would_divide() -> None:
    with pytest.raises(perdure.errors.UsageError, match="leave clamp on"):
        SI(clamp=False, solver="prox")
    with pytest.raises(perdure.errors.UsageError, match="gradient is 'all'"):
        SI(gradient="all")
