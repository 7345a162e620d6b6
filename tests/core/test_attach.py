"""Methods inside a loop that somebody else owns do what they do in the learner."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.errors import IncompatibleError, UsageError
from perdure.methods import (
    AGEM,
    DER,
    EWC,
    GEM,
    HAT,
    KD,
    L2,
    MAS,
    SI,
    SPG,
    DERpp,
    Joint,
    LwF,
    Method,
    MomentumKD,
    Replay,
)
from perdure.models.heads import MultiHead

pytestmark = pytest.mark.filterwarnings("ignore::perdure.errors.PerdureWarning")

SGD = partial(torch.optim.SGD, lr=0.1)
MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)


def mlp(head: nn.Module | None = None) -> nn.Module:
    return perdure.models.MLP(64, [20], 10, head=head, seed=3)


def stream(scenario: str = "class") -> perdure.Stream:
    return perdure.benchmarks.split_digits(scenario=scenario, seed=0)


def with_learner(methods: list[Method], optimizer: Any, steps: int = 8) -> Tensor:
    learner = perdure.Learner(mlp(), optimizer, methods, scenario="class")
    data = stream()
    learner.forward.prepare = lambda x: x
    for task in data:
        learner.begin_task(task.name, _data(task), task.classes)
        for x, y in _batches(data, task, steps):
            learner.step(x, y)
        learner.end_task()
    return learner.parameters.theta.clone()


def _data(task: perdure.Task) -> tuple[Tensor, Tensor]:
    x, y = task.train.gather(torch.arange(len(task.train)))
    return x.float() / 16, y


def _batches(data: perdure.Stream, task: perdure.Task, steps: int) -> list[tuple[Tensor, Tensor]]:
    x, y = _data(task)
    return [(x[rows], y[rows]) for rows in data.plan(task, steps=steps, batch_size=16)]


def with_loop(methods: list[Method], make: Any, steps: int = 8, **options: Any) -> Tensor:
    """The loop as a stranger writes it; three lines are ours."""
    model = mlp()
    optimizer = make(model.parameters())
    guard = perdure.attach(model, optimizer, methods, scenario="class")
    data = stream()
    for task in data:
        with guard.task(task.name, _data(task), task.classes):
            for x, y in _batches(data, task, steps):
                guard.see(x, y)
                optimizer.zero_grad(**options)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    return guard.learner.parameters.theta.clone()


EXACT: dict[str, Callable[[], list[Method]]] = {
    "nothing": list,
    "ewc": lambda: [EWC(strength=1)],
    "ewc prox": lambda: [EWC(strength=1, solver="prox")],
    "si": lambda: [SI(strength=0.1)],
    "l2": lambda: [L2(strength=0.1)],
    "mas": lambda: [MAS(strength=0.01)],
    "penalties": lambda: [EWC(strength=1), L2(strength=0.1), MAS(strength=0.01)],
    "gem": lambda: [GEM(per_task=10)],
    "agem": lambda: [AGEM(per_task=10)],
    "replay": lambda: [Replay(30, weighting="sum", forward="separate")],
    "replay half": lambda: [Replay(30, weighting="sum", weight=0.5, forward="separate")],
    "der": lambda: [DER(30)],
    "derpp": lambda: [DERpp(30)],
    "several": lambda: [EWC(strength=1), AGEM(per_task=10), Replay(30, weighting="sum", forward="separate")],
}

ROUNDED: dict[str, Callable[[], list[Method]]] = {
    "pooled": lambda: [Replay(30)],
    "pooled separate": lambda: [Replay(30, forward="separate")],
    "1/t": lambda: [Replay(30, weighting="1/t")],
    "lwf": lambda: [LwF()],
    "lwf of all rows": lambda: [LwF(replayed=True), Replay(30, weighting="sum", forward="separate")],
    "kd": lambda: [KD()],
    "kd+replay": lambda: [KD(alpha=0.3), Replay(30)],
    "momentum_kd": lambda: [MomentumKD(), Replay(30)],
    "lwf+derpp": lambda: [LwF(), DERpp(30, forward="joint")],
}


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize("name", EXACT)
def test_attached_equals_the_learner_bit_for_bit(name: str, optimizer: Any) -> None:
    assert torch.equal(with_loop(EXACT[name](), optimizer), with_learner(EXACT[name](), optimizer))


@pytest.mark.parametrize("name", ROUNDED)
def test_attached_equals_the_learner_to_rounding(name: str) -> None:
    ours, theirs = with_loop(ROUNDED[name](), SGD), with_learner(ROUNDED[name](), SGD)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert not torch.allclose(theirs, with_learner([], SGD), rtol=0, atol=1e-3)


def task_by_task(methods: list[Method], make: Any, attached: bool) -> Tensor:
    """Three tasks whose columns are known, in the learner or in a loop of one's own."""
    model, data = mlp(MultiHead(20, seed=1)), stream("task")[:3]
    model.head.add(0, data[0].classes)  # type: ignore[union-attr]
    optimizer = make(model.parameters())
    guard = perdure.attach(model, optimizer, methods, scenario="task") if attached else None
    learner = perdure.Learner(model, optimizer, methods, scenario="task") if guard is None else guard.learner
    learner.forward.prepare = lambda x: x
    for task in data:
        if guard is None:
            learner.begin_task(task.name, _data(task), task.classes)
            for x, y in _batches(stream("task"), task, 8):
                learner.step(x, y)
            learner.end_task()
            continue
        with guard.task(task.name, _data(task), task.classes):
            for x, y in _batches(stream("task"), task, 8):
                guard.see(x, y)
                optimizer.zero_grad()
                columns = slice(task.classes[0], task.classes[-1] + 1)
                F.cross_entropy(model(x)[:, columns], y - task.classes[0]).backward()
                optimizer.step()
    return learner.parameters.theta.clone()


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize("mask", [SPG, HAT], ids=["spg", "hat"])
def test_attached_masks_equal_the_learner_bit_for_bit(mask: type[Method], optimizer: Any) -> None:
    ours, theirs = task_by_task([mask()], optimizer, True), task_by_task([mask()], optimizer, False)
    assert torch.equal(ours, theirs)
    assert ours.isfinite().all()


@pytest.mark.parametrize("name", ["ewc", "agem", "replay", "si"])
def test_gradients_that_are_zeroed_in_place(name: str) -> None:
    assert torch.equal(with_loop(EXACT[name](), SGD, set_to_none=False), with_learner(EXACT[name](), SGD))


def test_a_closure_is_refused() -> None:
    model = mlp()
    optimizer = SGD(model.parameters())
    perdure.attach(model, optimizer, [EWC(strength=1)])
    with pytest.raises(UsageError, match="without a closure"):
        optimizer.step(lambda: 0.0)


def test_methods_that_own_a_part_of_the_loop_are_refused() -> None:
    model = mlp()
    with pytest.raises(IncompatibleError, match="'joint' has to own a part"):
        perdure.attach(model, SGD(model.parameters()), [Joint()])


def test_detached_the_loop_is_its_own_again() -> None:
    model, twin = mlp(), mlp()
    optimizer, other = SGD(model.parameters()), SGD(twin.parameters())
    guard = perdure.attach(model, optimizer, [L2(strength=1.0)])
    with guard.task("a"):
        pass
    guard.detach()
    for each, steps in ((model, optimizer), (twin, other)):
        x = torch.ones(4, 64)
        steps.zero_grad()
        each(x).square().sum().backward()
        steps.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def scaled_loop(fused: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    guard = perdure.attach(model, optimizer, [SI(strength=0.1), EWC(strength=1)])
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        x, y = torch.randn(64, 64, generator=generator), torch.arange(64) % 10
        with guard.task(name, (x, y)):
            for rows in torch.arange(64).split(16):
                guard.see(x[rows], y[rows])
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[rows]), y[rows])
                if scaler is None:
                    loss.backward()
                    optimizer.step()
                else:
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
    return guard.learner.parameters.theta.clone(), guard.learner.methods[1].importance.clone()


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_nothing(fused: bool) -> None:
    plain, scaled = scaled_loop(fused, None), scaled_loop(fused, 1024.0)
    assert torch.equal(plain[0], scaled[0])
    assert torch.equal(plain[1], scaled[1])


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_leaves_no_trace(fused: bool) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    guard = perdure.attach(model, optimizer, [SI(strength=0.1)])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = guard.learner.parameters.theta.clone()
    with guard.task("a"):
        x = torch.full((4, 64), torch.inf)
        guard.see(x, torch.arange(4))
        scaler.scale(F.cross_entropy(model(x), torch.arange(4))).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(guard.learner.parameters.theta, before)
        assert not guard.learner.methods[0].path.any()


def test_accumulated_batches_are_one_step() -> None:
    results = []
    for pieces in (1, 2):
        model = mlp()
        optimizer = SGD(model.parameters())
        guard = perdure.attach(model, optimizer, [Replay(30, weighting="sum", forward="separate"), SI(strength=0.1)])
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(64, 64, generator=generator), torch.arange(64) % 10
        with guard.task("a"):
            for rows in torch.arange(64).split(16):
                optimizer.zero_grad()
                for part in rows.split(16 // pieces):
                    inputs = x[part]
                    guard.see(inputs, y[part])
                    (F.cross_entropy(model(inputs), y[part]) / pieces).backward()
                optimizer.step()
        results.append(guard.learner.parameters.theta.clone())
        assert guard.learner.methods[0].buffer.seen == 64
        assert guard.learner.passes["steps"] == 4
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_the_loops_own_clipping_comes_before_the_methods() -> None:
    seen = []

    class Watch(Method):
        name = "watch"

        def observe_gradient(self, grad: Tensor) -> None:
            seen.append(float(grad.norm()))

    model = mlp()
    optimizer = SGD(model.parameters())
    guard = perdure.attach(model, optimizer, [Watch()])
    with guard.task("a"):
        F.cross_entropy(model(torch.randn(8, 64)), torch.arange(8)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    assert seen == [pytest.approx(0.01, rel=1e-3)]


def test_der_stores_the_logits_that_the_loop_had() -> None:
    model = mlp()
    optimizer = SGD(model.parameters())
    guard = perdure.attach(model, optimizer, [DER(30)])
    x, y = torch.randn(8, 64), torch.arange(8)
    with guard.task("a"):
        guard.see(x, y)
        outputs = model(x)
        F.cross_entropy(outputs, y).backward()
        optimizer.step()
        stored = guard.learner.methods[0].buffer.columns["logits"][:8]
        assert torch.equal(stored, outputs.detach())


def test_heads_of_their_own_in_a_foreign_loop() -> None:
    model = mlp(MultiHead(20, seed=1))
    model.head.add("start", (0,))
    optimizer = SGD(model.parameters())
    guard = perdure.attach(model, optimizer, [Replay(20, weighting="sum", forward="separate")], scenario="task")
    data = stream("task")
    for task in data[:2]:
        x, y = _data(task)
        with guard.task(task.name, None, task.classes):
            for rows in data.plan(task, steps=30, batch_size=16):
                guard.see(x[rows], y[rows])
                optimizer.zero_grad()
                columns = slice(task.classes[0], task.classes[-1] + 1)
                F.cross_entropy(model(x[rows])[:, columns], y[rows] - task.classes[0]).backward()
                optimizer.step()
    x, y = _data(data[0])
    assert float((guard.learner.predict(x, task=0) == y).float().mean()) > 0.95
