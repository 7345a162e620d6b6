"""LwF: what is distilled, from whom, over which columns, and what the extra passes leave alone."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from small_problems import (
    batches,
    current_loss,
    gradient_of,
    same_bits,
    sgd,
    sgd_step,
    spread,
    toy_model,
    toy_stream,
    weights,
)
from torch import Tensor, nn

import perdure
from perdure.batch import Batch
from perdure.errors import IncompatibleError
from perdure.methods import LwF
from perdure.models.heads import MultiHead
from perdure.streams.task import Stream

pytestmark = pytest.mark.filterwarnings("ignore:.*alone on a class-incremental")


def divergence(student: Tensor, teacher: Tensor, columns: list[int], temperature: float) -> Tensor:
    """T^2 KL(teacher || student) over some columns, mean over rows, from the definition."""
    p = (teacher[:, columns] / temperature).softmax(1)
    q = (student[:, columns] / temperature).softmax(1)
    return temperature**2 * (p * (p / q).log()).sum(1).mean()


def second_task(
    method: LwF, scenario: str = "class", head: str | None = None, norm: bool = False
) -> tuple[perdure.Learner, Stream]:
    """A learner that has finished two tasks and begun the third."""
    stream = toy_stream(scenario)
    learner = perdure.Learner(toy_model(2 if scenario == "domain" else 6, head, norm), sgd, [method], scenario=scenario)
    learner.forward.prepare = stream.prepare
    for index in range(2):
        learner.fit_task(stream[index], batch_size=8)
    learner.begin_task(stream[2])
    return learner, stream


def term(learner: perdure.Learner, x: Tensor, y: Tensor) -> Tensor:
    """The method's loss for current rows, with the graph of the main forward pass."""
    (method,) = learner.methods
    batch = Batch.current(x, y, learner.task_index)
    loss = method.loss(batch, learner.forward.batch(batch, learner.shown_task))
    assert loss is not None
    return loss


@pytest.mark.parametrize(
    ("scenario", "head"), [("class", None), ("class", "growing"), ("task", None), ("task", "multi"), ("domain", None)]
)
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(scenario: str, head: str | None) -> None:
    learner, stream = second_task(LwF(strength=3.0), scenario, head)
    x, y = batches(stream, 2)[0]
    loss = term(learner, x, y)
    assert abs(float(loss.detach())) < 1e-7
    assert float(gradient_of(loss, learner.model).abs().max()) < 1e-6


def test_there_is_no_term_in_the_first_task() -> None:
    stream = toy_stream("class")
    ours, plain = toy_model(), toy_model()
    for model, methods in ((ours, [LwF()]), (plain, [])):
        perdure.Learner(model, sgd, methods, scenario="class").fit_task(stream[0], batch_size=8)
    assert same_bits(ours, plain)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_the_value_is_the_definition(temperature: float) -> None:
    learner, stream = second_task(LwF(strength=1.5, temperature=temperature))
    teacher = copy.deepcopy(learner.model)
    noise = 0.3 * torch.randn(len(learner.parameters), generator=torch.Generator().manual_seed(1))
    learner.parameters.theta.add_(spread(learner.parameters, noise))
    x, y = batches(stream, 2)[0]
    with torch.no_grad():
        z, old = learner.model(x)[:, :4].double().numpy(), teacher(x)[:, :4].double().numpy()
    p, q = (np.exp(a / temperature) / np.exp(a / temperature).sum(1, keepdims=True) for a in (old, z))
    expected = 1.5 * temperature**2 * (p * np.log(p / q)).sum(1).mean()
    assert expected > 1e-3
    assert float(term(learner, x, y).detach()) == pytest.approx(expected, rel=1e-4)


def test_the_gradient_does_not_fade_with_temperature() -> None:
    """T^2 KL tends to the squared distance of centred logits over 2 C, whatever T; without T^2 it would tend to 0."""
    x, y = batches(toy_stream("class"), 2)[0]
    gradients = []
    for temperature in (30.0, 60.0, 120.0):
        learner, _ = second_task(LwF(temperature=temperature))
        teacher = copy.deepcopy(learner.model)
        draw = torch.Generator().manual_seed(1)
        learner.parameters.theta.add_(spread(learner.parameters, 0.3 * torch.randn(90, generator=draw)))
        gradients.append(gradient_of(term(learner, x, y), learner.model))
    distance = learner.model(x)[:, :4] - teacher(x)[:, :4].detach()
    limit = gradient_of((distance - distance.mean(1, keepdim=True)).square().sum(1).mean() / 8, learner.model)
    for gradient in gradients:
        assert torch.allclose(gradient, limit, rtol=0.05, atol=0.02 * float(limit.abs().max()))


@pytest.mark.parametrize("head", [None, "growing"])
def test_class_incremental_distils_only_old_columns(head: str | None) -> None:
    learner, stream = second_task(LwF(), "class", head)
    learner.parameters.theta.mul_(1.5)
    x, y = batches(stream, 2)[0]
    gradient = learner.parameters.gradient(term(learner, x, y))
    rows = learner.parameters.views(gradient)["head.weight"]
    assert rows.shape == (6, 7)
    assert (rows[:4].abs().sum(1) > 0).all()
    assert not rows[4:].any()


def test_task_incremental_distils_each_old_task_over_its_own_columns() -> None:
    """Shifting all logits of one old task changes nothing: its block is normalised by itself."""
    x, y = batches(toy_stream("task"), 2)[0]
    learner, _ = second_task(LwF(), "task")
    bias = learner.parameters.views(learner.parameters.theta)["head.bias"]
    bias[0:2] += 3.0
    assert abs(float(term(learner, x, y).detach())) < 1e-6
    bias[0] += 1.0
    assert float(term(learner, x, y).detach()) > 1e-3
    learner, _ = second_task(LwF(), "class")
    learner.parameters.views(learner.parameters.theta)["head.bias"][0:2] += 3.0
    assert float(term(learner, x, y).detach()) > 1e-3


@pytest.mark.parametrize(
    ("scenario", "head", "reduce"),
    [
        ("class", None, "mean"),
        ("class", "growing", "mean"),
        ("domain", None, "mean"),
        ("task", None, "mean"),
        ("task", None, "sum"),
        ("task", "multi", "mean"),
        ("task", "multi", "sum"),
    ],
)
def test_training_equals_a_hand_written_loop(scenario: str, head: str | None, reduce: str) -> None:
    stream = toy_stream(scenario, tasks=4)
    outputs = 2 if scenario == "domain" else 8
    strength, temperature = 1.3, 2.5
    ours, theirs = toy_model(outputs, head), toy_model(outputs, head)
    perdure.Learner(ours, sgd, [LwF(strength=strength, temperature=temperature, reduce=reduce)]).fit(
        stream, batch_size=8
    )

    for task in stream:
        if head == "growing":
            theirs.head.grow(max(task.classes) + 1)
        if head == "multi":
            theirs.head.add(task.index, task.classes)
        teacher = copy.deepcopy(theirs)
        past = [list(other.classes) for other in stream[: task.index]]
        blocks = past if scenario == "task" else [sorted({c for block in past for c in block})]
        for x, y in batches(stream, task.index):
            if head == "multi":
                theirs.head.activate(task.index)
            loss = current_loss(theirs(x), y, task, scenario)
            if task.index:
                if head == "multi":
                    theirs.head.activate(None)
                    teacher.head.activate(None)
                with torch.no_grad():
                    old = teacher(x)
                terms = [divergence(theirs(x), old, block, temperature) for block in blocks]
                total = torch.stack(terms).sum() / (len(terms) if reduce == "mean" else 1)
                loss = loss + strength * total
            sgd_step(theirs, gradient_of(loss, theirs))
    assert torch.allclose(weights(ours), weights(theirs), atol=2e-5)


@pytest.mark.parametrize(("scenario", "head"), [("class", None), ("task", "multi")])
def test_the_teacher_never_changes_and_runs_in_evaluation_mode(scenario: str, head: str | None) -> None:
    method = LwF()
    learner, stream = second_task(method, scenario, head, norm=True)
    assert method.teacher is not None
    kept = {name: tensor.clone() for name, tensor in method.teacher.items()}
    assert kept["body.1.running_mean"].abs().sum() > 0
    frozen = copy.deepcopy(learner.model).eval()
    x, y = batches(stream, 2)[0]
    for _ in range(10):
        learner.step(x, y)
    assert all(torch.equal(method.teacher[name], tensor) for name, tensor in kept.items())
    assert not any(tensor.requires_grad for tensor in method.teacher.values())
    if head == "multi":
        frozen.head.activate(None)
        learner.forward.activate(None)
    with torch.no_grad():
        assert torch.allclose(method.teach(x), frozen(x), atol=1e-6)
    assert all(module.training for module in learner.model.modules())


@pytest.mark.parametrize(("scenario", "head"), [("class", None), ("class", "growing"), ("task", "multi")])
def test_running_statistics_move_once_a_step(scenario: str, head: str | None) -> None:
    """One step from the same weights leaves the same statistics as without the method, extra passes or not."""
    found = []
    for methods in ([LwF()], []):
        stream = toy_stream(scenario)
        learner = perdure.Learner(toy_model(6, head, norm=True), sgd, methods, scenario=scenario)
        learner.fit_task(stream[0], batch_size=40)
        learner.begin_task(stream[1])
        learner.step(*batches(stream, 1)[0])
        norm = learner.model.body[1]
        found.append((norm.running_mean.clone(), norm.running_var.clone(), int(norm.num_batches_tracked)))
    assert found[0][2] == 2
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    stream = toy_stream("class")
    found = []
    for pieces in (1, 3):
        model = toy_model()
        perdure.Learner(model, sgd, [LwF()], micro_batches=pieces).fit(stream, batch_size=8)
        found.append(weights(model))
    assert torch.allclose(found[0], found[1], atol=1e-6)


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_without_rescaling_the_factor_of_the_temperature_is_gone(scenario: str) -> None:
    values = []
    for rescale in (True, False):
        learner, stream = second_task(LwF(temperature=3.0, rescale=rescale), scenario)
        learner.parameters.theta.mul_(1.3)
        # Training differs already; the value is compared on the same weights and teacher.
        learner.parameters.theta.copy_(spread(learner.parameters, torch.linspace(-1, 1, len(learner.parameters))))
        method = learner.methods[0]
        draw = torch.Generator().manual_seed(3)
        method.teacher = {n: torch.randn(t.shape, generator=draw) for n, t in method.teacher.items()}
        values.append(float(term(learner, *batches(stream, 2)[0]).detach()))
    assert values[0] == pytest.approx(9 * values[1], rel=1e-5)
    assert values[1] > 1e-3


@pytest.mark.parametrize("head", [None, "growing"])
def test_all_columns_are_all_that_the_teacher_has(head: str | None) -> None:
    learner, stream = second_task(LwF(columns="all"), "class", head)
    learner.parameters.theta.mul_(1.5)
    x, y = batches(stream, 2)[0]
    gradient = learner.parameters.gradient(term(learner, x, y))
    moved = learner.parameters.views(gradient)["head.weight"].abs().sum(1) > 0
    assert moved.tolist() == [True] * 6


def test_heads_that_share_columns_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), MultiHead(6, seed=0))
    learner = perdure.Learner(model, partial(torch.optim.SGD, lr=0.1), [LwF()], scenario="task")
    data = (torch.randn(8, 4), torch.arange(8) % 2)
    learner.fit_task("a", data, classes=(0, 1))
    with pytest.raises(IncompatibleError, match="give every task columns of its own"):
        learner.fit_task("b", data, classes=(0, 1))
