"""GEM in training: its memories, its reference gradients, and what its steps guarantee."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_problems import (
    Watcher,
    batches,
    current_loss,
    gradient_of,
    momentum,
    same_bits,
    sgd,
    sgd_step,
    toy_model,
    toy_stream,
    values,
    weights,
)
from torch import Tensor, nn

import perdure
from perdure.methods import GEM, Method
from perdure.methods.projection import gem_projection, reference_gradient
from perdure.streams.task import Stream

pytestmark = pytest.mark.filterwarnings("ignore:.*constrains the gradient:perdure.errors.PerdureWarning")


def memory_gradients(method: GEM, model: nn.Module, stream: Stream) -> list[Tensor]:
    """The gradient of the mean loss on each finished task's memory, by plain autograd."""
    found = []
    for memory in method.memory.finished:
        task = stream[int(memory["task"][0])]
        if hasattr(model.head, "activate"):
            model.head.activate(task.index)
        found.append(gradient_of(current_loss(model(memory["x"]), memory["y"], task, stream.scenario), model))
    return found


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_training_equals_a_hand_written_loop(scenario: str) -> None:
    """The quadratic programme is solved here by projected gradient descent on v."""
    stream = toy_stream(scenario, tasks=4)
    outputs = 2 if scenario == "domain" else 8
    margin, eps = 0.3, 1e-3
    ours, theirs = toy_model(outputs), toy_model(outputs)
    method = GEM(per_task=6, margin=margin, eps=eps)
    perdure.Learner(ours, sgd, [method]).fit(stream, batch_size=8)

    violations = 0
    for task in stream:
        past = method.memory.finished[: task.index]
        for x, y in batches(stream, task.index):
            g = gradient_of(current_loss(theirs(x), y, task, scenario), theirs)
            if past:
                G = torch.stack(
                    [
                        gradient_of(current_loss(theirs(m["x"]), m["y"], stream[i], scenario), theirs)
                        for i, m in enumerate(past)
                    ]
                )
                if (G @ g < 0).any():
                    violations += 1
                    P, q = (G @ G.T).double() + eps * torch.eye(len(G)), (G @ g).double()
                    v = torch.full((len(G),), margin, dtype=torch.float64)
                    for _ in range(4000):
                        v = (v - (P @ v + q) / P.trace()).clamp_min(margin)
                    g = g + G.T @ v.float()
            sgd_step(theirs, g)
    assert violations > 3
    assert torch.allclose(weights(ours), weights(theirs), atol=2e-5)


@pytest.mark.parametrize(("scenario", "head"), [("class", None), ("task", None), ("task", "multi"), ("domain", None)])
def test_no_applied_gradient_has_a_negative_product_with_a_memory(scenario: str, head: str | None) -> None:
    """Measured on what the optimizer really gets: a parameter without gradient is not moved by it."""
    stream = toy_stream(scenario, tasks=4)
    model = toy_model(2 if scenario == "domain" else 8, head)
    method = GEM(per_task=6, margin=0.0, eps=0.0)
    learner = perdure.Learner(model, sgd, [method], scenario=scenario)
    violated = 0
    for task in stream:
        learner.begin_task(task)
        for x, y in batches(stream, task.index):
            before = weights(model)
            constraints = memory_gradients(method, model, stream)
            if head == "multi":
                model.head.activate(task.index)
            plain = gradient_of(current_loss(model(x)[:, : max(task.classes) + 1], y, task, scenario), model)
            learner.step(x, y)
            applied = (before - weights(model)) / 0.1
            for constraint in constraints:
                violated += bool(plain @ constraint < -1e-4)
                assert float(applied @ constraint) >= -1e-5 * max(1.0, float(constraint @ constraint))
        learner.end_task()
    assert violated > 3


def test_another_tasks_head_is_not_moved() -> None:
    stream = toy_stream("task")
    learner = perdure.Learner(toy_model(head="multi"), momentum, [GEM(per_task=6)], scenario="task")
    learner.fit_task(stream[0], batch_size=8)
    before = [p.detach().clone() for p in learner.model.head.heads["task_0"].parameters()]
    learner.fit_task(stream[1], batch_size=8)
    after = learner.model.head.heads["task_0"].parameters()
    assert all(torch.equal(p, q) for p, q in zip(after, before, strict=True))


def test_a_gradient_that_violates_nothing_keeps_its_bits() -> None:
    """The same examples again agree with their own memory, so training must be fine-tuning."""
    stream = toy_stream("domain", tasks=1)
    models = toy_model(2), toy_model(2)
    watcher = Watcher()
    for model, methods in ((models[0], [GEM(per_task=40, margin=0.7), watcher]), (models[1], [])):
        learner = perdure.Learner(model, sgd, methods)
        x, y = stream[0].train.gather(torch.arange(40))
        for name in ("first", "second"):
            learner.begin_task(name)
            for _ in range(5):
                learner.step(x, y)
            learner.end_task()
    assert same_bits(*models)
    assert all(torch.equal(step["raw"], step["final"]) for step in watcher.steps)


def test_the_memory_is_a_uniform_sample_of_each_finished_task_in_equal_parts() -> None:
    stream = toy_stream("class", tasks=4)
    method = GEM(capacity=30)
    perdure.Learner(toy_model(8), sgd, [method]).fit(stream, batch_size=8, epochs=2)
    assert [len(memory["y"]) for memory in method.memory.finished] == [7] * 4  # 30 // 4
    for task, memory in zip(stream, method.memory.finished, strict=True):
        known = {tuple(row): int(y) for row, y in zip(task.train.x.tolist(), task.train.targets, strict=True)}
        rows = [tuple(row) for row in memory["x"].tolist()]
        assert len(set(rows)) == 7
        assert [known[row] for row in rows] == memory["y"].tolist()
        assert memory["task"].tolist() == [task.index] * 7


@pytest.mark.parametrize("method", [GEM(capacity=30), perdure.methods.AGEM(capacity=30)], ids=lambda m: m.name)
def test_a_shared_capacity_needs_a_stream_that_says_how_many_share_it(method: Method) -> None:
    learner = perdure.Learner(toy_model(), sgd, [method])
    with pytest.raises(perdure.errors.UsageError, match="per_task"):
        learner.begin_task("one of who knows how many")


def test_every_row_of_a_task_is_as_likely_to_be_remembered() -> None:
    x = torch.arange(50, dtype=torch.float32)[:, None]
    kept = torch.zeros(5)
    for seed in range(200):
        method = GEM(per_task=10)
        learner = perdure.Learner(nn.Linear(1, 2), sgd, [method], seed=seed)
        learner.begin_task("only")
        for start in range(0, 50, 10):
            for first_pass in (True, False):
                method.after_step(
                    perdure.batch.Batch.current(x[start : start + 10], torch.zeros(10), 0, None, first_pass), None
                )
        learner.end_task()
        kept += torch.bincount((method.memory.finished[0]["x"][:, 0] / 10).long(), minlength=5)
    expected = 200 * 10 / 5
    assert float(((kept - expected) ** 2 / expected).sum()) < 18.5, kept


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_reference_gradients_leave_gradients_modes_and_statistics_alone(mode: bool) -> None:
    stream = toy_stream("class")
    model = toy_model(norm=True)
    learner = perdure.Learner(model, sgd, [])
    learner.fit_task(stream[0], batch_size=8)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    model.train(mode)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = batches(stream, 1)[0]
    found = reference_gradient(learner, x, y, None)
    assert found.abs().sum() > 0
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(bool((p.grad == 3.0).all()) for p in model.parameters())
    assert all(module.training == mode for module in model.modules())
    assert model.body[1].track_running_stats
    # The batch is normalised as the mode says, as in a plain pass.
    expected = gradient_of(nn.functional.cross_entropy(model(x), y), model)
    assert torch.allclose(values(learner.parameters, found), expected, atol=1e-6)


@pytest.mark.parametrize("method", [GEM(per_task=8), perdure.methods.AGEM(per_task=8)], ids=lambda m: m.name)
def test_running_statistics_see_current_rows_only(method: Method) -> None:
    stream = toy_stream("class")
    model = toy_model(norm=True)
    learner = perdure.Learner(model, sgd, [method])
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    norm = model.body[1]
    x, y = batches(stream, 1)[0]
    hidden = model.body[0](x).detach()
    expected = 0.9 * norm.running_mean + 0.1 * hidden.mean(0)
    count = int(norm.num_batches_tracked)
    learner.step(x, y)
    assert torch.allclose(norm.running_mean, expected, atol=1e-6)
    assert int(norm.num_batches_tracked) == count + 1


def test_the_step_is_the_projection_of_the_penalised_gradient() -> None:
    """With a penalty beside it, the sum is projected: a penalty added afterwards could violate the constraint again."""
    stream = toy_stream("domain")
    watcher = Watcher()
    method = GEM(per_task=6, margin=0.0, eps=0.0)
    penalty = perdure.methods.L2(strength=1.0)
    model = toy_model(2)
    learner = perdure.Learner(model, sgd, [method, penalty, watcher])
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    projections = 0
    for x, y in batches(stream, 1, epochs=2):
        constraints = torch.stack(memory_gradients(method, model, stream))
        pull = 1.0 * (weights(model) - values(learner.parameters, penalty.anchor))
        learner.step(x, y)
        raw, final = (values(learner.parameters, watcher.steps[-1][name]) for name in ("raw", "final"))
        wanted = gem_projection(constraints, raw + pull)
        projections += wanted is not None
        expected = raw + pull if wanted is None else wanted
        assert torch.allclose(final, expected, atol=1e-5)
    assert projections > 2
    assert np.isfinite(weights(model).numpy()).all()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reference_gradients_are_unscaled_under_mixed_precision(precision: str) -> None:
    stream = toy_stream("class")
    x, y = batches(stream, 1)[0]
    found = []
    for each in ("float32", precision):
        learner = perdure.Learner(toy_model(), sgd, [], precision=each)
        learner.step(x, y)
        learner.parameters.theta.copy_(perdure.Learner(toy_model(), sgd).parameters.theta)
        found.append(reference_gradient(learner, x, y, None))
    assert torch.allclose(found[0], found[1], rtol=0.1, atol=0.01 * float(found[0].abs().max()))


# -- options ----------------------------------------------------------------------------------------------------------


def test_memory_gradients_are_renewed_every_few_steps() -> None:
    """In between, the gradient is projected with those of an earlier step."""
    stream = toy_stream("class")
    model, watcher = toy_model(), Watcher()
    method = GEM(per_task=6, margin=0.0, eps=0.0, refresh=3)
    learner = perdure.Learner(model, sgd, [method, watcher])
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    stale, compared = [], 0
    for number, (x, y) in enumerate(batches(stream, 1, epochs=2)):
        fresh = torch.stack(memory_gradients(method, model, stream))
        if number % 3 == 0:
            stale = fresh
        learner.step(x, y)
        raw, final = (values(learner.parameters, watcher.steps[-1][name]) for name in ("raw", "final"))
        wanted, other = gem_projection(stale, raw), gem_projection(fresh, raw)
        assert torch.allclose(final, raw if wanted is None else wanted, atol=1e-5)
        compared += number % 3 > 0 and not torch.allclose(final, raw if other is None else other, atol=1e-4)
    assert compared > 3


@pytest.mark.parametrize("refresh", [1, 3])
@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_it_resumes_between_two_renewals(refresh: int, stop: int, tmp_path: Path) -> None:
    stream = toy_stream("class")
    methods = [GEM(per_task=8, refresh=refresh, batch_size=5) for _ in range(2)]
    learner = perdure.Learner(toy_model(head="growing"), momentum, methods[:1], scenario="class")
    for task in stream[:2]:
        learner.fit_task(task, batch_size=8)
    learner.begin_task(stream[2])
    rows = batches(stream, 2)
    for x, y in rows[:stop]:
        learner.step(x, y)
    learner.save(tmp_path)
    assert (methods[0].state_dict()["references"] is not None) == (stop % refresh > 0)
    other = perdure.Learner.load(tmp_path, toy_model(head="growing"), methods=methods[1:], optimizer=momentum)
    for each in (learner, other):
        for x, y in rows[stop:]:
            each.step(x, y)
    assert torch.equal(learner.parameters.theta, other.parameters.theta)


def test_a_part_of_every_memory_is_drawn_for_its_gradient() -> None:
    stream = toy_stream("domain", tasks=3)
    model, watcher = toy_model(2), Watcher()
    method = GEM(per_task=10, margin=0.0, eps=0.0, batch_size=4)
    learner = perdure.Learner(model, sgd, [method, watcher])
    for task in stream[:2]:
        learner.fit_task(task, batch_size=8)
    learner.begin_task(stream[2])
    projected = 0
    for x, y in batches(stream, 2):
        draw = torch.Generator()
        draw.set_state(method.generator.get_state())
        rows = []
        for memory in method.memory.finished:
            chosen = torch.randperm(10, generator=draw)[:4]
            loss = nn.functional.cross_entropy(model(memory["x"][chosen]), memory["y"][chosen])
            rows.append(gradient_of(loss, model))
        learner.step(x, y)
        raw, final = (values(learner.parameters, watcher.steps[-1][name]) for name in ("raw", "final"))
        wanted = gem_projection(torch.stack(rows), raw)
        projected += wanted is not None
        assert torch.allclose(final, raw if wanted is None else wanted, atol=1e-5)
    assert projected > 1


@pytest.mark.parametrize("make", [GEM, perdure.methods.AGEM])
def test_a_ring_keeps_the_newest_examples_of_each_task(make: type[GEM]) -> None:
    stream = toy_stream("class")
    method = make(per_task=6, writing="ring")
    learner = perdure.Learner(toy_model(), sgd, [method])
    for task in stream:
        learner.begin_task(task)
        x, y = task.train.gather(torch.arange(40))
        for rows in torch.arange(40).split(7):
            learner.step(x[rows], y[rows])
        learner.end_task()
        newest = {tuple(row) for row in x[-6:].tolist()}
        assert {tuple(row) for row in method.memory.finished[-1]["x"].tolist()} == newest


def test_a_ring_of_every_class_holds_as_many_of_each() -> None:
    stream = toy_stream("class")
    for method in (GEM(per_task=6, writing="class_ring"), perdure.methods.AGEM(per_class=3, writing="ring")):
        learner = perdure.Learner(toy_model(), sgd, [method])
        learner.fit(stream, batch_size=8)
        for task, memory in zip(stream, method.memory.finished, strict=True):
            assert sorted(memory["y"].tolist()) == [c for c in task.classes for _ in range(3)]


@pytest.mark.parametrize("wrong", [{"refresh": 0}, {"batch_size": 0}, {"writing": "herding"}, {"margin": -1.0}])
def test_arguments_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(perdure.errors.UsageError, match=next(iter(wrong))):
        GEM(**wrong)
