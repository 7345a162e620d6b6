"""SPG: what importance is, what it does to a step, and that the head follows the features."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from small_problems import FEATURES, batches, toy_model, toy_stream
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.errors import IncompatibleError, UsageError
from perdure.methods import HAT, SPG, LwF
from perdure.methods.spg import prominence

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}


def learner(method: Any, make: Any = OPTIMIZERS["sgd"], head: str | None = None, **options: Any) -> perdure.Learner:
    made = perdure.Learner(toy_model(head=head, **options), make, [method], scenario="task")
    made.forward.prepare = lambda x: x
    return made


def by_hand(model: nn.Module, x: Tensor, y: Tensor, tasks: int) -> dict[str, Tensor]:
    """max over tau <= t of |tanh((G - mean) / std)|, from the definition, with a backward pass a head."""
    best: dict[str, Tensor] = {}
    for tau in range(tasks):
        model.zero_grad()
        columns = model(x)[:, 2 * tau : 2 * tau + 2]
        (F.cross_entropy(columns, y - 2 * tau) if tau == tasks - 1 else columns.sum()).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            g = p.grad
            gamma = ((g - g.mean()) / g.std(unbiased=True)).tanh().abs() if g.any() else torch.zeros_like(g)
            best[name] = torch.maximum(best.get(name, gamma), gamma)
    model.zero_grad()
    return best


def test_importance_is_the_tanh_of_the_standardised_gradient_and_its_maximum_over_heads_and_tasks() -> None:
    stream, method = toy_stream("task"), SPG()
    model = learner(method)
    total: dict[str, Tensor] = {}
    for task in stream:
        model.fit_task(task, batch_size=8, epochs=2)
        x, y = task.train.gather(torch.arange(len(task.train)))
        now = by_hand(model.model, x, y, task.index + 1)
        total = {name: torch.maximum(total.get(name, a), a) for name, a in now.items()}
        assert method.importance is not None
        found = model.parameters.views(method.importance)
        for name in ("body.0.weight", "body.0.bias"):
            torch.testing.assert_close(found[name], total[name], rtol=1e-4, atol=1e-5)
            assert found[name].max() > 0.5
        assert not found["head.weight"].any()


def test_without_cross_head_importance_old_heads_do_not_count() -> None:
    stream = toy_stream("task")
    with_heads, without = SPG(), SPG(cross_head=False)
    for method in (with_heads, without):
        made = learner(method, partial(torch.optim.SGD, lr=0.0))
        for task in stream[:2]:
            made.fit_task(task, batch_size=8)
    assert with_heads.importance is not None
    assert without.importance is not None
    assert (with_heads.importance >= without.importance).all()
    assert (with_heads.importance > without.importance).any()


@pytest.mark.parametrize("head", [None, "multi"])
def test_importance_does_not_depend_on_how_the_data_is_cut(head: str | None) -> None:
    stream, method = toy_stream("task"), SPG()
    made = learner(method, head=head)
    for task in stream[:2]:
        made.fit_task(task, batch_size=8)
    made.begin_task(stream[2])
    x, y = stream[2].train.gather(torch.arange(40))
    whole = method.estimate(stream[2], [(x, y)])
    cut = method.estimate(stream[2], [(x[:17], y[:17]), (x[17:], y[17:])])
    torch.testing.assert_close(whole, cut, rtol=1e-4, atol=1e-5)


def test_standardised_over_each_tensor_whatever_its_scale_and_shift() -> None:
    g = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    a = prominence(g)
    torch.testing.assert_close(a, ((g - g.mean()) / g.std()).tanh().abs())
    torch.testing.assert_close(prominence(1e-30 * g), a)
    torch.testing.assert_close(prominence(3 * g + 2), a, rtol=1e-4, atol=1e-5)
    assert ((a >= 0) & (a <= 1)).all()
    outlier = torch.zeros(1000)
    outlier[3] = 1
    assert prominence(outlier)[3] == 1, "tanh is 1 beyond nine deviations"


@pytest.mark.parametrize("g", [torch.tensor([3.0]), torch.zeros(4), torch.full((3,), 0.1), torch.zeros(0)])
def test_what_does_not_vary_has_no_importance(g: Tensor) -> None:
    assert prominence(g).tolist() == [0.0] * len(g)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_optimizers_times_one_minus_the_mask_and_zero_where_it_is_one(name: str) -> None:
    """The masked run beside one whose weights are put back to the same place before every step."""
    stream, method = toy_stream("task"), SPG()
    made, free = learner(method, OPTIMIZERS[name]), learner(SPG(strength=0), OPTIMIZERS[name])
    made.fit_task(stream[0], batch_size=8)
    free.fit_task(stream[0], batch_size=8)
    assert torch.equal(made.parameters.theta, free.parameters.theta), "the first task is not masked"
    made.begin_task(stream[1])
    free.begin_task(stream[1])
    draw = torch.Generator().manual_seed(0)
    a = torch.rand(made.parameters.theta.shape, generator=draw) * made.parameters.mask()
    a[::3] = 0
    a[1::3] = made.parameters.mask()[1::3].float()
    method.protection = lambda: a  # type: ignore[method-assign]
    method.forget_mask()
    for x, y in batches(stream, 1):
        before = made.parameters.theta.clone()
        free.parameters.theta.copy_(before)
        free.step(x, y)
        made.step(x, y)
        free_move, move = free.parameters.theta - before, made.parameters.theta - before
        torch.testing.assert_close(move, (1 - a) * free_move, rtol=1e-3, atol=1e-6)
        assert free_move[a == 1].any()
        assert torch.equal(made.parameters.theta[a == 1], before[a == 1])
        assert torch.equal(made.parameters.theta[a == 0], free.parameters.theta[a == 0])


def test_a_frozen_weight_survives_a_step_that_is_not_finite() -> None:
    stream, method = toy_stream("task"), SPG()
    made = learner(method)
    made.fit_task(stream[0], batch_size=8)
    made.begin_task(stream[1])
    a = torch.zeros_like(made.parameters.theta)
    a[: 7 * FEATURES] = 1
    method.protection = lambda: a  # type: ignore[method-assign]
    before = made.parameters.theta.clone()
    made.step(torch.full((4, FEATURES), float("inf")), torch.tensor([2, 3, 2, 3]))
    assert torch.equal(made.parameters.theta[: 7 * FEATURES], before[: 7 * FEATURES])
    assert made.parameters.theta.isnan().any()


def test_the_head_moves_by_one_minus_the_mean_importance_of_the_features_and_old_rows_not_at_all() -> None:
    stream, method = toy_stream("task"), SPG()
    made = learner(method, OPTIMIZERS["adamw"])
    made.fit_task(stream[0], batch_size=8)
    made.begin_task(stream[1])
    a, importance = method.protection(), method.importance
    assert a is not None
    assert importance is not None
    views, own = made.parameters.views(a), made.parameters.views(importance)
    mean = torch.cat([own["body.0.weight"].flatten(), own["body.0.bias"]]).mean()
    torch.testing.assert_close(views["head.weight"][2:], mean.expand(4, 7))
    assert 0 < mean < 1
    assert (views["head.weight"][:2] == 1).all()
    assert (views["head.bias"][:2] == 1).all()
    rows = made.model.head.weight[:2].detach().clone()
    for x, y in batches(stream, 1):
        made.step(x, y)
    assert torch.equal(made.model.head.weight[:2], rows)


def test_importance_never_falls_and_stays_fixed_within_a_task() -> None:
    stream, method = toy_stream("task"), SPG()
    made = learner(method)
    last = torch.zeros_like(made.parameters.theta)
    for task in stream:
        made.begin_task(task)
        for x, y in batches(stream, task.index):
            made.step(x, y)
            assert method.importance is None or torch.equal(method.importance, last)
        made.end_task()
        assert method.importance is not None
        assert (method.importance >= last).all()
        assert (method.importance <= 1).all()
        last = method.importance.clone()


def test_the_gradient_mask_is_the_update_mask_under_plain_sgd_and_refused_elsewhere() -> None:
    stream = toy_stream("task")
    ends = []
    for where in ("update", "gradient"):
        made = learner(SPG(mask_on=where))
        for task in stream:
            made.fit_task(task, batch_size=8)
        ends.append(made.parameters.theta.clone())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)
    for name in ("momentum", "adam", "adamw"):
        with pytest.raises(IncompatibleError, match="mask_on is 'gradient'"):
            learner(SPG(mask_on="gradient"), OPTIMIZERS[name])


def test_batch_norm_has_a_copy_a_task_and_old_ones_stay() -> None:
    stream, method = toy_stream("task"), SPG()
    made = learner(method, OPTIMIZERS["adamw"], norm=True)
    made.fit_task(stream[0], batch_size=8)
    old = {k: v.clone() for k, v in made.model.state_dict().items() if ".task_0." in k}
    assert len(old) == 5
    for task in stream[1:]:
        made.fit_task(task, batch_size=8)
    now = made.model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in old.items())
    assert not torch.equal(now["body.1.norms.task_0.running_mean"], now["body.1.norms.task_2.running_mean"])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_pass_for_importance_leaves_no_trace(mode: str) -> None:
    stream, method = toy_stream("task"), SPG(importance_mode=mode)
    model = toy_model(norm=True)
    model.body.append(nn.Dropout(0.5))
    made = perdure.Learner(model, OPTIMIZERS["momentum"], [method], scenario="task")
    made.begin_task(stream[0])
    for x, y in batches(stream, 0):
        made.step(x, y)
    before, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    made.end_task()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_attached_to_a_foreign_loop_it_ends_with_the_same_bits() -> None:
    stream, ends = toy_stream("task"), []
    made = learner(SPG(), OPTIMIZERS["momentum"])
    for task in stream:
        made.begin_task(task)
        for x, y in batches(stream, task.index):
            made.step(x, y)
        made.end_task()
    model = toy_model()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    guard = perdure.attach(model, optimizer, [SPG()])
    for task in stream:
        first = task.classes[0]
        with guard.task(task.name, batches(stream, task.index), task.classes):
            for x, y in batches(stream, task.index):
                optimizer.zero_grad()
                F.cross_entropy(model(x)[:, first : first + 2], y - first).backward()
                optimizer.step()
    ends = [made.parameters.theta, guard.learner.parameters.theta]
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


def test_refused_where_the_task_is_hidden_unknown_or_masked_twice() -> None:
    with pytest.raises(IncompatibleError, match="'spg' is not defined on a class-incremental"):
        perdure.Learner(toy_model(), OPTIMIZERS["sgd"], [SPG()], scenario="class")
    with pytest.raises(IncompatibleError, match="both mask the same weights"):
        perdure.Learner(toy_model(), OPTIMIZERS["sgd"], [SPG(), HAT()])
    with pytest.raises(UsageError, match="class columns of task 'a'"):
        perdure.Learner(toy_model(), OPTIMIZERS["sgd"], [SPG()]).begin_task("a", (torch.zeros(2, 5), torch.zeros(2)))
    with pytest.raises(UsageError, match="strength is 2"):
        SPG(strength=2)


@pytest.mark.parametrize("method", [SPG, HAT])
@pytest.mark.parametrize("head", [None, "multi"])
def test_works_beside_distillation(method: Any, head: str | None) -> None:
    stream, ends = toy_stream("task"), []
    for methods in ([method(), LwF()], [method()]):
        made = perdure.Learner(toy_model(head=head), OPTIMIZERS["momentum"], methods, scenario="task")
        made.forward.prepare = lambda x: x
        for task in stream[:2]:
            made.fit_task(task, batch_size=8)
        ends.append(made.parameters.theta.clone())
    assert ends[0].isfinite().all()
    assert not torch.equal(*ends)
