"""MomentumKD: the running average by hand, the statistics it carries, growth, and streams without boundaries."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_problems import batches, gradient_of, sgd, sgd_step, toy_model, toy_stream, values, weights
from torch import Tensor
from torch.nn import functional as F

import perdure
from perdure.checkpoint import load_state, save_state
from perdure.methods import MomentumKD
from perdure.saving import learner_state, load_learner_state

pytestmark = pytest.mark.filterwarnings("ignore:.*alone on a class-incremental")


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    return temperature**2 * (p * (p / q).log()).sum(1).mean()


def test_training_equals_a_hand_written_loop_without_any_boundary() -> None:
    stream, decay = toy_stream("domain"), 0.8
    ours, theirs = toy_model(2), toy_model(2)
    method = MomentumKD(strength=0.7, temperature=3.0, decay=decay)
    learner = perdure.Learner(ours, sgd, [method])
    rows = [pair for task in stream for pair in batches(stream, task.index)]
    average: list[Tensor] = []
    for t, (x, y) in enumerate(rows, 1):
        learner.step(x, y)
        loss = F.cross_entropy(theirs(x), y)
        if t > 1:
            teacher = copy.deepcopy(theirs)
            for p, kept in zip(teacher.parameters(), average, strict=True):
                p.data.copy_(kept)
            loss = loss + 0.7 * divergence(theirs(x), teacher(x).detach(), 3.0)
        sgd_step(theirs, gradient_of(loss, theirs))
        keep = min(decay, 1 - 1 / t)
        now = [p.detach().clone() for p in theirs.parameters()]
        average = [keep * a + (1 - keep) * p for a, p in zip(average, now, strict=True)] if average else now
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-5)
    expected = torch.cat([a.flatten() for a in average])
    assert torch.allclose(values(learner.parameters, method.average), expected, atol=1e-5)
    assert not torch.allclose(expected, weights(theirs), atol=1e-3)


def test_the_average_is_the_mean_of_all_weights_until_decay_takes_over() -> None:
    method = MomentumKD(decay=0.9)
    learner = perdure.Learner(toy_model(2), sgd, [method])
    seen = []
    for x, y in batches(toy_stream("domain"), 0, epochs=2):
        learner.step(x, y)
        seen.append(learner.parameters.theta.clone())
    assert len(seen) == 10
    assert torch.allclose(method.average, torch.stack(seen).mean(0), atol=1e-6)


def test_running_statistics_are_averaged_and_the_models_own_left_alone() -> None:
    stream = toy_stream("domain")
    found = []
    for methods in ([MomentumKD(strength=1e-9, decay=0.5)], []):
        learner = perdure.Learner(toy_model(2, norm=True), sgd, methods)
        norm, means = learner.model.body[1], []
        for x, y in batches(stream, 0)[:3]:
            learner.step(x, y)
            means.append(norm.running_mean.clone())
        found.append(means)
        if methods:
            kept = methods[0].buffers
            assert torch.allclose(kept["body.1.running_mean"], (means[0] + means[1]) / 4 + means[2] / 2, atol=1e-6)
            assert int(kept["body.1.num_batches_tracked"]) == int(norm.num_batches_tracked) == 3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_the_teacher_grows_with_the_model_and_new_rows_begin_as_the_models() -> None:
    stream = toy_stream("class")
    method = MomentumKD(decay=0.95)
    learner = perdure.Learner(toy_model(head="growing"), sgd, [method], scenario="class")
    learner.fit_task(stream[0], batch_size=8)
    old = learner.parameters.views(method.average)["head.weight"].clone()
    learner.begin_task(stream[1])
    now, theta = (learner.parameters.views(v)["head.weight"] for v in (method.average, learner.parameters.theta))
    assert now.shape == (4, 7)
    assert torch.equal(now[:2], old)
    assert torch.equal(now[2:], theta[2:])
    assert not torch.equal(old, theta[:2])
    learner.step(*batches(stream, 1)[0])


def test_small_parts_are_not_lost_in_bfloat16() -> None:
    method = MomentumKD(decay=0.999)
    learner = perdure.Learner(toy_model(2).bfloat16(), sgd, [method])
    for x, y in batches(toy_stream("domain"), 0)[:2]:
        learner.step(x, y)
    assert method.average.dtype == torch.float32
    method.updates = 5000
    before = method.average.clone()
    theta = learner.parameters.theta
    theta.fill_(1.0)
    method.observe_update(theta, theta)
    assert torch.allclose(method.average - before, 0.001 * (1 - before), rtol=1e-2, atol=1e-6)


def test_a_saved_average_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    rows = batches(toy_stream("domain"), 0, epochs=2)

    def learner() -> perdure.Learner:
        return perdure.Learner(toy_model(2, norm=True), sgd, [MomentumKD(decay=0.7)])

    whole, cut, other = learner(), learner(), learner()
    for x, y in rows:
        whole.step(x, y)
    for x, y in rows[:4]:
        cut.step(x, y)
    save_state(tmp_path / "state", learner_state(cut))
    load_learner_state(other, load_state(tmp_path / "state"))
    for x, y in rows[4:]:
        other.step(x, y)
    assert torch.equal(other.parameters.theta, whole.parameters.theta)
    assert torch.equal(other.methods[0].average, whole.methods[0].average)


def test_a_known_task_has_every_head_of_its_own_distilled() -> None:
    """Shifting all logits of one task's block changes nothing: it is normalised by itself."""
    stream = toy_stream("task")
    method = MomentumKD(strength=1.0)
    learner = perdure.Learner(toy_model(head="multi"), sgd, [method], scenario="task")
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    learner.step(*batches(stream, 1)[0])
    method.average.copy_(learner.parameters.theta)
    x, y = batches(stream, 1)[1]
    batch = method.on_batch(perdure.batch.Batch.current(x, y, 1))

    def value() -> float:
        loss = method.loss(batch, learner.forward.batch(batch, 1))
        assert loss is not None
        return float(loss.detach())

    assert abs(value()) < 1e-6
    bias = learner.parameters.views(learner.parameters.theta)["head.heads.task_0.bias"]
    bias += 3.0
    assert abs(value()) < 1e-6
    bias[0] += 1.0
    assert value() > 1e-3
