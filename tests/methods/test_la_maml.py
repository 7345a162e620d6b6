"""La-MAML against autograd through the whole look-ahead, and against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from small_problems import batches, gradient_of, masked_cross_entropy, same_bits, sgd, toy_model, toy_stream, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import perdure
from perdure.memory.buffer import Buffer
from perdure.methods import LaMAML, Method
from perdure.models.heads import GrowingHead
from perdure.seeding import derive, generator

pytestmark = pytest.mark.filterwarnings("ignore:.*passes every example:perdure.errors.PerdureWarning")

descend = partial(torch.optim.SGD, lr=1.0)
Tensors = dict[str, Tensor]
Loss = Callable[[Tensors], Tensor]


def looked_ahead(theta: Tensors, rates: Tensors, pieces: list[Loss], every: Loss, constant: bool) -> Tensor:
    """The mean loss over the looks-ahead, as its definition reads; `constant`: without the chunks' own derivatives."""
    fast, losses = dict(theta), []
    for loss in pieces:
        found = torch.autograd.grad(loss(fast), list(fast.values()), create_graph=not constant)
        fast = {
            name: w - rates[name].relu() * (g.detach() if constant else g)
            for (name, w), g in zip(fast.items(), found, strict=True)
        }
        losses.append(every(fast))
    return torch.stack(losses).mean()


class Problem:
    """A learner in its second task, with two rows in memory that a step draws both, and one batch to learn."""

    def __init__(self, method: LaMAML, scenario: str = "class", dtype: torch.dtype = torch.float32) -> None:
        stream = toy_stream(scenario)
        self.model = toy_model(2 if scenario == "domain" else 6).to(dtype)
        self.learner = perdure.Learner(self.model, descend, [method], scenario=scenario)
        self.method = method
        self.learner.begin_task(stream[0])
        method.buffer = Buffer(2, seed=1)
        x, y = batches(stream, 0)[0]
        method.buffer.add({"x": x[:2], "y": y[:2], "task": 0})
        self.old = x[:2].to(dtype), y[:2]
        self.learner.end_task()
        self.learner.begin_task(stream[1])
        self.x, self.y = batches(stream, 1)[0]
        draw = torch.Generator().manual_seed(5)
        spread = torch.rand(method.rates.shape, generator=draw).to(dtype) * 0.4 - 0.1
        method.rates = torch.where(self.learner.parameters.mask(), spread, 0)
        self.classes = [t.classes for t in stream]
        self.scenario = scenario

    def named(self, vector: Tensor) -> Tensors:
        return {n: v.clone().requires_grad_() for n, v in self.learner.parameters.views(vector).items()}

    def loss(self, x: Tensor, y: Tensor, tasks: list[int]) -> Loss:
        columns = [self.classes[t] for t in tasks]
        width = range(2 if self.scenario == "domain" else 6)

        def value(tensors: Tensors) -> Tensor:
            logits = functional_call(self.model, tensors, (x.to(next(iter(tensors.values())).dtype),))
            return masked_cross_entropy(logits, y, columns if self.scenario == "task" else [width] * len(y))

        return value

    def parts(self, count: int) -> tuple[list[Loss], Loss]:
        """The losses of the chunks, in the order in which the method's own generator cuts them, and of all rows."""
        order = torch.randperm(len(self.y), generator=generator(0, "method", "la_maml"))
        size = len(self.y) // count
        pieces = [self.loss(self.x[rows], self.y[rows], [1] * size) for rows in order.split(size)]
        every = self.loss(
            torch.cat([self.x.to(self.old[0].dtype), self.old[0]]),
            torch.cat([self.y, self.old[1]]),
            [1] * len(self.y) + [0, 0],
        )
        return pieces, every

    def step(self) -> tuple[Tensor, Tensor]:
        """How far one step moved theta [P] and the rates [P]."""
        theta, rates = self.learner.parameters.theta.clone(), self.method.rates.clone()
        self.learner.step(self.x, self.y)
        return theta - self.learner.parameters.theta, rates - self.method.rates


def gradients(problem: Problem, count: int, constant: bool) -> tuple[Tensor, Tensor]:
    """dL/dtheta and dL/drates [P] by autograd through the whole definition."""
    parameters = problem.learner.parameters
    theta, rates = problem.named(parameters.theta), problem.named(problem.method.rates)
    value = looked_ahead(theta, rates, *problem.parts(count), constant)
    found = torch.autograd.grad(value, [*theta.values(), *rates.values()])
    by_theta, by_rates = found[: len(theta)], found[len(theta) :]
    return parameters.pack(dict(zip(theta, by_theta, strict=True))), parameters.pack(
        dict(zip(rates, by_rates, strict=True))
    )


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_both_gradients_are_those_of_autograd(order: str, count: int, scenario: str) -> None:
    method = LaMAML(batch_size=2, chunks=count, glances=1, opt_lr=0.3, order=order, update="sync", clip=None)
    problem = Problem(method, scenario, torch.float64)
    by_theta, by_rates = gradients(problem, count, constant=order == "first")
    moved, learned = problem.step()
    assert by_theta.norm() > 0.1
    assert by_rates.norm() > 0.01
    assert torch.allclose(moved, by_theta, atol=1e-12)
    assert torch.allclose(learned, 0.3 * by_rates, atol=1e-12)


def test_one_chunk_to_first_order_is_the_gradient_at_the_fast_weights() -> None:
    problem = Problem(LaMAML(batch_size=2, chunks=1, glances=1, update="sync", clip=None))
    model = problem.model
    (piece,), every = problem.parts(1)
    theta = dict(model.named_parameters())
    found = torch.autograd.grad(piece(theta), list(theta.values()))
    rates = problem.learner.parameters.views(problem.method.rates)
    fast = {
        name: (w - rates[name].clamp_min(0) * g).detach().requires_grad_()
        for (name, w), g in zip(theta.items(), found, strict=True)
    }
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(every(fast), list(fast.values()))])
    here = gradient_of(every(theta), model)
    moved = problem.step()[0][problem.learner.parameters.mask()]
    assert torch.allclose(moved, expected, atol=1e-6)
    assert not torch.allclose(moved, here, atol=1e-2)


@pytest.mark.parametrize("order", ["first", "second"])
def test_the_second_order_is_that_of_finite_differences_and_the_first_is_not(order: str) -> None:
    """Of the loss along random directions, in weights and in rates."""
    method = LaMAML(batch_size=2, chunks=2, glances=1, opt_lr=1.0, order=order, update="sync", clip=None)
    problem = Problem(method, dtype=torch.float64)
    pieces, every = problem.parts(2)
    parameters, rates = problem.learner.parameters, method.rates.clone()
    theta, real = parameters.theta.clone(), parameters.mask()

    def value(at: Tensor, with_rates: Tensor) -> float:
        loss = looked_ahead(problem.named(at), problem.named(with_rates), pieces, every, constant=True)
        return float(loss.detach())

    moved, learned = problem.step()
    draw, wrong = torch.Generator().manual_seed(0), 0
    for _ in range(6):
        direction = torch.randn(theta.shape, generator=draw, dtype=torch.float64) * real
        # ReLU bends where a rate is 0 and where a unit switches: a short step crosses neither here.
        h = 1e-6
        slope = (value(theta + h * direction, rates) - value(theta - h * direction, rates)) / (2 * h)
        wrong += abs(slope - float(direction @ moved)) > 1e-5 * max(1.0, abs(slope))
        slope = (value(theta, rates + h * direction) - value(theta, rates - h * direction)) / (2 * h)
        wrong += abs(slope - float(direction @ learned)) > 1e-5 * max(1.0, abs(slope))
    assert wrong == 0 if order == "second" else wrong > 8


def test_rates_are_learned_first_and_then_make_the_step() -> None:
    problem = Problem(LaMAML(batch_size=2, chunks=2, glances=1, opt_lr=0.3, clip=None))
    by_theta, by_rates = gradients(problem, 2, constant=True)
    rates = problem.method.rates - 0.3 * by_rates
    moved, _ = problem.step()
    assert torch.allclose(problem.method.rates, rates, atol=1e-6)
    assert torch.allclose(moved, rates.clamp_min(0) * by_theta, atol=1e-6)
    frozen = (rates <= 0) & (by_theta != 0)
    assert frozen.any()
    assert not moved[frozen].any()


def test_rates_of_zero_freeze_everything() -> None:
    stream = toy_stream("class")
    model, method = toy_model(), LaMAML(alpha=0.0, batch_size=4, chunks=2)
    perdure.Learner(model, descend, [method]).fit(stream, batch_size=8)
    assert same_bits(model, toy_model())
    assert not method.rates.any()


def test_c_maml_keeps_its_rates_and_steps_with_the_optimizer() -> None:
    method = LaMAML(alpha=0.2, opt_lr=0.0, update="sync", batch_size=4, chunks=2, glances=1)
    stream = toy_stream("class")
    learner = perdure.Learner(toy_model(), sgd, [method])
    learner.fit(stream, batch_size=8)
    real = learner.parameters.mask()
    assert bool((method.rates[real] == 0.2).all())
    assert not method.rates[~real].any()
    assert not same_bits(learner.model, toy_model())


def test_every_glance_cuts_and_draws_anew_and_equals_a_step_of_its_own() -> None:
    stream = toy_stream("class")
    x, y = batches(stream, 0)[0]
    thetas = []
    for glances, steps in ((3, 1), (1, 3)):
        learner = perdure.Learner(toy_model(), sgd, [LaMAML(batch_size=4, chunks=2, glances=glances)])
        for number in range(steps):
            learner.step(x, y, first_pass=steps == 1 or number == steps - 1)
        thetas.append(learner.parameters.theta.clone())
    assert torch.equal(*thetas)


def test_gradients_are_clipped_by_their_norms() -> None:
    for scale in (1e-3, 1e3):
        problem = Problem(LaMAML(batch_size=2, chunks=2, glances=1, opt_lr=0.3, update="sync", clip=scale))
        by_theta, by_rates = gradients(problem, 2, constant=True)
        moved, learned = problem.step()
        for found, wanted in ((moved, by_theta), (learned, 0.3 * by_rates)):
            factor = 0.3 if wanted is not by_theta else 1.0
            longest = min(factor * scale, float(wanted.norm()))
            assert float(found.norm()) == pytest.approx(longest, rel=2e-3)
            assert float(F.cosine_similarity(found, wanted, dim=0)) > 0.999


def test_only_rows_of_other_tasks_are_replayed_if_asked_for() -> None:
    stream = toy_stream("task")
    method = LaMAML(capacity=30, batch_size=30, chunks=1, glances=1, old_tasks=True)
    learner = perdure.Learner(toy_model(), sgd, [method], scenario="task")
    seen: list[set[int]] = []
    whole = learner.forward.batch

    def watched(batch: perdure.batch.Batch, *rest: object) -> Tensor:
        replayed = batch.find("replay")
        seen[-1] |= set() if replayed is None else set(replayed.tasks.tolist())
        return whole(batch, *rest)

    learner.forward.batch = watched
    for task in stream:
        seen.append(set())
        learner.fit_task(task, batch_size=8)
    assert seen == [set(), {0}, {0, 1}]
    assert set(method.buffer.view("task").tolist()) == {0, 1, 2}
    nameless = perdure.Learner(toy_model(), sgd, [LaMAML(old_tasks=True)])
    with pytest.raises(perdure.errors.UsageError, match="begin_task"):
        nameless.step(torch.randn(4, 5), torch.arange(4))


@pytest.mark.parametrize("order", ["first", "second"])
def test_running_statistics_are_those_of_old_and_new_rows_at_the_weights_that_are_kept(order: str) -> None:
    stream = toy_stream("class")
    model = toy_model(norm=True)
    method = LaMAML(batch_size=4, chunks=8, glances=3, order=order)
    learner = perdure.Learner(model, sgd, [method])
    learner.begin_task(stream[0])
    norm, (first, second) = model.body[1], batches(stream, 0)[:2]
    learner.step(*first)
    method.buffer.resize(0)
    method.buffer.resize(4)
    old = first[0][:4]
    method.buffer.add({"x": old, "y": first[1][:4], "task": 0})
    mean, count, before = norm.running_mean.clone(), int(norm.num_batches_tracked), weights(model)
    rows = learner.passes["forward_rows"]
    learner.step(*second)
    assert not torch.equal(weights(model), before)
    hidden = model.body[0](torch.cat([second[0], old])).detach()
    assert torch.allclose(norm.running_mean, 0.9 * mean + 0.1 * hidden.mean(0), atol=1e-6)
    assert int(norm.num_batches_tracked) == count + 1 == 2
    assert norm.track_running_stats
    # Eight rows make four chunks: two rows at least can be normalised by themselves.
    assert learner.passes["forward_rows"] - rows == 3 * (8 + 4 * 12) + 12


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_what_dropout_draws_does_not_depend_on_the_pass_for_statistics(precision: str) -> None:
    """Statistics are read by no pass of training, so weights are those of a model that keeps none."""
    found = []
    for tracking in (True, False):
        model = toy_model()
        model.body.insert(1, nn.BatchNorm1d(7, track_running_stats=tracking))
        model.body.append(nn.Dropout(0.5))
        torch.manual_seed(3)
        learner = perdure.Learner(model, sgd, [LaMAML(batch_size=4, chunks=2, glances=2)], precision=precision)
        learner.fit_task(toy_stream("class")[0], batch_size=8)
        found.append(learner.parameters.theta)
    assert torch.equal(*found)


def test_heads_of_other_tasks_keep_their_bits_and_their_rates() -> None:
    stream = toy_stream("task")
    model = toy_model(head="multi")
    method = LaMAML(capacity=40, batch_size=2, chunks=2, glances=1, update="sync", old_tasks=True)
    optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    learner = perdure.Learner(model, optimizer, [method], scenario="task")
    learner.fit_task(stream[0], batch_size=8)
    old = {n: p.detach().clone() for n, p in model.head.heads["task_0"].named_parameters()}
    method.buffer.resize(0)
    learner.begin_task(stream[1])
    method.buffer.resize(40)
    views = learner.parameters.views(method.rates)
    rates = views["head.heads.task_0.weight"].clone()
    assert bool((views["head.heads.task_1.weight"] == 0.15).all())
    assert not bool((rates == 0.15).all())
    learner.step(*batches(stream, 1)[0])
    assert all(torch.equal(p, old[n]) for n, p in model.head.heads["task_0"].named_parameters())
    assert torch.equal(learner.parameters.views(method.rates)["head.heads.task_0.weight"], rates)
    assert not bool((learner.parameters.views(method.rates)["head.heads.task_1.weight"] == 0.15).all())


def test_rates_survive_growth_and_a_resume() -> None:
    model = toy_model(head="growing")
    method = LaMAML(batch_size=4, chunks=2)
    stream = toy_stream("class")
    learner = perdure.Learner(model, sgd, [method], scenario="class")
    learner.fit_task(stream[0], batch_size=8)
    before = {name: view.clone() for name, view in learner.parameters.views(method.rates).items()}
    learner.begin_task(stream[1])
    after = learner.parameters.views(method.rates)
    assert torch.equal(after["head.weight"][:2], before["head.weight"])
    assert bool((after["head.weight"][2:] == 0.15).all())
    assert after["head.weight"].shape[0] == 4
    assert not bool((before["head.weight"] == 0.15).all())
    assert not method.rates[~learner.parameters.mask()].any()


def test_it_resumes_with_its_rates(tmp_path: object) -> None:
    stream = toy_stream("class")

    def fresh() -> tuple[nn.Module, Method]:
        return toy_model(head="growing"), LaMAML(capacity=20, batch_size=4, chunks=2, glances=2)

    model, method = fresh()
    learner = perdure.Learner(model, sgd, [method], scenario="class")
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    rows = batches(stream, 1)
    learner.step(*rows[0])
    learner.save(f"{tmp_path}/saved")
    other_model, other_method = fresh()
    assert isinstance(other_model.head, GrowingHead)
    other = perdure.Learner.load(f"{tmp_path}/saved", other_model, methods=[other_method], optimizer=sgd)
    for each in (learner, other):
        for x, y in rows[1:]:
            each.step(x, y)
    assert torch.equal(other_method.rates, method.rates)
    assert torch.equal(weights(other_model), weights(model))


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_mixed_precision_agrees_with_float32(order: str, precision: str) -> None:
    found = []
    x, y = batches(toy_stream("class"), 0)[0]
    for each in ("float32", precision):
        method = LaMAML(batch_size=4, chunks=2, glances=2, order=order)
        learner = perdure.Learner(toy_model(), sgd, [method], precision=each)
        for _ in range(3):
            learner.step(x, y)
        found.append((weights(learner.model), method.rates))
    assert torch.allclose(found[0][0], found[1][0], atol=0.05)
    assert torch.allclose(found[0][1], found[1][1], atol=0.05)
    assert (found[0][0] - weights(toy_model())).abs().max() > 0.1


def test_the_buffer_is_a_sample_of_the_stream_drawn_by_its_own_generator() -> None:
    stream = toy_stream("class")
    method = LaMAML(capacity=15, batch_size=4, chunks=2, glances=1)
    perdure.Learner(toy_model(), sgd, [method]).fit(stream, batch_size=8, epochs=2)
    plain = Buffer(15, seed=derive(0, "buffer", "la_maml"))
    for task in stream:
        for x, y in batches(stream, task.index):
            plain.add({"x": x, "y": y, "task": task.index})
    assert torch.equal(method.buffer.view("x"), plain.view("x"))
