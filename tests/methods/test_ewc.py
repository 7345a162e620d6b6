"""EWC: the penalty it defines, checked against Fisher information from plain loops, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from small_problems import (
    batches,
    gradient_of,
    momentum,
    sgd,
    sgd_step,
    spread,
    toy_model,
    toy_stream,
    values,
    weights,
)
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.data.examples import Examples
from perdure.errors import DivergedError
from perdure.methods import EWC
from perdure.streams.task import Stream, Task

pytestmark = pytest.mark.filterwarnings("ignore:.*alone on a class-incremental")


def fisher_by_loops(model: nn.Module, x: Tensor, columns: Sequence[int] | None = None) -> Tensor:
    """Mean over samples, expectation over the model's own labels, of the squared gradient of log p(y|x)."""
    total = torch.zeros_like(weights(model))
    for row in x:
        logits = model(row[None])[0]
        log_p = F.log_softmax(logits if columns is None else logits[list(columns)], 0)
        for k in range(len(log_p)):
            found = torch.autograd.grad(log_p[k], list(model.parameters()), retain_graph=True, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]
            total += log_p[k].exp().detach() * torch.cat([g.flatten() for g in flat]) ** 2
    return total / len(x)


def inputs(stream: Stream, index: int) -> Tensor:
    return stream.prepare(stream[index].train.gather(torch.arange(len(stream[index].train)))[0])


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_penalty_and_gradient_equal_the_explicit_sum_over_tasks(scenario: str) -> None:
    stream = toy_stream(scenario)
    penalty = EWC(strength=4.0, fisher="exact")
    model = toy_model(2 if scenario == "domain" else 6)
    learner = perdure.Learner(model, sgd, [penalty], scenario=scenario)
    kept = []
    for task in stream:
        learner.fit_task(task, batch_size=8, epochs=2)
        columns = task.classes if scenario == "task" else None
        kept.append((fisher_by_loops(model, inputs(stream, task.index), columns), weights(model)))
    noise = torch.randn(len(learner.parameters), generator=torch.Generator().manual_seed(5))
    learner.parameters.theta.add_(spread(learner.parameters, noise))
    theta = weights(model).double().requires_grad_()
    explicit = sum((4.0 / 2 * (f.double() * (theta - a.double()) ** 2).sum() for f, a in kept), torch.zeros(()))
    (expected,) = torch.autograd.grad(explicit, theta)
    assert penalty.penalty() == pytest.approx(float(explicit.detach()), rel=1e-4)
    vector = torch.zeros_like(learner.parameters.theta)
    penalty.add_gradient(vector)
    gradient = values(learner.parameters, vector)
    assert torch.allclose(gradient.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_training_equals_a_hand_written_loop(mode: str) -> None:
    stream = toy_stream("domain")
    ours, theirs = toy_model(2), toy_model(2)
    perdure.Learner(ours, sgd, [EWC(strength=3.0, fisher="exact", mode=mode, gamma=0.5)]).fit(
        stream, epochs=2, batch_size=8
    )
    terms: list[tuple[Tensor, Tensor]] = []
    for task in stream:
        for x, y in batches(stream, task.index, epochs=2):
            loss = F.cross_entropy(theirs(x), y)
            flat = torch.cat([p.flatten() for p in theirs.parameters()])
            for importance, anchor in terms:
                loss = loss + 3.0 / 2 * (importance * (flat - anchor) ** 2).sum()
            sgd_step(theirs, gradient_of(loss, theirs))
        fisher = fisher_by_loops(theirs, inputs(stream, task.index))
        if mode == "online" and terms:
            fisher = fisher + 0.5 * terms.pop()[0]
        else:
            terms = [(0.5 * importance, anchor) for importance, anchor in terms]
        terms.append((fisher, weights(theirs)))
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_online_importance_decays_and_its_anchor_is_the_last_task(gamma: float) -> None:
    stream = toy_stream("domain")
    penalty = EWC(strength=0.1, mode="online", gamma=gamma, fisher="exact")
    model = toy_model(2)
    learner = perdure.Learner(model, sgd, [penalty])
    expected = torch.zeros(len(learner.parameters))
    for task in stream:
        learner.fit_task(task, batch_size=8)
        expected = gamma * expected + fisher_by_loops(model, inputs(stream, task.index))
        assert torch.allclose(values(learner.parameters, penalty.importance), expected, rtol=1e-4, atol=1e-8)
        assert torch.equal(penalty.anchor, learner.parameters.theta)
        assert penalty.penalty() == 0.0


def test_decay_in_separate_mode_keeps_every_anchor_and_the_value_of_the_explicit_sum() -> None:
    stream = toy_stream("domain")
    penalty = EWC(strength=2.0, gamma=0.5, fisher="exact")
    model = toy_model(2)
    learner = perdure.Learner(model, sgd, [penalty])
    kept: list[tuple[Tensor, Tensor]] = []
    for task in stream:
        learner.fit_task(task, batch_size=8)
        kept = [(0.5 * f, a) for f, a in kept]
        kept.append((fisher_by_loops(model, inputs(stream, task.index)), weights(model)))
    learner.parameters.theta.mul_(1.5)
    explicit = sum(float((f.double() * (weights(model).double() - a.double()) ** 2).sum()) for f, a in kept)
    assert penalty.penalty() == pytest.approx(explicit, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalised_importances_of_the_weights_in_scope_reach_one_in_every_type(dtype: torch.dtype) -> None:
    stream = toy_stream("domain")
    penalty = EWC(strength=0.1, normalise=True, exclude="head")
    learner = perdure.Learner(toy_model(2).to(dtype), sgd, [penalty])
    learner.fit_task(stream[0], batch_size=8)
    assert float(penalty.importance.max()) == 1.0
    assert not learner.parameters.views(penalty.importance)["head.weight"].any()


def test_consolidating_leaves_no_trace() -> None:
    stream = toy_stream("domain")
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.ReLU(), nn.Linear(7, 2))
    model.append(nn.Dropout(0.1).eval())
    penalty = EWC(strength=1.0)
    learner = perdure.Learner(model, momentum, [penalty])
    learner.begin_task(stream[0])
    for x, y in batches(stream, 0):
        learner.step(x, y)
    gradients = [p.grad.clone() for p in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [s["momentum_buffer"].clone() for s in learner.optimizers.all[0].state.values()]
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    penalty.end_task(stream[0])
    assert penalty.importance.sum() > 0
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    now = [s["momentum_buffer"] for s in learner.optimizers.all[0].state.values()]
    assert all(torch.equal(a, b) for a, b in zip(now, moments, strict=True))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("estimator", ["rademacher", "exact", "sample", "empirical", "predicted"])
def test_fisher_does_not_depend_on_the_batch_size(estimator: str) -> None:
    stream = toy_stream("class")
    penalty = EWC(fisher=estimator)
    learner = perdure.Learner(toy_model(), sgd, [penalty])
    learner.begin_task(stream[0])
    start = penalty.generator.get_state()
    found = []
    for size in (1, 7, 40, 256):
        penalty.generator.set_state(start)
        found.append(penalty.estimate(learner.task_batches(stream[0], size)))
    assert found[0].sum() > 0
    assert all(torch.allclose(f, found[0], rtol=1e-4, atol=1e-9) for f in found[1:])


def one_hot_task(size: int) -> Task:
    """Sample i alone feeds input i, so the first layer's Fisher tells which samples were used."""
    return Task(0, "unit", Examples(torch.eye(size), (torch.arange(size) >= size // 2).long()), None, (0, 1))


@pytest.mark.parametrize("samples", [1, 10, 39, 40, 1000])
def test_exactly_so_many_different_samples_are_used(samples: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 2)
    penalty = EWC(strength=0.01, n_samples=samples, fisher="empirical")
    learner = perdure.Learner(model, sgd, [penalty])
    learner.fit_task(one_hot_task(40), batch_size=8)
    task = one_hot_task(40)
    fisher = penalty.importance[:80].view(2, 40)
    used = fisher.sum(0) > 0
    count = min(samples, 40)
    assert int(used.sum()) == count
    p = model(task.train.x).softmax(1).detach()
    expected = (p - F.one_hot(task.train.targets, 2)).square().T / count
    assert torch.allclose(fisher[:, used], expected[:, used], rtol=1e-4)


def test_samples_of_sorted_data_come_from_all_of_it() -> None:
    """The first rows of data that are sorted by class would say nothing about the second class."""
    penalty = EWC(strength=0.01, n_samples=20)
    learner = perdure.Learner(nn.Linear(40, 2), sgd, [penalty])
    learner.fit_task(one_hot_task(40), batch_size=8)
    used = penalty.importance[:80].view(2, 40).sum(0) > 0
    assert 5 <= int(used[20:].sum()) <= 15


def test_samples_of_a_loader_are_the_first_it_gives() -> None:
    x, y = torch.eye(40), torch.arange(40) % 2
    penalty = EWC(strength=0.01, n_samples=10)
    learner = perdure.Learner(nn.Linear(40, 2), sgd, [penalty])
    learner.begin_task("loader", [(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)])
    learner.step(x, y)
    learner.end_task()
    used = penalty.importance[:80].view(2, 40).sum(0) > 0
    assert used.tolist() == [True] * 10 + [False] * 30


def test_normalised_importances_of_a_task_reach_one() -> None:
    stream = toy_stream("domain")
    penalty = EWC(strength=0.1, normalise=True, mode="online", gamma=0.0)
    learner = perdure.Learner(toy_model(2), sgd, [penalty])
    for task in stream:
        learner.fit_task(task, batch_size=8)
        assert float(penalty.importance.max()) == pytest.approx(1.0)


@pytest.mark.parametrize("head", [None, "multi"])
def test_a_known_task_says_nothing_about_other_tasks_columns(head: str | None) -> None:
    stream = toy_stream("task")
    penalty = EWC(strength=0.1, mode="online", gamma=0.0)
    learner = perdure.Learner(toy_model(head=head), sgd, [penalty], scenario="task")
    for task in stream:
        learner.fit_task(task, batch_size=8)
        views = learner.parameters.views(penalty.importance)
        for other in stream[: task.index + 1]:
            if head is None:
                part = views["head.weight"][list(other.classes)]
            else:
                part = views[f"head.heads.task_{other.index}.weight"]
            assert bool(part.any()) == (other.index == task.index)


def test_a_diverged_network_is_an_error_and_not_an_importance() -> None:
    stream = toy_stream("domain")
    learner = perdure.Learner(toy_model(2), partial(torch.optim.SGD, lr=1e30), [EWC()])
    with pytest.raises(DivergedError, match="not finite"):
        learner.fit_task(stream[0], batch_size=8)
