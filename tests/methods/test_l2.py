"""The L2 anchor: its minimiser in closed form, and what its two modes remember."""

from __future__ import annotations

import pytest
import torch
from small_problems import batches, gradient_of, sgd, sgd_step, spread, toy_model, toy_stream, values, weights
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.methods import L2


def squared(outputs: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (outputs - y).square().sum(1)


def regression(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(25, 4, generator=draw), torch.randn(25, 1, generator=draw)


@pytest.mark.parametrize("solver", ["grad", "prox"])
def test_the_minimiser_of_a_quadratic_loss_is_the_closed_form(solver: str) -> None:
    strength = 0.7
    model = nn.Linear(4, 1, bias=False)
    learner = perdure.Learner(model, sgd, [L2(strength=strength, solver=solver)], criterion=squared)
    optimum = []
    for seed in (0, 1):
        x, y = regression(seed)
        learner.begin_task(f"t{seed}")
        for _ in range(1000):
            learner.step(x, y)
        learner.end_task()
        hessian = x.double().T @ x.double() / len(x)
        optimum.append((hessian, torch.linalg.solve(hessian, x.double().T @ y.double() / len(x))[:, 0]))
    (_, first), (hessian, second) = optimum
    expected = torch.linalg.solve(hessian + strength * torch.eye(4), hessian @ second + strength * first)
    assert torch.allclose(weights(model).double(), expected, atol=1e-5)
    assert not torch.allclose(weights(model).double(), second, atol=0.02)


def test_all_is_one_term_a_task_around_their_mean_and_last_is_one_term() -> None:
    stream = toy_stream("domain", tasks=4)
    found = {}
    for mode in ("last", "all"):
        penalty = L2(strength=0.3, mode=mode)
        learner = perdure.Learner(toy_model(2), sgd, [penalty])
        anchors = []
        for task in stream:
            learner.fit_task(task, batch_size=8)
            anchors.append(learner.parameters.theta.double().clone())
        noise = torch.randn(len(learner.parameters), generator=torch.Generator().manual_seed(0))
        learner.parameters.theta.add_(spread(learner.parameters, noise))
        theta = learner.parameters.theta.double()
        terms = [float(0.3 / 2 * (theta - anchor).square().sum()) for anchor in anchors]
        found[mode] = penalty.penalty()
        assert found[mode] == pytest.approx(sum(terms) if mode == "all" else terms[-1], rel=1e-5)
        mean = torch.stack(anchors).mean(0) if mode == "all" else anchors[-1]
        assert torch.allclose(penalty.anchor.double(), mean, atol=1e-6)
        assert torch.equal(
            values(learner.parameters, penalty.importance).unique(), torch.tensor([4.0 if mode == "all" else 1.0])
        )
    assert found["all"] > found["last"]


def test_training_equals_a_hand_written_loop() -> None:
    stream = toy_stream("domain")
    ours, theirs = toy_model(2), toy_model(2)
    perdure.Learner(ours, sgd, [L2(strength=0.5)]).fit(stream, batch_size=8)
    anchor = None
    for task in stream:
        for x, y in batches(stream, task.index):
            loss = F.cross_entropy(theirs(x), y)
            if anchor is not None:
                flat = torch.cat([p.flatten() for p in theirs.parameters()])
                loss = loss + 0.5 / 2 * (flat - anchor).square().sum()
            sgd_step(theirs, gradient_of(loss, theirs))
        anchor = weights(theirs)
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-6)
