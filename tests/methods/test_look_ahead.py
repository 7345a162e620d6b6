"""Look-ahead meta-learning against plain replay, and against autograd on a copied model."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from small_problems import batches, current_loss, gradient_of, same_bits, sgd, sgd_step, toy_model, toy_stream, weights
from torch.nn import functional as F

import perdure
from perdure.memory.buffer import Buffer
from perdure.methods import LookAhead, Method, Replay
from perdure.seeding import derive

adamw = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)


@pytest.mark.parametrize("forward", ["joint", "separate"])
@pytest.mark.parametrize(("scenario", "head", "norm"), [("class", None, True), ("task", "multi", False)])
def test_without_looking_ahead_it_is_replay_with_summed_losses_bit_for_bit(
    forward: str, scenario: str, head: str | None, norm: bool
) -> None:
    stream = toy_stream(scenario)
    models = toy_model(head=head, norm=norm), toy_model(head=head, norm=norm)
    methods: list[Method] = [
        LookAhead(capacity=20, inner_lr=0.0, forward=forward),
        Replay(capacity=20, weighting="sum", forward=forward),
    ]
    for model, method in zip(models, methods, strict=True):
        learner = perdure.Learner(model, adamw, [method])
        method.buffer = Buffer(20, seed=7)  # the same draws
        learner.fit(stream, batch_size=8)
    assert same_bits(*models)


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_training_equals_autograd_on_a_copied_model(scenario: str) -> None:
    stream = toy_stream(scenario)
    outputs = 2 if scenario == "domain" else 6
    ours, theirs = toy_model(outputs), toy_model(outputs)
    method = LookAhead(capacity=20, inner_lr=0.3, inner_steps=3, batch_size=5)
    perdure.Learner(ours, sgd, [method]).fit(stream, batch_size=8)

    memory = Buffer(20, seed=derive(0, "buffer", "look_ahead"))
    for task in stream:
        for x, y in batches(stream, task.index):
            fast = deepcopy(theirs)
            for _ in range(3):
                sgd_step(fast, gradient_of(current_loss(fast(x), y, task, scenario), fast), lr=0.3)
            loss = current_loss(fast(x), y, task, scenario)
            if len(memory):
                drawn = memory.sample(5)
                for index in drawn["task"].unique().tolist():
                    own = drawn["task"] == index
                    old = current_loss(fast(drawn["x"][own]), drawn["y"][own], stream[index], scenario)
                    loss = loss + old * (int(own.sum()) / len(own))
            sgd_step(theirs, gradient_of(loss, fast))
            memory.add({"x": x, "y": y, "task": task.index})
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-5)


def test_the_first_batch_moves_the_weights_along_the_gradient_at_the_fast_ones() -> None:
    """The course's version copies the model, and its outer loss then sends no gradient to the one that is trained."""
    stream = toy_stream("class")
    model = toy_model()
    x, y = batches(stream, 0)[0]
    fast = deepcopy(model)
    for _ in range(5):
        sgd_step(fast, gradient_of(F.cross_entropy(fast(x), y), fast), lr=0.3)
    expected = gradient_of(F.cross_entropy(fast(x), y), fast)
    here = gradient_of(F.cross_entropy(model(x), y), model)
    before = weights(model)
    learner = perdure.Learner(model, sgd, [LookAhead(inner_lr=0.3)])
    learner.begin_task(stream[0])
    learner.step(x, y)
    moved = (before - weights(model)) / 0.1
    assert moved.norm() > 0.01
    assert torch.allclose(moved, expected, atol=1e-5)
    assert not torch.allclose(moved, here, atol=1e-2)


def test_an_outer_rate_of_zero_leaves_the_weights_and_still_remembers() -> None:
    stream = toy_stream("class")
    model, method = toy_model(), LookAhead(capacity=20)
    perdure.Learner(model, partial(torch.optim.Adam, lr=0.0), [method]).fit(stream, batch_size=8)
    assert same_bits(model, toy_model())
    assert len(method.buffer) == 20
    assert set(method.buffer.view("task").tolist()) == {0, 1, 2}


def test_trial_steps_leave_running_statistics_alone() -> None:
    stream = toy_stream("class")
    model = toy_model(norm=True)
    x, y = batches(stream, 0)[0]
    fast = deepcopy(model)
    for _ in range(4):
        sgd_step(fast, gradient_of(F.cross_entropy(fast(x), y), fast), lr=0.3)
    mean = fast.body[0](x).detach().mean(0)
    learner = perdure.Learner(model, sgd, [LookAhead(inner_lr=0.3, inner_steps=4)])
    learner.begin_task(stream[0])
    learner.step(x, y)
    norm = model.body[1]
    assert torch.allclose(norm.running_mean, 0.1 * mean, atol=1e-6)
    assert int(norm.num_batches_tracked) == 1
    assert norm.track_running_stats


def test_another_tasks_head_keeps_its_bits_until_its_rows_are_replayed() -> None:
    stream = toy_stream("task")
    model = toy_model(head="multi")
    method = LookAhead(capacity=40, batch_size=1)
    learner = perdure.Learner(model, adamw, [method], scenario="task")
    learner.fit_task(stream[0], batch_size=8)
    learner.fit_task(stream[1], batch_size=8)
    heads = {i: [p.detach().clone() for p in model.head.heads[f"task_{i}"].parameters()] for i in (0, 1)}
    learner.begin_task(stream[2])
    x, y = batches(stream, 2)[0]
    state = method.buffer.state_dict()
    (replayed,) = method.buffer.sample(1)["task"].tolist()
    method.buffer.load_state_dict(state)
    learner.step(x, y)
    for index, old in heads.items():
        now = model.head.heads[f"task_{index}"].parameters()
        assert all(torch.equal(p, q) for p, q in zip(now, old, strict=True)) == (index != replayed)


@pytest.mark.parametrize("options", [{"micro_batches": 3}, {"precision": "float16"}, {"precision": "bfloat16"}])
def test_micro_batches_and_mixed_precision_agree_with_whole_ones(options: dict[str, object]) -> None:
    stream = toy_stream("class")
    models = toy_model(), toy_model()
    for model, chosen in zip(models, ({}, options), strict=True):
        perdure.Learner(model, sgd, [LookAhead(capacity=20, inner_lr=0.3)], **chosen).fit(stream, batch_size=8)
    tolerance = 1e-5 if "micro_batches" in options else 0.05
    assert torch.allclose(weights(models[0]), weights(models[1]), atol=tolerance)
    assert (weights(models[0]) - weights(toy_model())).abs().max() > 0.2


def test_the_optimizers_own_groups_and_the_learners_clipping_hold() -> None:
    x, y = batches(toy_stream("class"), 0)[0]

    def groups(named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        head = [p for name, p in named if name.startswith("head")]
        body = [p for name, p in named if not name.startswith("head")]
        return torch.optim.SGD([{"params": body, "lr": 0.0}, {"params": head, "lr": 1.0}])

    model = toy_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = perdure.Learner(model, groups, [LookAhead()], clip_norm=0.01)
    learner.step(x, y)
    moved = {name: float((p.detach() - before[name]).norm()) for name, p in model.named_parameters()}
    assert all((moved[name] > 0) == name.startswith("head") for name in moved)
    assert sum(value**2 for value in moved.values()) <= 0.01**2 * 1.001
