"""DER and DER++: which logits are stored, what they are compared with, and how the draws relate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_problems import (
    Watcher,
    batches,
    current_loss,
    gradient_of,
    masked_cross_entropy,
    momentum,
    same_bits,
    sgd,
    sgd_step,
    toy_model,
    toy_stream,
    weights,
)
from torch import Tensor
from torch.nn import functional as F

import perdure
from perdure.memory import Buffer
from perdure.methods import DER, DERpp, Method, Replay
from perdure.seeding import derive
from perdure.streams.task import Stream


def labels_loss(logits: Tensor, drawn: dict[str, Any], stream: Stream) -> Tensor:
    if stream.scenario != "task":
        return F.cross_entropy(logits, drawn["y"])
    return masked_cross_entropy(logits, drawn["y"], [stream[int(task)].classes for task in drawn["task"]])


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@pytest.mark.parametrize("kind", ["der", "derpp", "shared"])
@pytest.mark.parametrize("forward", ["separate", "joint"])
def test_training_equals_a_hand_written_loop(scenario: str, kind: str, forward: str) -> None:
    stream = toy_stream(scenario)
    outputs = 2 if scenario == "domain" else 6
    ours, theirs = toy_model(outputs), toy_model(outputs)
    common = {"capacity": 20, "batch_size": 5, "alpha": 0.3, "forward": forward}
    method = DER(**common) if kind == "der" else DERpp(beta=0.8, shared_draw=kind == "shared", **common)
    perdure.Learner(ours, sgd, [method]).fit(stream, batch_size=8, epochs=2)

    memory = Buffer(20, seed=derive(0, "buffer", method.name))
    for task in stream:
        for step, (x, y) in enumerate(batches(stream, task.index, epochs=2)):
            logits = theirs(x)
            loss = current_loss(logits, y, task, scenario)
            if len(memory):
                first = memory.sample(5)
                distance = theirs(first["x"]) - first["logits"]
                loss = loss + 0.3 * distance.square().sum() / (5 * outputs)
                if kind != "der":
                    second = memory.sample(5) if kind == "derpp" else first
                    loss = loss + 0.8 * labels_loss(theirs(second["x"]), second, stream)
            before_the_step = logits.detach().clone()
            sgd_step(theirs, gradient_of(loss, theirs))
            if step < 5:
                memory.add({"x": x, "y": y, "task": torch.full((len(y),), task.index), "logits": before_the_step})
    assert torch.allclose(weights(ours), weights(theirs), atol=5e-6)
    assert torch.allclose(method.buffer.view("logits"), memory.view("logits"), atol=1e-5)


@pytest.mark.parametrize("make", [DER, DERpp], ids=lambda m: m.__name__)
def test_stored_logits_are_those_before_the_step_and_are_never_refreshed(make: type[Method]) -> None:
    stream = toy_stream("class")
    method = make(capacity=1000)
    model = toy_model()
    learner = perdure.Learner(model, sgd, [method])
    known: dict[tuple[float, ...], Tensor] = {}
    for task in stream:
        learner.begin_task(task)
        for epoch in range(2):
            for x, y in batches(stream, task.index):
                if epoch == 0:
                    with torch.no_grad():
                        known |= {tuple(row): z for row, z in zip(x.tolist(), model(x), strict=True)}
                learner.step(x, y, first_pass=epoch == 0)
        learner.end_task()
    stored = {
        tuple(row): z for row, z in zip(method.buffer.view("x").tolist(), method.buffer.view("logits"), strict=True)
    }
    assert stored.keys() == known.keys()
    assert len(stored) == 120
    assert all(torch.allclose(stored[row], known[row], atol=1e-6) for row in stored)
    with torch.no_grad():
        assert not torch.allclose(method.buffer.view("logits"), model(method.buffer.view("x")), atol=0.1)


def test_there_is_no_loss_and_no_gradient_where_the_logits_are_the_stored_ones() -> None:
    stream = toy_stream("class")
    method = DER(capacity=1000, alpha=5.0)
    learner = perdure.Learner(toy_model(), sgd, [method])
    learner.begin_task(stream[0])
    x, y = batches(stream, 0)[0]
    start = learner.parameters.theta.clone()
    learner.step(x, y)
    learner.parameters.theta.copy_(start)
    batch = method.on_batch(perdure.batch.Batch.current(x, y, 0))
    loss = method.loss(batch, learner.forward.batch(batch, 0))
    assert float(loss.detach()) < 1e-12
    assert float(gradient_of(loss, learner.model).abs().max()) < 1e-6


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_labels_alone_on_a_shared_draw_are_replay(scenario: str) -> None:
    stream = toy_stream(scenario)
    models = toy_model(), toy_model()
    dark = DERpp(capacity=20, alpha=0.0, beta=0.6, shared_draw=True)
    plain = Replay(capacity=20, weighting="sum", weight=0.6, forward="separate")
    for model, method in zip(models, (dark, plain), strict=True):
        learner = perdure.Learner(model, momentum, [method])
        method.buffer = Buffer(20, seed=5)
        learner.fit(stream, batch_size=8)
    assert same_bits(*models)


def test_the_second_draw_is_independent_of_the_first() -> None:
    """Two draws of 5 from 20 share 1.25 rows on average; one draw used twice would share 5."""
    stream = toy_stream("class", rows=200)
    watcher = Watcher()
    perdure.Learner(toy_model(), sgd, [DERpp(capacity=20, batch_size=5), watcher]).fit(stream, batch_size=8)
    shared = []
    for step in watcher.steps[5:]:
        first, second = (step["batch"].find(name) for name in ("derpp_logits", "derpp_labels"))
        rows = {tuple(row) for row in first.x.tolist()}
        shared.append(sum(tuple(row) in rows for row in second.x.tolist()))
        assert "logits" in first.extras
        assert "logits" not in second.extras
        assert (first.share, second.share) == (0.0, 0.5)
    mean = sum(shared) / len(shared)
    # One draw's overlap has variance 5 * .25 * .75 * 15 / 19 = .74.
    assert abs(mean - 1.25) < 4 * (0.74 / len(shared)) ** 0.5


@pytest.mark.parametrize("make", [DER, DERpp], ids=lambda m: m.__name__)
def test_only_columns_that_existed_are_compared_when_a_head_grows(make: type[Method]) -> None:
    stream = toy_stream("class")
    method = make(capacity=60, batch_size=60)
    name = "der" if make is DER else "derpp_logits"
    learner = perdure.Learner(toy_model(head="growing"), sgd, [method], scenario="class")
    for index in range(2):
        learner.fit_task(stream[index], batch_size=8)
    learner.begin_task(stream[2])
    x, y = batches(stream, 2)[0]
    batch = method.on_batch(perdure.batch.Batch.current(x, y, 2))
    source = batch.find(name)
    assert set(source.tasks.tolist()) == {0, 1}
    outputs = learner.forward.batch(batch, None)
    loss = method.loss(batch, outputs)
    then = outputs[batch.slice(name)]
    assert then.shape[1] == 6
    rows = []
    for z, stored, task in zip(then, source.extras["logits"], source.tasks.tolist(), strict=True):
        existed = 2 * (task + 1)
        rows.append((z[:existed] - stored[:existed]).square().mean())
    assert float(loss.detach()) == pytest.approx(0.5 * float(torch.stack(rows).mean().detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, outputs)
    gradient = gradient[batch.slice(name)]
    assert not gradient[:, 4:].any()
    assert not gradient[source.tasks == 0][:, 2:].any()
    assert gradient[source.tasks == 1][:, 2:4].any()


def test_with_several_heads_only_the_rows_own_columns_are_compared() -> None:
    stream = toy_stream("task")
    method = DERpp(capacity=60, batch_size=30)
    learner = perdure.Learner(toy_model(head="multi"), sgd, [method], scenario="task")
    for index in range(2):
        learner.fit_task(stream[index], batch_size=8)
    learner.begin_task(stream[2])
    x, y = batches(stream, 2)[0]
    batch = method.on_batch(perdure.batch.Batch.current(x, y, 2))
    source = batch.find("derpp_logits")
    outputs = learner.forward.batch(batch, 2)
    loss = method.loss(batch, outputs)
    then, rows = outputs[batch.slice("derpp_logits")], []
    for z, stored, task in zip(then, source.extras["logits"], source.tasks.tolist(), strict=True):
        own = slice(2 * task, 2 * task + 2)
        rows.append((z[own] - stored[own]).square().mean())
    assert float(loss.detach()) == pytest.approx(0.5 * float(torch.stack(rows).mean().detach()), rel=1e-5)
    assert torch.isfinite(gradient_of(loss, learner.model)).all()
    for _ in range(3):
        learner.step(x, y)
    assert torch.isfinite(learner.parameters.theta).all()


def test_alpha_and_beta_zero_only_fill_the_buffer() -> None:
    stream = toy_stream("class")
    ours, plain = toy_model(norm=True), toy_model(norm=True)
    method = DERpp(capacity=20, alpha=0.0, beta=0.0)
    perdure.Learner(ours, momentum, [method]).fit(stream, batch_size=8)
    perdure.Learner(plain, momentum).fit(stream, batch_size=8)
    assert same_bits(ours, plain)
    assert (len(method.buffer), method.buffer.seen) == (20, 120)


@pytest.mark.parametrize("make", [DER, DERpp], ids=lambda m: m.__name__)
def test_a_draw_of_no_rows_is_fine_tuning(make: type[Method]) -> None:
    stream = toy_stream("class")
    ours, plain = toy_model(norm=True), toy_model(norm=True)
    perdure.Learner(ours, momentum, [make(capacity=20, ratio=0.01)]).fit(stream, batch_size=8)
    perdure.Learner(plain, momentum).fit(stream, batch_size=8)
    assert same_bits(ours, plain)


@pytest.mark.parametrize("make", [DER, DERpp], ids=lambda m: m.__name__)
def test_micro_batches_add_up_to_the_whole_batch_and_store_the_same_logits(make: type[Method]) -> None:
    stream = toy_stream("class")
    found, logits = [], []
    for pieces in (1, 3):
        model, method = toy_model(), make(capacity=20, batch_size=5)
        perdure.Learner(model, sgd, [method], micro_batches=pieces).fit(stream, batch_size=8)
        found.append(weights(model))
        logits.append(method.buffer.view("logits").clone())
    assert torch.allclose(found[0], found[1], atol=2e-6)
    assert torch.allclose(logits[0], logits[1], atol=1e-5)


def test_stored_logits_keep_full_precision_under_autocast() -> None:
    stream = toy_stream("class")
    method = DER(capacity=20)
    perdure.Learner(toy_model(), sgd, [method], precision="bfloat16").fit(stream, batch_size=8)
    assert method.buffer.view("logits").dtype == torch.float32
