"""KD: how the loss is divided, its gradient by finite differences, and what replayed rows do."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_problems import Watcher, batches, gradient_of, sgd, sgd_step, spread, toy_model, toy_stream, weights
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.batch import Batch
from perdure.methods import KD, LwF, Method, Replay

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*alone on a class-incremental"),
    pytest.mark.filterwarnings("ignore:.*both distil"),
]


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) [rows], from the definition."""
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    return (p * (p / q).log()).sum(1)


def test_training_equals_a_hand_written_loop_with_the_divided_loss() -> None:
    stream, alpha, temperature = toy_stream("domain"), 0.3, 2.5
    ours, theirs = toy_model(2), toy_model(2)
    perdure.Learner(ours, sgd, [KD(alpha=alpha, temperature=temperature)]).fit(stream, batch_size=8)
    for task in stream:
        teacher = copy.deepcopy(theirs)
        for x, y in batches(stream, task.index):
            loss = F.cross_entropy(theirs(x), y)
            if task.index:
                kept = divergence(theirs(x), teacher(x).detach(), temperature).mean()
                loss = (1 - alpha) * loss + alpha * temperature**2 * kept
            sgd_step(theirs, gradient_of(loss, theirs))
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-5)


def test_it_is_lwf_with_another_strength_and_learning_rate() -> None:
    stream, alpha = toy_stream("class"), 0.4
    models = toy_model(), toy_model()
    learners = [
        perdure.Learner(models[0], sgd, [KD(alpha=alpha)]),
        perdure.Learner(models[1], sgd, [LwF(strength=alpha / (1 - alpha))]),
    ]
    for learner in learners:
        learner.adopt(stream)
        learner.fit_task(stream[0], batch_size=8)
    for group in learners[1].optimizers.groups():
        group["lr"] *= 1 - alpha
    for learner in learners:
        learner.fit_task(stream[1], batch_size=8)
    assert torch.allclose(weights(models[0]), weights(models[1]), atol=1e-6)


@pytest.mark.parametrize("share", [None, 0.25])
def test_alpha_divides_the_loss_of_remembered_rows_too(share: float | None) -> None:
    """The step's gradient is (1 - alpha) times that of the loss without the method, when the teacher is the student."""
    stream = toy_stream("class")
    replay = {"weighting": "pooled"} if share is None else {"weighting": "sum", "weight": share}
    moved = []
    for methods in ([KD(alpha=0.75)], []):
        model = toy_model()
        learner = perdure.Learner(model, sgd, [*methods, Replay(capacity=20, ratio=0.5, **replay)], scenario="class")
        learner.fit_task(stream[0], batch_size=8)
        learner.begin_task(stream[1])
        before = weights(model)
        learner.step(*batches(stream, 1)[0])
        moved.append(weights(model) - before)
    assert float(moved[0].abs().max()) > 1e-4
    assert torch.allclose(moved[0], 0.25 * moved[1], atol=1e-7)


@pytest.mark.parametrize("head", [None, "multi"])
def test_all_for_the_past_leaves_a_student_that_is_its_teacher_where_it_is(head: str | None) -> None:
    stream = toy_stream("task")
    model = toy_model(head=head)
    learner = perdure.Learner(model, sgd, [KD(alpha=1.0)], scenario="task")
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    before = weights(model)
    loss = learner.step(*batches(stream, 1)[0])
    assert torch.allclose(weights(model), before, atol=1e-6)
    assert abs(float(loss)) < 1e-6


@pytest.mark.parametrize("make", [lambda: LwF(strength=1.3, temperature=3.0), lambda: KD(alpha=0.8, temperature=0.7)])
def test_the_gradient_is_that_of_finite_differences(make: type[Method]) -> None:
    stream = toy_stream("domain", dtype=torch.float32)
    method = make()
    learner = perdure.Learner(toy_model(2).double(), sgd, [method])
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    theta = learner.parameters.theta
    noise = 0.3 * torch.randn(len(learner.parameters), generator=torch.Generator().manual_seed(1))
    theta.add_(spread(learner.parameters, noise.double()))
    x, y = batches(stream, 1)[0]
    batch = method.on_batch(Batch.current(x, y, 1))

    def value() -> Tensor:
        loss = method.loss(batch, learner.forward.batch(batch, 1))
        assert loss is not None
        return loss

    gradient = learner.parameters.gradient(value())
    assert float(gradient.abs().max()) > 1e-2
    for i in learner.parameters.mask().nonzero()[:, 0].tolist():
        found = []
        for step in (1e-6, -1e-6):
            theta[i] += step
            found.append(float(value().detach()))
            theta[i] -= step
        assert float(gradient[i]) == pytest.approx((found[0] - found[1]) / 2e-6, abs=1e-7)


def test_golden_value_of_two_classes() -> None:
    """Teacher logits (2 ln 3, 0) at T = 2 are probabilities 3/4 and 1/4, student logits 0, 0 are 1/2 and 1/2."""
    model = nn.Linear(1, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    method = KD(alpha=0.5, temperature=2.0)
    learner = perdure.Learner(model, sgd, [method], scenario="domain")
    data = torch.ones(4, 1), torch.arange(4) % 2
    learner.begin_task("a", data, classes=(0, 1))
    learner.end_task()
    learner.begin_task("b", data, classes=(0, 1))
    assert method.teacher is not None
    method.teacher["bias"] = torch.tensor([2 * math.log(3), 0.0])
    expected = 0.5 * math.log(2) + 0.5 * 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(learner.step(*data)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("head", [None, "multi"])
def test_replayed_rows_are_distilled_on_request_and_count_like_the_current(head: str | None, pieces: int) -> None:
    stream = toy_stream("task" if head else "class")
    seen: list[tuple[Tensor, float]] = []
    for replayed in (True, False):
        method, watcher = LwF(strength=2.0, replayed=replayed), Watcher()
        model = toy_model(head=head)
        learner = perdure.Learner(
            model,
            sgd,
            [method, watcher, Replay(capacity=20, ratio=0.5)],
            scenario=stream.scenario,
            micro_batches=pieces,
        )
        learner.fit_task(stream[0], batch_size=8)
        learner.begin_task(stream[1])
        learner.parameters.theta.mul_(1.2)
        before, frozen = copy.deepcopy(model), copy.deepcopy(model)
        frozen.load_state_dict(method.teacher, strict=False)
        x, y = batches(stream, 1)[0]
        loss = float(learner.step(x, y))
        if head:
            before.head.activate(None), frozen.head.activate(None)
        rows = x
        if replayed:
            rows = torch.cat([source.x for source in watcher.steps[-1]["batch"].sources])
            assert len(rows) == 12
        columns = list(stream[0].classes)
        expected = 2.0 * 4 * divergence(before(rows)[:, columns], frozen(rows)[:, columns], 2.0).mean()
        seen.append((expected.detach(), loss))
    # The main loss of both runs is the same, so they differ by what is distilled.
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] - seen[1][1] == pytest.approx(float(seen[0][0] - seen[1][0]), abs=1e-5)
