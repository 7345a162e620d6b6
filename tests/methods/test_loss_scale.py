"""Float16: what a method's own backward pass overflows to never reaches the weights, and lowers the loss scale."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import perdure
from perdure.methods import AGEM, GEM, MIR
from perdure.methods.loss_scale import finish_gradients

OLD = torch.tensor([[3000.0, 0.0, 0.0, 0.0]] * 4)
NEW = torch.tensor([[0.1, 0.0, 0.0, 0.0]] * 4)


def learner_with(method: Any) -> perdure.Learner:
    """A learner in its second task: rows of the first overflow at a scale at which those of the second do not."""
    model = nn.Linear(4, 3)
    learner = perdure.Learner(
        model, partial(torch.optim.SGD, lr=1e-6), [method] if method else [], scenario="class", precision="float16"
    )
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    learner.begin_task("a", classes=(0, 1, 2))
    learner.step(OLD, torch.zeros(4, dtype=torch.int64))
    learner.end_task()
    learner.begin_task("b", classes=(0, 1, 2))
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    learner.parameters.theta.zero_()
    return learner


@pytest.mark.parametrize("method", [MIR(20, candidates=4, batch_size=4), AGEM(per_task=20), GEM(per_task=20)])
def test_a_step_without_what_overflowed_is_a_plain_one_and_the_next_has_a_lower_scale(method: Any) -> None:
    ours, plain = learner_with(method), learner_with(None)
    y = torch.tensor([1, 1, 2, 2])
    for learner in (ours, plain):
        learner.step(NEW, y)
    assert float(plain.parameters.theta.abs().max()) > 0, "the current rows themselves overflowed"
    assert torch.equal(ours.parameters.theta, plain.parameters.theta)
    assert plain.scaler is not None
    assert plain.scaler.get_scale() == 2.0**16
    assert ours.scaler is not None
    assert ours.scaler.get_scale() == 2.0**15
    for learner in (ours, plain):
        for _ in range(16):
            learner.step(NEW, y)
    assert 1 <= ours.scaler.get_scale() < 2.0**14
    assert bool(ours.parameters.theta.isfinite().all())
    assert not torch.equal(ours.parameters.theta, plain.parameters.theta), "it never took part again"


def test_a_pass_that_overflows_by_itself_does_not_use_up_the_scale() -> None:
    learner = learner_with(None)
    assert learner.scaler is not None
    for wrong in (float("inf"), float("nan")):
        learner.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scales = []
        for _ in range(5):
            scale = learner.scaler.scale(torch.ones(()))
            gradients = [torch.tensor([1.0, wrong]), torch.ones(3)]
            finish_gradients(learner, gradients, scale)
            assert not any(gradient.any() for gradient in gradients)
            scales.append(learner.scaler.get_scale())
        assert scales == [4.0, 2.0, 1.0, 1.0, 1.0]


def test_what_is_finite_is_unscaled_and_leaves_the_scale() -> None:
    learner = learner_with(None)
    assert learner.scaler is not None
    gradients = [torch.tensor([2.0**16, -(2.0**17)]), torch.zeros(3)]
    finish_gradients(learner, gradients, learner.scaler.scale(torch.ones(())))
    assert gradients[0].tolist() == [1.0, -2.0]
    assert learner.scaler.get_scale() == 2.0**16
