"""VCL: the posterior of a linear regression, the divergence's gradient, prediction, and what coresets may not do."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from small_problems import batches, momentum, sgd, toy_model, toy_stream
from torch import nn

import perdure
from perdure.data.examples import Examples
from perdure.errors import IncompatibleError, ModelError, UsageError
from perdure.methods import EWC, VCL
from perdure.methods.vcl import choose
from perdure.models import mean_field
from perdure.models.bayesian import gaussian_kl, mean_field_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*alone on a class-incremental")


def bayesian(outputs: int = 6, log_variance: float = -3.0, **options: Any) -> nn.Module:
    return mean_field(toy_model(outputs, **options), log_variance)


def test_the_posterior_of_a_linear_regression_is_recovered_task_by_task() -> None:
    """Every row has one input, so the exact posterior has independent weights: each task adds its precision."""
    draw = torch.Generator().manual_seed(0)
    sigma, prior, features, rows = 0.5, 2.0, 3, 240
    truth = torch.tensor([1.0, -2.0, 0.5])
    precision, weighted = torch.full((features,), 1 / prior), torch.zeros(features)
    model = mean_field(nn.Linear(features, 1, bias=False), log_variance=-3.0)
    method = VCL(prior_variance=prior)
    learner = perdure.Learner(
        model,
        partial(torch.optim.Adam, lr=0.1),
        [method],
        criterion=lambda outputs, y: 0.5 * ((outputs - y) / sigma).square().sum(1),
    )
    for task in range(2):
        x = torch.eye(features)[torch.arange(rows) % features] * torch.tensor([1.0, 0.3, 0.1])
        y = x @ truth[:, None] + sigma * torch.randn(rows, 1, generator=draw)
        precision += x.square().sum(0) / sigma**2
        weighted += (x * y).sum(0) / sigma**2
        learner.begin_task(f"t{task}", (x, y))
        for step in range(900):
            for group in learner.optimizers.groups():
                group["lr"] = 0.1 * 0.004 ** (step / 900)
            learner.step(x, y)
        learner.end_task()
        mean, deviation = weighted / precision, precision.rsqrt()
        assert bool(((model.mean[0] - mean).abs() < 0.15 * deviation).all())
        assert torch.allclose((0.5 * model.log_variance[0]).exp(), deviation, rtol=0.06)
    assert float(deviation.max()) < 1.0 < prior


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_added_is_autograds_of_the_divergence_over_the_tasks_rows(dtype: torch.dtype) -> None:
    stream = toy_stream("domain")
    model = bayesian(2, norm=True).to(dtype)
    method = VCL(strength=0.7, prior_variance=0.3)
    learner = perdure.Learner(model, partial(torch.optim.SGD, lr=0.01), [method])
    learner.begin_task(stream[0])
    for later in (False, True):
        if later:
            learner.end_task()
            assert method.divergence() == 0.0
            learner.begin_task(stream[1])
        for x, y in batches(stream, 0):
            learner.step(x, y)
        old = learner.parameters.views(method.prior)
        terms = []
        for name, layer in mean_field_layers(model).items():
            for mean, spread in layer.gaussians():
                prior = old[f"{name}.{mean}"], old[f"{name}.{spread}"]
                if not later:
                    assert not prior[0].any()
                    assert torch.allclose(prior[1].exp(), torch.full_like(prior[1], 0.3))
                terms.append(gaussian_kl(getattr(layer, mean), getattr(layer, spread), *prior))
        divergence = torch.stack(terms).sum()
        assert method.divergence() == pytest.approx(float(divergence.detach()), rel=1e-4)
        expected = learner.parameters.gradient(0.7 * divergence / 40)
        gradient = torch.zeros_like(learner.parameters.theta)
        method.add_gradient(gradient)
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-7)
        assert expected.abs().max() > 1e-4


def test_the_prior_of_a_task_is_the_posterior_of_the_one_before() -> None:
    stream = toy_stream("domain")
    method = VCL()
    learner = perdure.Learner(bayesian(2), sgd, [method])
    for task in stream:
        learner.fit_task(task, batch_size=8)
        assert torch.equal(method.prior, learner.parameters.theta)


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_prediction_is_the_mean_of_softmax_over_drawn_networks_whatever_the_batches(scenario: str) -> None:
    stream = toy_stream(scenario)
    method = VCL(samples=7)
    model = bayesian(2 if scenario == "domain" else 6, log_variance=-1.0)
    learner = perdure.Learner(model, sgd, [method], scenario=scenario)
    for index in range(2):
        learner.fit_task(stream[index], batch_size=8)
    x = torch.cat([stream[i].test.x for i in range(2)])
    before = {name: layer.draws for name, layer in mean_field_layers(model).items()}
    for task in (None, 1):
        columns = list(learner.classes.seen if task is None else stream[task].classes)
        together = method.probabilities(x, task)
        alone = torch.cat([method.probabilities(row[None], task) for row in x])
        assert torch.allclose(together, alone, atol=1e-6)
        assert torch.allclose(together.sum(1), torch.ones(len(x)))
        outside = [c for c in range(together.shape[1]) if c not in columns]
        assert not together[:, outside].any()
        chosen = torch.tensor(columns)[together[:, columns].argmax(1)]
        assert torch.equal(learner.predict(x, task), chosen)
    assert model.training
    assert {name: layer.draws for name, layer in mean_field_layers(model).items()} == before
    mean = learner.outputs(x)[:, list(learner.classes.seen)].softmax(1)
    assert float((method.probabilities(x)[:, list(learner.classes.seen)] - mean).abs().max()) > 1e-2


def test_many_drawn_networks_average_to_the_predictive_distribution_of_a_single_layer() -> None:
    model = mean_field(nn.Linear(1, 2, bias=False), log_variance=0.0)
    method = VCL(samples=4000)
    learner = perdure.Learner(model, sgd, [method], scenario="domain")
    x = torch.tensor([[1.0], [3.0]])
    learner.begin_task("t", (x, torch.arange(2)), classes=(0, 1))
    with torch.no_grad():
        model.mean.copy_(torch.tensor([[1.0], [-0.5]]))
    noise = torch.randn(200000, generator=torch.Generator().manual_seed(0))
    for row, found in zip(x, method.probabilities(x), strict=True):
        # The difference of the two logits is Gaussian: mean 1.5 x, variance 2 x^2.
        expected = (1.5 * row + 2**0.5 * row * noise).sigmoid().mean()
        assert float(found[0]) == pytest.approx(float(expected), abs=0.02)


def core(samples: int = 3, **options: Any) -> tuple[perdure.Learner, VCL]:
    method = VCL(samples=samples, coreset=6, coreset_steps=20, coreset_lr=0.05, **options)
    return perdure.Learner(bayesian(norm=True), momentum, [method], scenario="class"), method


@pytest.mark.parametrize("selection", ["random", "k_center"])
def test_a_coreset_is_left_out_of_training_and_complete_with_what_is_left(selection: str) -> None:
    stream = toy_stream("class")
    learner, method = core(selection=selection)
    for task in stream[:2]:
        learner.begin_task(task)
        assert learner.task is not None
        rows = torch.arange(len(learner.task.train))
        left, _ = learner.task.train.gather(rows)
        kept = method.coresets[str(task.index)]
        assert (len(left), len(kept["x"]), method.rows) == (34, 6, 34)
        whole = {tuple(row) for row in task.train.x.tolist()}
        assert {tuple(row) for row in torch.cat([left, kept["x"]]).tolist()} == whole
        assert len(whole) == 40
        learner.step(*learner.task.train.gather(rows[:8]))
        learner.end_task()


def test_refining_leaves_no_trace_and_serves_prediction_until_training_goes_on() -> None:
    stream = toy_stream("class")
    learner, method = core()
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    assert learner.task is not None
    for x, y, _ in learner.task.train.ordered(8):
        learner.step(x, y)
    model, theta = learner.model, learner.parameters.theta.clone()
    buffers = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    moments = [s["momentum_buffer"].clone() for s in learner.optimizers.all[0].state.values()]
    learner.end_task()
    assert torch.equal(learner.parameters.theta, theta)
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    now = [s["momentum_buffer"] for s in learner.optimizers.all[0].state.values()]
    assert all(torch.equal(a, b) for a, b in zip(now, moments, strict=True))
    assert torch.equal(method.prior, theta), "the next task's prior has not seen the coreset"
    assert method.refined is not None

    def score() -> float:
        kept = method.coresets.values()
        return sum(float(method.probabilities(k["x"])[range(6), k["y"]].log().mean()) for k in kept)

    refined = score()
    learner.begin_task(stream[2])
    assert method.refined is None
    learner.classes._all = [0, 1, 2, 3]
    assert refined > score() + 0.01, "prediction used the copy, which fits the coresets better"


def test_k_center_takes_a_row_of_every_cluster_and_none_twice() -> None:
    x = torch.tensor([0.0, 50.0, 100.0]).repeat_interleave(torch.tensor([90, 5, 5]))[:, None]
    data = Examples(x, torch.zeros(100, dtype=torch.int64))
    for seed in range(5):
        rows = choose(data, 3, "k_center", torch.Generator().manual_seed(seed))
        assert sorted(x[rows, 0].tolist()) == [0.0, 50.0, 100.0]
        assert len(set(choose(data, 20, "k_center", torch.Generator().manual_seed(seed)).tolist())) == 20


def test_switched_off_it_neither_trains_nor_predicts() -> None:
    stream = toy_stream("domain")
    models = bayesian(2), bayesian(2)
    for model, methods in zip(models, ([VCL(strength=0, coreset=5)], []), strict=True):
        learner = perdure.Learner(model, sgd, methods)
        learner.fit_task(stream[0], batch_size=8)
        assert not learner.hooks["predict"]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_refusals() -> None:
    with pytest.raises(ModelError, match="use the model 'bayesian_mlp'"):
        perdure.Learner(toy_model(), sgd, [VCL()])
    with pytest.raises(IncompatibleError, match="'vcl' and 'ewc'"):
        perdure.Learner(bayesian(), sgd, [VCL(), EWC()])
    with pytest.raises(UsageError, match="prior_variance is 0"):
        VCL(prior_variance=0)
    learner = perdure.Learner(bayesian(), sgd, [VCL(coreset=40)], scenario="class")
    with pytest.raises(UsageError, match="has only 40 rows"):
        learner.begin_task(toy_stream("class")[0])
