"""MIR: which rows are chosen, with what gradient, and that looking for them leaves no trace."""

from __future__ import annotations

from functools import partial
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
    values,
    weights,
)
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.memory import Buffer
from perdure.methods import EWC, MIR, Replay
from perdure.seeding import derive
from perdure.streams.task import Stream


def row_losses(model: nn.Module, drawn: dict[str, Any], stream: Stream) -> Tensor:
    """Each row's loss, over its own task's columns where tasks are known."""
    logits = model(drawn["x"])
    if stream.scenario != "task":
        return F.cross_entropy(logits, drawn["y"], reduction="none")
    tasks = [stream[int(task)].classes for task in drawn["task"]]
    return torch.stack(
        [masked_cross_entropy(logits[i : i + 1], drawn["y"][i : i + 1], [own]) for i, own in enumerate(tasks)]
    )


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@pytest.mark.parametrize("old_logits", [False, True])
def test_training_equals_a_hand_written_loop(scenario: str, old_logits: bool) -> None:
    stream = toy_stream(scenario)
    outputs = 2 if scenario == "domain" else 6
    ours, theirs = toy_model(outputs), toy_model(outputs)
    method = MIR(capacity=20, candidates=12, batch_size=5, compare_to_old_logits=old_logits)
    perdure.Learner(ours, sgd, [method]).fit(stream, batch_size=8, epochs=2)

    memory = Buffer(20, seed=derive(0, "buffer", "mir"))
    for task in stream:
        for step, (x, y) in enumerate(batches(stream, task.index, epochs=2)):
            drawn_like = {"x": x, "y": y, "task": torch.full((len(y),), task.index)}
            with torch.no_grad():
                own = row_losses(theirs, drawn_like, stream)
            gradient = gradient_of(current_loss(theirs(x), y, task, scenario), theirs)
            if len(memory):
                drawn = memory.sample(12)
                start = [p.detach().clone() for p in theirs.parameters()]
                if len(drawn["y"]) > 5:
                    with torch.no_grad():
                        before = row_losses(theirs, drawn, stream)
                        if old_logits:
                            before = torch.minimum(before, drawn["least"])
                            memory.update(drawn["slot"], {"least": before})
                        sgd_step(theirs, gradient)
                        score = row_losses(theirs, drawn, stream) - before
                        for p, value in zip(theirs.parameters(), start, strict=True):
                            p.copy_(value)
                    worst = sorted(range(len(score)), key=lambda i: -float(score[i]))[:5]
                    drawn = {name: column[worst] for name, column in drawn.items()}
                gradient = gradient + gradient_of(row_losses(theirs, drawn, stream).mean(), theirs)
            sgd_step(theirs, gradient)
            if step < 5:
                memory.add(drawn_like | ({"least": own} if old_logits else {}))
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-5)


@pytest.mark.parametrize(("scenario", "head"), [("class", None), ("task", None), ("task", "multi")])
def test_as_many_candidates_as_rows_are_replay_with_the_sum_of_both_means(scenario: str, head: str | None) -> None:
    stream = toy_stream(scenario)
    ours, theirs = toy_model(head=head), toy_model(head=head)
    interfered = MIR(capacity=20, candidates=5, batch_size=5)
    plain = Replay(capacity=20, batch_size=5, weighting="sum", forward="separate")
    for model, method in ((ours, interfered), (theirs, plain)):
        learner = perdure.Learner(model, momentum, [method])
        method.buffer = Buffer(20, seed=5)
        learner.fit(stream, batch_size=8, epochs=2)
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-5)


def prepared(lr: float | None, optimizer: Any = sgd, norm: bool = False) -> tuple[perdure.Learner, MIR, Any, Tensor]:
    """A learner after one task, a draw of candidates, and a gradient."""
    stream = toy_stream("class")
    method = MIR(capacity=40, candidates=20, batch_size=5, lr=lr)
    learner = perdure.Learner(toy_model(norm=norm), optimizer, [method], scenario="class")
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    x, y = batches(stream, 1)[0]
    gradient = learner.parameters.gradient(F.cross_entropy(learner.model(x), y))
    return learner, method, method.buffer.sample(20), gradient


@pytest.mark.parametrize("norm", [False, True])
def test_scores_are_zero_for_a_step_of_no_length(norm: bool) -> None:
    _, method, drawn, gradient = prepared(0.0, norm=norm)
    assert method.scores(method._source(drawn), gradient, drawn).tolist() == [0.0] * 20


def test_to_first_order_a_score_is_the_rate_times_the_product_of_two_gradients() -> None:
    learner, method, drawn, _ = prepared(1e-3)
    learner.model.double()
    learner.follow_model()
    gradient = learner.parameters.gradient(
        F.cross_entropy(learner.model(torch.ones(2, 5).double()), torch.tensor([2, 3]))
    )
    score = method.scores(method._source(drawn), gradient, drawn)
    for i in range(20):
        x, y = drawn["x"][i : i + 1].double(), drawn["y"][i : i + 1]
        own = learner.parameters.gradient(F.cross_entropy(learner.model(x), y))
        assert float(score[i]) == pytest.approx(-1e-3 * float(own @ gradient), rel=0.05, abs=1e-6)


def test_looking_for_rows_leaves_no_trace() -> None:
    learner, method, drawn, gradient = prepared(None, norm=True)
    learner.model.body.append(nn.Dropout(0.5))
    learner.follow_model()
    state = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    modes = [module.training for module in learner.model.modules()]
    torch.manual_seed(4)
    random = torch.get_rng_state()
    method.scores(method._source(drawn), gradient, drawn)
    assert all(torch.equal(tensor, state[name]) for name, tensor in learner.model.state_dict().items())
    assert modes == [module.training for module in learner.model.modules()]
    method.add_gradient(torch.zeros_like(learner.parameters.theta))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(learner.parameters.theta[learner.parameters.mask()], weights(learner.model))


def test_the_virtual_step_has_each_groups_own_rate() -> None:
    def two_groups(named: Any) -> torch.optim.Optimizer:
        named = list(named)
        return torch.optim.SGD([{"params": named[:2], "lr": 0.5}, {"params": named[2:], "lr": 0.0}])

    _, method, drawn, gradient = prepared(None, two_groups)
    mixed = method.scores(method._source(drawn), gradient, drawn)
    method.lr = 0.5
    first = gradient.clone()
    first[method.parameters.slices["head.weight"].start :] = 0
    assert torch.allclose(mixed, method.scores(method._source(drawn), first, drawn), atol=1e-6)
    assert not torch.allclose(mixed, method.scores(method._source(drawn), gradient, drawn), atol=1e-3)


def test_there_is_one_update_and_it_sums_both_gradients_before_any_penalty() -> None:
    """With EWC beside it, the virtual step and the observed gradient are those of the loss alone."""
    stream = toy_stream("class")
    watcher = Watcher()
    method = MIR(capacity=40, candidates=40, batch_size=40)
    ewc = EWC(strength=3.0)
    learner = perdure.Learner(toy_model(), sgd, [method, ewc, watcher], scenario="class")
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    x, y = batches(stream, 1)[0]
    for _ in range(3):
        old = method.buffer.view("x").clone(), method.buffer.view("y").clone()
        learner.step(x, y, first_pass=False)
        step = watcher.steps[-1]
        after = learner.parameters.theta.clone()
        learner.parameters.theta.copy_(step["before"])
        raw = gradient_of(F.cross_entropy(learner.model(x), y), learner.model)
        replayed = gradient_of(F.cross_entropy(learner.model(old[0]), old[1]), learner.model)
        penalty = torch.zeros_like(learner.parameters.theta)
        ewc.add_gradient(penalty)
        learner.parameters.theta.copy_(after)
        assert torch.allclose(values(learner.parameters, step["raw"]), raw, atol=1e-6)
        total = raw + replayed + values(learner.parameters, penalty)
        assert torch.allclose(values(learner.parameters, step["final"]), total, atol=1e-5)
        assert torch.allclose(step["after"] - step["before"], -0.1 * step["final"], atol=1e-6)


@pytest.mark.parametrize("off", [{"capacity": 0}, {"batch_size": 0}], ids=str)
def test_switched_off_it_is_fine_tuning(off: dict[str, Any]) -> None:
    stream = toy_stream("class")
    ours, plain = toy_model(norm=True), toy_model(norm=True)
    perdure.Learner(ours, momentum, [MIR(**off)]).fit(stream, batch_size=8)
    perdure.Learner(plain, momentum).fit(stream, batch_size=8)
    assert same_bits(ours, plain)


def test_the_least_loss_of_a_row_never_rises() -> None:
    stream = toy_stream("class")
    method = MIR(capacity=120, candidates=60, batch_size=5, compare_to_old_logits=True)
    learner = perdure.Learner(toy_model(), partial(torch.optim.SGD, lr=0.3), [method], scenario="class")
    learner.fit_task(stream[0], batch_size=8)
    before = method.buffer.view("least").clone()
    learner.fit_task(stream[1], batch_size=8)
    now = method.buffer.view("least")[:40]
    assert bool((now <= before).all())
    assert bool((now < before).any())


def test_in_a_foreign_loop_it_does_the_same() -> None:
    stream = toy_stream("class")
    ours, theirs = toy_model(), toy_model()
    perdure.Learner(ours, sgd, [MIR(capacity=20, candidates=12, batch_size=5)]).fit(stream, batch_size=8)
    optimizer = sgd(theirs.parameters())
    guard = perdure.attach(theirs, optimizer, [MIR(capacity=20, candidates=12, batch_size=5)], scenario="class")
    for task in stream:
        with guard.task(task.name, classes=task.classes):
            for x, y in batches(stream, task.index):
                guard.see(x, y)
                optimizer.zero_grad()
                F.cross_entropy(theirs(x), y).backward()
                optimizer.step()
    assert same_bits(ours, theirs)


def test_a_criterion_that_gives_only_a_mean_is_refused_in_one_sentence() -> None:
    stream = toy_stream("class")
    learner = perdure.Learner(toy_model(), sgd, [MIR(candidates=6, batch_size=2)], criterion=F.cross_entropy)
    with pytest.raises(perdure.errors.UsageError, match="one loss a row is needed"):
        learner.fit(stream, batch_size=8)
