"""MAS: the importance it defines, against a loop over samples, and the penalty that it becomes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from small_problems import batches, gradient_of, sgd, sgd_step, toy_model, toy_stream, values, weights
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.methods import MAS
from perdure.methods.mas import output_sensitivity
from perdure.streams.task import Stream

pytestmark = pytest.mark.filterwarnings("ignore:.*alone on a class-incremental")


def omega_by_loop(model: nn.Module, x: Tensor, columns: Sequence[int] | None = None) -> Tensor:
    """Mean over samples of the absolute gradient of the squared norm of a sample's outputs, one sample at a time."""
    total = torch.zeros_like(weights(model))
    for row in x:
        f = model(row[None])[0]
        if columns is not None:
            f = f[list(columns)]
        total += gradient_of(f.square().sum(), model).abs()
    return total / len(x)


def inputs(stream: Stream, index: int) -> Tensor:
    return stream.prepare(stream[index].train.gather(torch.arange(len(stream[index].train)))[0])


@pytest.mark.parametrize(("scenario", "head"), [("class", None), ("task", None), ("task", "multi"), ("domain", None)])
def test_importances_sum_over_tasks_and_the_anchor_is_the_last(scenario: str, head: str | None) -> None:
    stream = toy_stream(scenario)
    penalty = MAS(strength=0.01)
    model = toy_model(2 if scenario == "domain" else 6, head)
    learner = perdure.Learner(model, sgd, [penalty], scenario=scenario)
    expected = torch.zeros(0)
    for task in stream:
        learner.fit_task(task, batch_size=8)
        if head == "multi":
            model.head.activate(task.index)
        found = omega_by_loop(model, inputs(stream, task.index), task.classes if scenario == "task" else None)
        # A new head comes last in the module, and its importances begin at zero.
        expected = found + F.pad(expected, (0, len(found) - len(expected)))
        assert torch.allclose(values(learner.parameters, penalty.importance), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(penalty.anchor, learner.parameters.theta)
    assert expected.sum() > 0


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_training_equals_a_hand_written_loop(mode: str) -> None:
    stream = toy_stream("domain")
    ours, theirs = toy_model(2), toy_model(2)
    perdure.Learner(ours, sgd, [MAS(strength=0.06, mode=mode, gamma=0.7)]).fit(stream, epochs=2, batch_size=8)
    terms: list[tuple[Tensor, Tensor]] = []
    for task in stream:
        for x, y in batches(stream, task.index, epochs=2):
            loss = F.cross_entropy(theirs(x), y)
            flat = torch.cat([p.flatten() for p in theirs.parameters()])
            for omega, anchor in terms:
                loss = loss + 0.03 * (omega * (flat - anchor) ** 2).sum()
            sgd_step(theirs, gradient_of(loss, theirs))
        terms = [(0.7 * omega, anchor) for omega, anchor in terms]
        omega = omega_by_loop(theirs, inputs(stream, task.index))
        if mode == "online" and terms:
            omega = omega + terms.pop()[0]
        terms.append((omega, weights(theirs)))
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-5)


def test_signs_do_not_cancel_between_samples() -> None:
    """Two samples whose gradients are opposite: the batch's gradient is zero, the importance is not."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.tensor([[1.0], [-3.0]])  # d (w x + 1)^2 / dw = 2 (w x + 1) x: 4 and 12
    names = dict(model.named_parameters())
    assert float(output_sensitivity(model, [(x, x)], names=names)["weight"]) == pytest.approx(8.0)
    x = torch.tensor([[1.0], [-2.0]])  # 4 and 4
    assert float(output_sensitivity(model, [(x, x)], names=names)["weight"]) == pytest.approx(4.0)
    x = torch.tensor([[-0.5], [0.5], [-0.5]])  # -0.5, 1.5, -0.5
    assert float(output_sensitivity(model, [(x, x)], names=names)["weight"]) == pytest.approx(2.5 / 3)


def test_importances_do_not_depend_on_labels_or_on_the_batch_size() -> None:
    stream = toy_stream("class")
    penalty = MAS()
    learner = perdure.Learner(toy_model(), sgd, [penalty])
    learner.begin_task(stream[0])
    whole = penalty.estimate(learner.task_batches(stream[0]))
    for size in (1, 7, 40):
        parts = ((x, y.flip(0)) for x, y in learner.task_batches(stream[0], size))
        assert torch.allclose(penalty.estimate(parts), whole, rtol=1e-4, atol=1e-8)
    assert whole.sum() > 0


def test_outputs_that_are_scaled_scale_the_importance_of_what_is_below_by_the_square() -> None:
    model = toy_model(2)
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(2))
    names = dict(model.body.named_parameters(prefix="body"))
    before = output_sensitivity(model, [(x, x)], names=names)
    with torch.no_grad():
        model.head.weight.mul_(3), model.head.bias.mul_(3)
    after = output_sensitivity(model, [(x, x)], names=names)
    assert all(torch.allclose(after[name], 9 * before[name], rtol=1e-5) for name in names)


def test_outputs_that_are_not_finite_are_no_importance() -> None:
    model = nn.Linear(2, 2)
    learner = perdure.Learner(model, sgd, [MAS()])
    learner.begin_task("t", (torch.full((4, 2), 1e30), torch.zeros(4, dtype=torch.int64)))
    with torch.no_grad():
        model.weight.fill_(1e20)
    with pytest.raises(perdure.errors.DataError, match="not finite"):
        learner.end_task()
