"""MER against loops by hand: the order of the examples, what is interpolated, and what is not."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from small_problems import batches, current_loss, momentum, same_bits, sgd, toy_model, toy_stream, weights
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.memory.buffer import Buffer
from perdure.methods import EWC, MER, LaMAML
from perdure.models.heads import open_columns
from perdure.seeding import derive
from perdure.streams.task import Stream

pytestmark = pytest.mark.filterwarnings("ignore:.*passes every example:perdure.errors.PerdureWarning")


def examples(memory: Buffer, count: int) -> list[tuple[Tensor, Tensor, int]]:
    if not len(memory):
        return []
    drawn = memory.sample(count)
    return [(drawn["x"][i : i + 1], drawn["y"][i : i + 1], int(drawn["task"][i])) for i in range(len(drawn["y"]))]


def by_hand(model: Any, stream: Stream, algorithm: int, steps: int, count: int, beta: float, gamma: float) -> None:
    """One pass over a stream in batches of 8, with plain SGD on single examples."""
    memory = Buffer(12, seed=derive(0, "buffer", "mer"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def copies() -> list[Tensor]:
        return [p.detach().clone() for p in model.parameters()]

    def back_to(old: list[Tensor], part: float) -> None:
        if part != 1:
            with torch.no_grad():
                for p, q in zip(model.parameters(), old, strict=True):
                    p.copy_(q + part * (p - q))

    for task in stream:
        for x, y in batches(stream, task.index):
            for i in range(len(y)):
                current = (x[i : i + 1], y[i : i + 1], task.index)
                start = copies()
                for _ in range(1 if algorithm == 7 else steps):
                    before = copies()
                    sequence = [(*row, 1) for row in examples(memory, count)]
                    where = 0 if algorithm == 1 else len(sequence)
                    sequence.insert(where, (*current, steps if algorithm == 7 else 1))
                    for row, target, index, factor in sequence:
                        if hasattr(model.head, "activate"):
                            model.head.activate(index)
                        optimizer.zero_grad()
                        loss = current_loss(model(row), target, stream[index], stream.scenario)
                        (loss * factor).backward()
                        optimizer.step()
                    back_to(before, {1: beta, 6: gamma, 7: 1.0}[algorithm])
                back_to(start, 1.0 if algorithm == 6 else gamma)
                memory.add({"x": current[0], "y": current[1], "task": task.index})


SETTINGS = [("class", None), ("domain", None), ("task", None), ("task", "multi")]


@pytest.mark.parametrize("algorithm", [1, 6, 7])
@pytest.mark.parametrize(("scenario", "head"), SETTINGS)
def test_training_equals_a_loop_by_hand(algorithm: int, scenario: str, head: str | None) -> None:
    stream = toy_stream(scenario, tasks=2, rows=16)
    outputs = 2 if scenario == "domain" else 6
    ours, theirs = toy_model(outputs, head), toy_model(outputs, head)
    for task in stream if head else ():
        open_columns(theirs, task.index, task.classes)
    method = MER(capacity=12, batch_size=3, steps=2, beta=0.4, gamma=0.7, algorithm=algorithm)
    perdure.Learner(ours, sgd, [method]).fit(stream, batch_size=8)
    by_hand(theirs, stream, algorithm, 2, 3, 0.4, 0.7)
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-5)


@pytest.mark.parametrize("algorithm", [1, 6])
def test_the_whole_way_is_plain_sequential_sgd_bit_for_bit(algorithm: int) -> None:
    stream = toy_stream("class", rows=16)
    ours, theirs = toy_model(), toy_model()
    method = MER(capacity=12, batch_size=3, steps=2, beta=1.0, gamma=1.0, algorithm=algorithm)
    perdure.Learner(ours, sgd, [method]).fit(stream, batch_size=8)
    by_hand(theirs, stream, algorithm, 2, 3, 1.0, 1.0)
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("algorithm", [1, 6, 7])
def test_none_of_the_way_leaves_the_weights(algorithm: int) -> None:
    stream = toy_stream("class", rows=16)
    model = toy_model()
    method = MER(capacity=12, batch_size=3, steps=2, gamma=0.0, algorithm=algorithm)
    perdure.Learner(model, sgd, [method]).fit(stream, batch_size=8)
    assert same_bits(model, toy_model())
    assert len(method.buffer) == 12


def test_cutting_the_stream_into_other_batches_changes_nothing() -> None:
    x, y = toy_stream("class")[0].train.gather(torch.arange(24))
    models, methods = (toy_model(), toy_model()), (MER(10, 3, 2), MER(10, 3, 2))
    for model, method, size in zip(models, methods, (8, 3), strict=True):
        learner = perdure.Learner(model, sgd, [method])
        for rows in torch.arange(24).split(size):
            learner.step(x[rows], y[rows])
    assert same_bits(*models)
    assert torch.equal(methods[0].buffer.view("x"), methods[1].buffer.view("x"))


def test_rows_are_remembered_once() -> None:
    x, y = toy_stream("class")[0].train.gather(torch.arange(8))
    method = MER(capacity=100, batch_size=2, steps=1)
    learner = perdure.Learner(toy_model(), sgd, [method])
    for first_pass in (True, False, False):
        learner.step(x, y, first_pass=first_pass)
    assert len(method.buffer) == 8


def test_statistics_learn_from_current_rows_and_are_not_interpolated() -> None:
    stream = toy_stream("class")
    model = toy_model(norm=True)
    learner = perdure.Learner(model, sgd, [MER(capacity=12, batch_size=3, steps=2, beta=0.1)])
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    norm = model.body[1]
    x, y = batches(stream, 1)[0]
    hidden = model.body[0](x).detach()
    expected = 0.9 * norm.running_mean + 0.1 * hidden.mean(0)
    count, before = int(norm.num_batches_tracked), weights(model)
    learner.step(x, y)
    assert torch.allclose(norm.running_mean, expected, atol=1e-6)
    assert int(norm.num_batches_tracked) == count + 1
    assert norm.training
    assert norm.num_batches_tracked.dtype == torch.int64
    assert not torch.equal(weights(model), before)


def test_single_steps_normalise_by_running_statistics() -> None:
    """With algorithm 7 and an empty memory a step is one plain step on one row, in evaluation mode."""
    stream = toy_stream("class")
    ours, theirs = toy_model(norm=True), toy_model(norm=True)
    x, y = batches(stream, 0)[0]
    with torch.no_grad():
        theirs(x)
    theirs.eval()
    learner = perdure.Learner(ours, sgd, [MER(capacity=12, batch_size=1, steps=1, gamma=1.0, algorithm=7)])
    learner.begin_task(stream[0])
    learner.step(x, y)
    memory = Buffer(12, seed=derive(0, "buffer", "mer"))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for i in range(len(y)):
        for row, target, _ in [*examples(memory, 1), (x[i : i + 1], y[i : i + 1], 0)]:
            optimizer.zero_grad()
            F.cross_entropy(theirs(row), target).backward()
            optimizer.step()
        memory.add({"x": x[i : i + 1], "y": y[i : i + 1], "task": 0})
    assert same_bits(ours, theirs)


def test_a_schedule_advances_once_a_batch() -> None:
    x, y = toy_stream("class")[0].train.gather(torch.arange(8))
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    learner = perdure.Learner(toy_model(), sgd, [MER(12, 3, 2)], scheduler=schedule)
    for _ in range(3):
        learner.step(x, y)
    assert learner.optimizers.learning_rates()["head.bias"] == pytest.approx(0.0125)


def test_clipping_holds_for_every_single_step() -> None:
    x, y = toy_stream("class")[0].train.gather(torch.arange(1))
    learner = perdure.Learner(toy_model(), sgd, [MER(12, 3, steps=5, beta=1.0)], clip_norm=0.01)
    before = learner.parameters.theta.clone()
    learner.step(x, y)
    assert float((learner.parameters.theta - before).norm()) == pytest.approx(5 * 0.01 * 0.1, rel=1e-2)


OPTIMIZERS = [
    sgd,
    partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    partial(torch.optim.Adam, lr=0.01),
]


@pytest.mark.filterwarnings("ignore:.*plain SGD:perdure.errors.PerdureWarning")
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "momentum", "adam"])
def test_algorithm_7_multiplies_the_learning_rate_whatever_the_optimizer_and_clipping(
    optimizer: Any, clip: float | None
) -> None:
    x, y = toy_stream("class")[0].train.gather(torch.arange(8))
    ours, theirs = toy_model(), toy_model()
    method = MER(12, batch_size=1, steps=5, gamma=1.0, algorithm=7)
    learner = perdure.Learner(ours, optimizer, [method], clip_norm=clip)
    learner.step(x, y)
    memory = Buffer(12, seed=derive(0, "buffer", "mer"))
    made = optimizer(theirs.parameters())
    rate = made.param_groups[0]["lr"]
    for i in range(8):
        current = (x[i : i + 1], y[i : i + 1], 0)
        for row, target, factor in [(*row[:2], 1) for row in examples(memory, 1)] + [(*current[:2], 5)]:
            made.param_groups[0]["lr"] = rate * factor
            made.zero_grad()
            F.cross_entropy(theirs(row), target).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(theirs.parameters(), clip)
            made.step()
        memory.add({"x": current[0], "y": current[1], "task": 0})
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-5)
    assert set(learner.optimizers.learning_rates().values()) == {rate}


def test_remembered_rows_are_augmented_as_current_ones_are_and_never_stored_so() -> None:
    seen: list[Tensor] = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return super().forward(x)

    def moved(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + 100 + torch.rand(x.shape, generator=generator)

    method = MER(12, batch_size=3, steps=2)
    learner = perdure.Learner(Watched(5, 6), partial(torch.optim.SGD, lr=1e-4), [method], augment=moved)
    x, y = toy_stream("class")[0].train.gather(torch.arange(8))
    for _ in range(2):
        learner.step(x, y)
    assert all(bool((row > 50).all()) for row in seen)
    assert len({tuple(row.flatten().tolist()) for row in seen}) > 16, "every draw is a view of its own"
    assert bool((method.buffer.view("x") < 50).all())


@pytest.mark.parametrize("norm", [False, True])
def test_every_row_that_passes_is_counted(norm: bool) -> None:
    x, y = toy_stream("class")[0].train.gather(torch.arange(8))
    model, passed = toy_model(norm=norm), []
    model.register_forward_hook(lambda module, inputs, output: passed.append(len(output)))
    learner = perdure.Learner(model, sgd, [MER(12, batch_size=3, steps=2)])
    for _ in range(2):
        learner.step(x, y)
    assert learner.passes["forward_rows"] == sum(passed)
    assert learner.passes["backward_rows"] == sum(passed) - (16 if norm else 0)


def test_what_it_cannot_work_with_is_said_before_training() -> None:
    with pytest.raises(perdure.errors.IncompatibleError, match="both own step"):
        perdure.Learner(toy_model(), sgd, [MER(), LaMAML()])
    with pytest.raises(perdure.errors.IncompatibleError, match="replaces the whole step"):
        perdure.Learner(toy_model(), sgd, [MER(), EWC()])
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(perdure.errors.IncompatibleError, match="own a part of the training loop"):
        perdure.attach(model, optimizer, [MER()])
    with pytest.warns(perdure.errors.PerdureWarning, match="plain SGD without momentum"):
        perdure.Learner(toy_model(), momentum, [MER()])
    with pytest.warns(perdure.errors.PerdureWarning, match="passes every example 55 times"):
        perdure.Learner(toy_model(), sgd, [MER(batch_size=10, steps=5)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perdure.Learner(toy_model(), momentum, [MER(capacity=0)])
        perdure.Learner(toy_model(), sgd, [MER(batch_size=3, steps=5)])


@pytest.mark.parametrize("wrong", [{"beta": 1.5}, {"gamma": -0.1}, {"algorithm": 2}, {"steps": -1}, {"capacity": 1.5}])
def test_arguments_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(perdure.errors.UsageError, match=next(iter(wrong))):
        MER(**wrong)
