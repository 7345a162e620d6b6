"""BiC: what is held out, how the correction is found, and where it is applied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_problems import batches, momentum, same_bits, sgd, toy_model, toy_stream
from torch import Tensor
from torch.nn import functional as F

import perdure
from perdure.data.examples import Examples
from perdure.methods import VCL, BiC
from perdure.methods.bic import Correction, fit_correction


def begun(tasks: int = 1, **options: Any) -> tuple[perdure.Learner, BiC, Any]:
    """A learner inside the task after so many."""
    stream = toy_stream("class", rows=80)
    method = BiC(**{"capacity": 36, "holdout": 0.25, **options})
    learner = perdure.Learner(toy_model(), sgd, [method], scenario="class")
    for task in stream[:tasks]:
        learner.fit_task(task, batch_size=8)
    learner.begin_task(stream[tasks])
    return learner, method, stream


def rows_of(data: Examples) -> list[tuple[float, ...]]:
    return [tuple(row) for row in data.gather(torch.arange(len(data)))[0].tolist()]


def test_what_is_held_out_is_balanced_and_never_trained_on() -> None:
    learner, method, stream = begun(2)
    train, held = learner.task.train, method._held_out
    assert torch.bincount(held.targets).tolist() == [2] * 6  # a quarter of 9 exemplars of each of 4 classes
    assert not set(rows_of(train)) & set(rows_of(held))
    exemplars = {tuple(row) for x in method.exemplars.rows.values() for row in x.tolist()}
    assert set(rows_of(train)) | set(rows_of(held)) == exemplars | set(rows_of(stream[2].train))
    assert torch.bincount(train.targets).tolist() == [7] * 4 + [38] * 2


def test_the_same_rows_are_held_out_when_the_task_is_begun_again() -> None:
    learner, method, stream = begun()
    first = rows_of(method._held_out), rows_of(learner.task.train)
    method.training_data(stream[1])
    assert (rows_of(method._held_out), rows_of(learner.task.train)) == first


def test_the_first_task_has_nothing_to_correct() -> None:
    learner, method, stream = begun(0)
    assert method._held_out is None
    assert rows_of(learner.task.train) == rows_of(stream[0].train)
    learner.end_task()
    assert (method.correction.factor, method.correction.offset, method.correction.columns) == (1.0, 0.0, [])


def random_problem(shift: float) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(4)
    targets = torch.arange(60) % 6
    outputs = torch.randn(60, 6, generator=draw, dtype=torch.float64)
    outputs[torch.arange(60), targets] += 1.5
    new = torch.tensor([False, True, False, False, True, False])
    return torch.where(new, 2.0 * outputs + shift, outputs), targets, new


@pytest.mark.parametrize("shift", [0.0, 4.0, -30.0])
def test_the_correction_is_the_minimum_of_the_cross_entropy(shift: float) -> None:
    outputs, targets, new = random_problem(shift)
    a, b = fit_correction(outputs, targets, new, decay=1e-9)
    values = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(torch.where(new, values[0] * outputs + values[1], outputs), targets)
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient.abs().max() < 1e-7
    for near in ((a + 0.05, b), (a - 0.05, b), (a, b + 0.05), (a, b - 0.05)):
        other = F.cross_entropy(torch.where(new, near[0] * outputs + near[1], outputs), targets)
        assert other > loss
    undone = 2 * a, a * shift + b  # together with what was done to the outputs
    assert undone == pytest.approx(fit_correction(*undistorted(), decay=1e-9), abs=0.02)


def undistorted() -> tuple[Tensor, Tensor, Tensor]:
    outputs, targets, new = random_problem(0.0)
    return torch.where(new, outputs / 2, outputs), targets, new


def test_where_all_rows_are_right_the_correction_stays_finite() -> None:
    outputs = torch.eye(4, dtype=torch.float64) * 50
    a, b = fit_correction(outputs, torch.arange(4), torch.tensor([False, False, True, True]), decay=2e-4)
    assert abs(a) < 100
    assert abs(b) < 100


def test_the_correction_found_by_the_method_is_that_of_its_held_out_rows_under_the_final_network() -> None:
    learner, method, stream = begun()
    for x, y in batches(stream, 1)[:5]:
        learner.step(x, y)
    held = method._held_out
    x, y = held.gather(torch.arange(len(held)))
    learner.end_task()
    with torch.no_grad():
        outputs = learner.model(x).double()[:, :4]
    a, b = fit_correction(outputs, y, torch.tensor([False, False, True, True]), decay=2e-4)
    assert (method.correction.factor, method.correction.offset) == pytest.approx((a, b), abs=1e-9)
    assert method.correction.columns == [2, 3]
    assert (a, b) != pytest.approx((1.0, 0.0), abs=1e-2)
    x = torch.cat([task.test.x for task in stream])
    expected = learner.model(x)[:, :4].detach()
    expected[:, 2:] = a * expected[:, 2:] + b
    assert torch.equal(learner.predict(x), expected.argmax(1))


def test_the_old_model_that_is_distilled_is_corrected_and_the_new_one_starts_uncorrected() -> None:
    learner, method, stream = begun(2)
    x, _ = batches(stream, 2)[0]
    taught = method.teach(learner.forward.inputs(x))
    raw = learner.model(x).detach()
    assert method.taught.columns == [2, 3]
    assert torch.allclose(taught[:, 2:4], method.taught.factor * raw[:, 2:4] + method.taught.offset)
    assert torch.equal(taught[:, [0, 1, 4, 5]], raw[:, [0, 1, 4, 5]])
    assert method.correction.columns == []
    assert torch.equal(learner.predict(x), raw.argmax(1))
    p = (taught[:, :4] / 2).softmax(1)
    expected = (p * (p.log() - (raw[:, :4] / 2).log_softmax(1))).sum(1).mean() * 4 * (4 / 6)
    batch = method.on_batch(perdure.batch.Batch.current(x, torch.full((8,), 4), 2))
    assert batch.now.share == pytest.approx(2 / 6)
    assert float(method.loss(batch, raw)) == pytest.approx(float(expected), rel=1e-4)


def test_a_preference_for_new_classes_is_taken_back() -> None:
    """Two new classes with three times as many rows as the exemplars of the old ones have."""
    stream = toy_stream("class", rows=200)
    learner = perdure.Learner(toy_model(), sgd, [BiC(capacity=60, alpha=0.2)], scenario="class")
    for task in stream[:2]:
        learner.fit_task(task, batch_size=8, epochs=5)
    method = learner.methods[0]
    x = torch.cat([task.train.x for task in stream[:2]])
    raw = int((learner.model(x)[:, :4].argmax(1) >= 2).sum())
    corrected = int((learner.predict(x) >= 2).sum())
    assert raw > 240
    assert 160 <= corrected < raw
    assert method.correction.offset < 0


def test_a_correction_survives_saving() -> None:
    saved = Correction(0.5, -2.0, [2, 3]).state_dict()
    other = Correction()
    other.load_state_dict(saved)
    z = torch.ones(1, 5)
    assert other(z).tolist() == [[1.0, 1.0, -1.5, -1.5, 1.0]]
    assert z.tolist() == [[1.0] * 5]


@pytest.mark.parametrize("off", [{"capacity": 0}, {"capacity": None, "per_class": 0}], ids=str)
def test_without_exemplars_it_is_fine_tuning(off: dict[str, Any]) -> None:
    stream = toy_stream("class")
    ours, plain = toy_model(norm=True), toy_model(norm=True)
    perdure.Learner(ours, momentum, [BiC(**off)]).fit(stream, batch_size=8)
    perdure.Learner(plain, momentum).fit(stream, batch_size=8)
    assert same_bits(ours, plain)


def test_without_rows_held_out_all_are_trained_on_and_nothing_is_corrected() -> None:
    learner, method, stream = begun(2, holdout=0.0)
    assert method._held_out is None
    exemplars = [tuple(row) for x in method.exemplars.rows.values() for row in x.tolist()]
    assert sorted(rows_of(learner.task.train)) == sorted(exemplars + rows_of(stream[2].train))
    learner.end_task()
    assert (method.correction.factor, method.correction.offset, method.correction.columns) == (1.0, 0.0, [])
    assert torch.equal(learner.predict(stream[2].test.x), learner.model(stream[2].test.x)[:, :6].argmax(1))


def test_refusals() -> None:
    with pytest.raises(perdure.errors.UsageError, match="1 exemplars a class cannot be divided"):
        begun(capacity=2)
    with pytest.raises(perdure.errors.IncompatibleError, match="'bic' and 'vcl' both own predict"):
        perdure.Learner(toy_model(), sgd, [BiC(), VCL()])
    with pytest.raises(perdure.errors.UsageError, match="holdout is"):
        BiC(holdout=0.95)
