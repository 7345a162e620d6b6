"""A-GEM in training: the drawn reference, the memory behind it, and steps that change nothing."""

from __future__ import annotations

from pathlib import Path

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
    values,
    weights,
)
from torch.nn import functional as F

import perdure
from perdure.memory.buffer import Buffer
from perdure.methods import AGEM
from perdure.methods.projection import agem_project, agem_projection
from perdure.seeding import derive, generator

pytestmark = pytest.mark.filterwarnings("ignore:.*constrains the gradient:perdure.errors.PerdureWarning")


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_training_equals_a_hand_written_loop(scenario: str) -> None:
    stream = toy_stream(scenario, tasks=4)
    outputs = 2 if scenario == "domain" else 8
    ours, theirs = toy_model(outputs), toy_model(outputs)
    method = AGEM(per_task=6, batch_size=9)
    perdure.Learner(ours, sgd, [method]).fit(stream, batch_size=8)

    draw = generator(0, "method", "agem")
    changed = kept = 0
    for task in stream:
        past = method.memory.finished[: task.index]
        for x, y in batches(stream, task.index):
            g = gradient_of(current_loss(theirs(x), y, task, scenario), theirs)
            if past:
                memory = {name: torch.cat([m[name] for m in past]) for name in ("x", "y", "task")}
                rows = torch.randperm(len(memory["y"]), generator=draw)[:9]
                logits, targets = theirs(memory["x"][rows]), memory["y"][rows]
                if scenario == "task":
                    loss = masked_cross_entropy(logits, targets, [stream[int(t)].classes for t in memory["task"][rows]])
                else:
                    loss = F.cross_entropy(logits, targets)
                r = gradient_of(loss, theirs)
                if g @ r < 0:
                    changed += 1
                    g = g - (g @ r) / (r @ r) * r
                else:
                    kept += 1
            sgd_step(theirs, g)
    assert changed > 2
    assert kept > (-1 if scenario == "class" else 2)  # in a class-incremental stream every step is against the past
    assert torch.allclose(weights(ours), weights(theirs), atol=2e-5)


def test_without_a_violation_the_optimizer_gets_the_gradient_bit_for_bit() -> None:
    """The course's version left the memory's gradient in place and trained on the memory alone."""
    stream = toy_stream("domain", tasks=1)
    models = toy_model(2), toy_model(2)
    watcher = Watcher()
    x, y = stream[0].train.gather(torch.arange(40))
    for model, methods in ((models[0], [AGEM(per_task=40), watcher]), (models[1], [])):
        learner = perdure.Learner(model, momentum, methods)
        for name in ("first", "second"):
            learner.begin_task(name)
            for _ in range(5):
                learner.step(x, y)
                if name == "second" and methods:
                    last = watcher.steps[-1]
                    assert torch.equal(last["raw"], last["final"])
                    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
                    assert torch.equal(flat, values(learner.parameters, last["raw"]))
            learner.end_task()
    assert same_bits(*models)


def test_projected_gradients_are_shorter_orthogonal_to_the_reference_and_occur() -> None:
    stream = toy_stream("class")
    watcher = Watcher()
    method = AGEM(per_task=20, batch_size=1000)  # the draw is then the whole memory
    model = toy_model()
    learner = perdure.Learner(model, sgd, [method, watcher])
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    projected = 0
    for x, y in batches(stream, 1):
        memory = method.memory.finished[0]
        r = gradient_of(F.cross_entropy(model(memory["x"]), memory["y"]), model)
        learner.step(x, y)
        raw, final = (values(learner.parameters, watcher.steps[-1][name]) for name in ("raw", "final"))
        assert float(final @ r) >= -1e-6 * float(r @ r)
        if raw @ r < -1e-6:
            projected += 1
            assert final.norm() < raw.norm()
            assert torch.allclose(final, raw - (raw @ r) / (r @ r) * r, atol=1e-5)
        elif raw @ r > 1e-6:
            assert torch.equal(final, raw)
    assert projected > 2


@pytest.mark.parametrize("head", [None, "multi"])
def test_the_memory_never_holds_the_current_task(head: str | None) -> None:
    stream = toy_stream("task")
    method = AGEM(per_task=10)
    learner = perdure.Learner(toy_model(head=head), sgd, [method], scenario="task")
    seen = []
    for task in stream:
        learner.begin_task(task)
        for x, y in batches(stream, task.index):
            learner.step(x, y)
            drawn = method.memory.draw(1000, torch.Generator())
            seen.append(set() if drawn is None else set(drawn["task"].tolist()))
        learner.end_task()
    assert seen == [set()] * 5 + [{0}] * 5 + [{0, 1}] * 5
    assert len(method.memory) == 30


def test_the_capacity_is_divided_by_the_number_of_tasks() -> None:
    stream = toy_stream("class", tasks=4)
    method = AGEM(capacity=30)
    perdure.Learner(toy_model(8), sgd, [method]).fit(stream, batch_size=8)
    assert [len(memory["y"]) for memory in method.memory.finished] == [7] * 4


def test_the_first_task_is_fine_tuning() -> None:
    stream = toy_stream("class")
    ours, plain = toy_model(norm=True), toy_model(norm=True)
    for model, methods in ((ours, [AGEM()]), (plain, [])):
        perdure.Learner(model, momentum, methods).fit_task(stream[0], batch_size=8)
    assert same_bits(ours, plain)


def test_several_heads_guarantee_what_the_optimizer_can_keep() -> None:
    """The old heads are not moved, so the constraint is on the shared weights alone."""
    stream = toy_stream("task")
    method = AGEM(per_task=20, batch_size=1000)  # the draw is then the whole memory
    model = toy_model(head="multi")
    learner = perdure.Learner(model, sgd, [method], scenario="task")
    for task in stream[:2]:
        learner.fit_task(task, batch_size=8, epochs=3)
    heads = [p.detach().clone() for i in range(2) for p in model.head.heads[f"task_{i}"].parameters()]
    learner.begin_task(stream[2])
    body, against = list(model.body.parameters()), 0
    for x, y in batches(stream, 2, epochs=3):
        losses = []
        for memory, task in zip(method.memory.finished, stream, strict=False):
            logits = model.head.heads[f"task_{task.index}"](model.features(memory["x"]))
            losses.append(F.cross_entropy(logits, memory["y"] - 2 * task.index))
        r = torch.cat([g.flatten() for g in torch.autograd.grad(torch.stack(losses).mean(), body)])
        plain = F.cross_entropy(model.head.heads["task_2"](model.features(x)), y - 4)
        g = torch.cat([part.flatten() for part in torch.autograd.grad(plain, body)])
        before = torch.cat([p.detach().flatten() for p in body])
        learner.step(x, y)
        applied = (before - torch.cat([p.detach().flatten() for p in body])) / 0.1
        against += bool(g @ r < -1e-4)
        assert torch.allclose(applied, g - min(0, float(g @ r / (r @ r))) * r, atol=1e-5)
        assert float(applied @ r) >= -1e-5 * max(1.0, float(r @ r))
    assert against > 2
    now = [p for i in range(2) for p in model.head.heads[f"task_{i}"].parameters()]
    assert all(torch.equal(p, q) for p, q in zip(now, heads, strict=True))


def test_a_number_of_examples_of_every_class() -> None:
    stream = toy_stream("class", tasks=4)
    method = AGEM(per_class=3, batch_size=5)
    perdure.Learner(toy_model(8), sgd, [method]).fit(stream, batch_size=8)
    for task, memory in zip(stream, method.memory.finished, strict=True):
        assert sorted(memory["y"].tolist()) == [c for c in task.classes for _ in range(3)]
    with pytest.raises(perdure.errors.UsageError, match="capacity and per_class"):
        AGEM(per_class=3, capacity=9)


# -- streams that announce no tasks -----------------------------------------------------------------------------------


def test_on_a_stream_without_tasks_all_that_came_before_is_the_past() -> None:
    """One reservoir; the reference is drawn before the batch itself can be remembered."""
    stream = toy_stream("class")
    model, theirs, watcher = toy_model(), toy_model(), Watcher()
    method = AGEM(capacity=15, batch_size=9)
    learner = perdure.Learner(model, sgd, [method, watcher], scenario="online")
    memory = Buffer(15, seed=derive(derive(0, "buffer", "agem"), "stream"))
    changed = 0
    for task in stream:
        for x, y in batches(stream, task.index):
            g = gradient_of(F.cross_entropy(theirs(x), y), theirs)
            if len(memory):
                drawn = memory.sample(9)
                r = gradient_of(F.cross_entropy(theirs(drawn["x"]), drawn["y"]), theirs)
                if g @ r < 0:
                    changed += 1
                    g = g - (g @ r) / (r @ r) * r
            sgd_step(theirs, g)
            memory.add({"x": x, "y": y})
            learner.step(x, y)
    assert changed > 3
    assert torch.allclose(weights(model), weights(theirs), atol=2e-5)
    assert method.memory.finished == []
    assert torch.equal(method.stream.view("x"), memory.view("x"))


def test_what_came_between_announced_tasks_is_drawn_in_proportion() -> None:
    stream = toy_stream("class")
    method = AGEM(per_task=10, batch_size=8)
    learner = perdure.Learner(toy_model(), sgd, [method])
    learner.fit_task(stream[0], batch_size=8)
    for x, y in batches(stream, 1):
        learner.step(x, y)
        assert method._draw() is not None
    assert sorted(method._draw()["task"].tolist()) == [-1] * 4 + [0] * 4
    learner.begin_task(stream[2])
    learner.step(*batches(stream, 2)[0])
    assert sorted(method._draw()["task"].tolist()) == [-1] * 4 + [0] * 4


def test_it_resumes_on_a_stream_without_tasks(tmp_path: Path) -> None:
    stream = toy_stream("class")
    rows = [pair for task in stream for pair in batches(stream, task.index)]
    learner = perdure.Learner(toy_model(), momentum, [AGEM(capacity=15, batch_size=9)])
    for x, y in rows[:7]:
        learner.step(x, y)
    learner.save(tmp_path)
    other = perdure.Learner.load(tmp_path, toy_model(), optimizer=momentum)
    for each in (learner, other):
        for x, y in rows[7:]:
            each.step(x, y)
    assert torch.equal(learner.parameters.theta, other.parameters.theta)


def test_a_projection_in_pieces_is_that_of_the_whole() -> None:
    """Also of a picture's weights in channels_last, whose values lie in another order in memory."""
    draw = torch.Generator().manual_seed(0)
    whole, reference = torch.randn(2, 60, generator=draw).unbind()
    if whole @ reference > 0:
        reference = -reference
    wanted = agem_projection(whole, reference)
    assert not torch.allclose(wanted, whole, atol=0.01)
    pieces = [whole[:36].clone().view(3, 3, 2, 2).to(memory_format=torch.channels_last), whole[36:].clone()]
    agem_project(pieces, [reference[:36].view(3, 3, 2, 2), reference[36:]])
    assert torch.allclose(torch.cat([piece.flatten() for piece in pieces]), wanted, atol=1e-6)
