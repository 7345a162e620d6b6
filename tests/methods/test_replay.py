"""Replay: how rows are weighted, which rows are kept, and that they come back as they were stored."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from small_problems import (
    Watcher,
    batches,
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
from perdure.data.examples import Examples
from perdure.memory import Buffer
from perdure.methods import Replay
from perdure.seeding import derive
from perdure.streams.task import Stream, Task


def same_draws(capacity: int, name: str = "replay") -> Buffer:
    """A buffer that draws what the method's draws, fed by the test."""
    return Buffer(capacity, seed=derive(0, "buffer", name))


def row_losses(logits: Tensor, y: Tensor, tasks: Tensor, stream: Stream) -> Tensor:
    """The loss of each row: over its own task's columns where tasks are known, else over all columns."""
    if stream.scenario != "task":
        return F.cross_entropy(logits, y, reduction="none")
    return torch.stack(
        [
            masked_cross_entropy(logits[i : i + 1], y[i : i + 1], [stream[int(task)].classes])
            for i, task in enumerate(tasks)
        ]
    )


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@pytest.mark.parametrize(
    "options",
    [{"weighting": "pooled"}, {"weighting": "sum", "weight": 0.7}, {"weighting": "1/t"}],
    ids=lambda o: o["weighting"],
)
@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_training_equals_a_hand_written_loop(scenario: str, options: dict[str, Any], forward: str) -> None:
    """Five remembered rows beside eight current ones, so that the weightings differ."""
    stream = toy_stream(scenario)
    outputs = 2 if scenario == "domain" else 6
    ours, theirs = toy_model(outputs), toy_model(outputs)
    method = Replay(capacity=20, batch_size=5, forward=forward, **options)
    perdure.Learner(ours, sgd, [method]).fit(stream, batch_size=8, epochs=2)

    memory = same_draws(20)
    for task in stream:
        for step, (x, y) in enumerate(batches(stream, task.index, epochs=2)):
            own = torch.full((len(y),), task.index)
            now = row_losses(theirs(x), y, own, stream)
            loss = now.mean()
            if len(memory) and not (options["weighting"] == "1/t" and task.index == 0):
                old = memory.sample(5)
                then = row_losses(theirs(old["x"]), old["y"], old["task"], stream)
                if options["weighting"] == "pooled":
                    loss = (now.sum() + then.sum()) / (len(now) + len(then))
                elif options["weighting"] == "sum":
                    loss = now.mean() + 0.7 * then.mean()
                else:
                    t = task.index + 1
                    loss = now.mean() / t + (1 - 1 / t) * then.mean()
            sgd_step(theirs, gradient_of(loss, theirs))
            if step < 5:  # the first pass
                memory.add({"x": x, "y": y, "task": own})
    assert torch.allclose(weights(ours), weights(theirs), atol=2e-6)
    assert len(method.buffer) == 20
    assert torch.equal(method.buffer.view("x"), memory.view("x"))


def test_several_heads_score_each_remembered_row_with_its_own_head() -> None:
    stream = toy_stream("task")
    ours, theirs = toy_model(head="multi"), toy_model(head="multi")
    perdure.Learner(ours, sgd, [Replay(capacity=20, batch_size=8)]).fit(stream, batch_size=8)

    memory = same_draws(20)
    for task in stream:
        theirs.head.add(task.index, task.classes)
        for x, y in batches(stream, task.index):
            xs, ys, tasks = [x], [y], [torch.full((len(y),), task.index)]
            if len(memory):
                old = memory.sample(8)
                xs, ys, tasks = [x, old["x"]], [y, old["y"]], [tasks[0], old["task"]]
            losses = []
            for row, target, owner in zip(torch.cat(xs), torch.cat(ys), torch.cat(tasks).tolist(), strict=True):
                logits = theirs.head.heads[f"task_{owner}"](theirs.features(row[None]))
                losses.append(F.cross_entropy(logits, target[None] - 2 * owner))
            sgd_step(theirs, gradient_of(torch.stack(losses).mean(), theirs))
            memory.add({"x": x, "y": y, "task": torch.full((len(y),), task.index)})
    assert torch.allclose(weights(ours), weights(theirs), atol=2e-6)


@pytest.mark.parametrize("head", [None, "multi"])
def test_a_known_task_keeps_remembered_rows_off_other_tasks_columns(head: str | None) -> None:
    """A softmax over a block gives bias gradients that cancel within it; one over all columns would not."""
    stream = toy_stream("task")
    watcher = Watcher()
    learner = perdure.Learner(toy_model(head=head), sgd, [Replay(capacity=30), watcher], scenario="task")
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    x, y = batches(stream, 1)[0]
    learner.step(x[:1], y[:1])
    assert watcher.steps[-1]["batch"].find("replay").tasks.tolist() == [0]
    gradient = learner.parameters.views(watcher.steps[-1]["raw"])
    if head is None:
        assert not gradient["head.weight"][4:].any()
        bias = gradient["head.bias"][:4].view(2, 2)
    else:
        bias = torch.stack([gradient[f"head.heads.task_{i}.bias"] for i in range(2)])
    assert torch.allclose(bias.sum(1), torch.zeros(2), atol=1e-7)
    assert (bias.abs() > 1e-4).all()


def test_what_comes_back_are_the_stored_bytes() -> None:
    stream = toy_stream("class", dtype=torch.uint8)
    watcher = Watcher()
    method = Replay(capacity=25)
    perdure.Learner(toy_model(), sgd, [method, watcher]).fit(stream, batch_size=8)
    known = {
        (tuple(row), int(target), task.index)
        for task in stream
        for row, target in zip(task.train.x.tolist(), task.train.targets, strict=True)
    }
    assert method.buffer.columns["x"].dtype == torch.uint8
    count = 0
    for step in watcher.steps:
        source = step["batch"].find("replay")
        if source is not None:
            assert source.x.dtype == torch.uint8
            for row, target, task in zip(source.x.tolist(), source.y.tolist(), source.tasks.tolist(), strict=True):
                assert (tuple(row), target, task) in known
                count += 1
    assert count == 8 * (len(watcher.steps) - 1)


def test_rows_are_stored_after_the_step_and_once_however_many_passes() -> None:
    stream = toy_stream("class")
    watcher = Watcher()
    method = Replay(capacity=1000)
    perdure.Learner(toy_model(), sgd, [method, watcher]).fit(stream, batch_size=8, epochs=3)
    assert method.buffer.seen == len(method.buffer) == 120
    assert len({tuple(row) for row in method.buffer.view("x").tolist()}) == 120
    assert watcher.steps[0]["batch"].names() == ["current"]
    for step in watcher.steps[1:5]:  # the first pass of the first task: nothing of the batch itself can come back
        now = {tuple(row) for row in step["batch"].now.x.tolist()}
        then = {tuple(row) for row in step["batch"].find("replay").x.tolist()}
        assert not now & then


def test_every_row_of_the_stream_is_kept_with_the_same_probability() -> None:
    """Chi-square over five ages; a reservoir that forgets how much it has seen holds mostly the newest fifth."""
    capacity, runs = 10, 60
    values = torch.arange(50, dtype=torch.float32)[:, None]
    parts = [Examples(values[first : first + 25], torch.arange(25) % 2) for first in (0, 25)]
    stream = Stream([Task(i, f"t{i}", part, part, (0, 1)) for i, part in enumerate(parts)], scenario="domain")
    arrival = torch.cat([25 * task.index + torch.cat(list(stream.plan(task, batch_size=5))) for task in stream])
    age = arrival.argsort()
    kept = torch.zeros(5)
    for seed in range(runs):
        method = Replay(capacity=capacity, batch_size=1)
        learner = perdure.Learner(torch.nn.Linear(1, 2), partial(torch.optim.SGD, lr=1e-6), [method], seed=seed)
        learner.fit(stream, batch_size=5, epochs=2)
        assert len(method.buffer) == capacity
        kept += torch.bincount(age[method.buffer.view("x")[:, 0].long()] // 10, minlength=5)
    expected = runs * capacity / 5
    assert float(((kept - expected) ** 2 / expected).sum()) < 18.5, kept  # 4 degrees of freedom, p = 0.001


def test_no_global_random_number_is_drawn() -> None:
    stream = toy_stream("class")
    learner = perdure.Learner(toy_model(), sgd, [Replay(capacity=20)])
    before = torch.get_rng_state()
    learner.fit(stream, batch_size=8)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_micro_batches_add_up_to_the_whole_batch(forward: str) -> None:
    stream = toy_stream("task")
    found = []
    for pieces in (1, 3):
        model = toy_model()
        method = Replay(capacity=20, weighting="sum", weight=0.5, forward=forward)
        perdure.Learner(model, sgd, [method], micro_batches=pieces).fit(stream, batch_size=8)
        found.append(weights(model))
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_micro_batches_that_outnumber_the_remembered_rows_add_up_too() -> None:
    stream = toy_stream("class")
    found = []
    for pieces in (1, 4):
        model = toy_model()
        perdure.Learner(model, sgd, [Replay(capacity=20, batch_size=2)], micro_batches=pieces).fit(stream, batch_size=8)
        found.append(weights(model))
    assert torch.allclose(found[0], found[1], atol=1e-6)


@pytest.mark.parametrize("off", [{"weight": 0.0, "weighting": "sum"}, {"ratio": 0.01}], ids=str)
def test_rows_without_weight_and_draws_of_no_rows_are_fine_tuning(off: dict[str, Any]) -> None:
    stream = toy_stream("class")
    ours, plain = toy_model(norm=True), toy_model(norm=True)
    perdure.Learner(ours, momentum, [Replay(capacity=20, **off)]).fit(stream, batch_size=8)
    perdure.Learner(plain, momentum).fit(stream, batch_size=8)
    assert same_bits(ours, plain)


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_per_class_the_buffer_grows_when_a_task_ends_and_keeps_what_it_has(scenario: str) -> None:
    stream = toy_stream(scenario)
    ours, plain = toy_model(2 if scenario == "domain" else 6), toy_model(2 if scenario == "domain" else 6)
    method = Replay(None, per_class=4, weighting="1/t", batch_size=5)
    learner, other = perdure.Learner(ours, sgd, [method]), perdure.Learner(plain, sgd)
    for each in (learner, other):
        each.set_scenario(scenario)
    learner.fit_task(stream[0], batch_size=8, epochs=2)
    other.fit_task(stream[0], batch_size=8, epochs=2)
    assert same_bits(ours, plain)
    for count in (1, 2, 3):
        assert len(method.buffer) == 8 * count
        kept = {name: method.buffer.view(name).clone() for name in ("x", "y", "task")}
        for index in range(count):
            of_task = kept["task"] == index
            assert sorted(kept["y"][of_task].tolist()) == [c for c in stream[index].classes for _ in range(4)]
            assert all((row == stream[index].train.x).all(1).any() for row in kept["x"][of_task])
        if count < 3:
            learner.fit_task(stream[count], batch_size=8, epochs=2)
            assert all(torch.equal(method.buffer.view(name)[: 8 * count], rows) for name, rows in kept.items())


def test_per_class_every_row_of_a_class_is_as_likely_as_every_other() -> None:
    stream = toy_stream("class", tasks=1)
    counts = torch.zeros(40)
    for seed in range(300):
        method = Replay(None, per_class=4)
        perdure.Learner(toy_model(2), sgd, [method], seed=seed).fit_task(stream[0], batch_size=8)
        for row in method.buffer.view("x"):
            counts[(stream[0].train.x == row).all(1)] += 1
    # 4 of 20 rows of each class: 60 times in 300 runs, with a standard deviation of 6.9.
    assert counts.sum() == 8 * 300
    assert (counts - 60).abs().max() < 28


def test_per_class_needs_one_size_boundaries_and_classes() -> None:
    with pytest.raises(perdure.errors.UsageError, match=r"set capacity to None \(null\)"):
        Replay(per_class=3)
    learner = perdure.Learner(toy_model(), sgd, [Replay(None, per_class=3)])
    x, y = batches(toy_stream(), 0)[0]
    with pytest.raises(perdure.errors.UsageError, match="where tasks begin"):
        learner.step(x, y)
    with pytest.raises(perdure.errors.UsageError, match="needs the classes of task 'a'"):
        learner.begin_task("a")
