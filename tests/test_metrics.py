"""Metrics against matrices worked out by hand, their definitions, and the mistakes the field keeps making."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from perdure import metrics as m
from perdure.errors import UsageError

NAN = math.nan
# Task 1 peaks after task 2, task 0 is forgotten and then partly relearned.
R = np.array(
    [
        [0.90, 0.20, 0.10],
        [0.50, 0.80, 0.30],
        [0.60, 0.85, 0.70],
    ]
)
UNTRAINED = np.array([0.05, 0.10, 0.15])
HISTORY = [
    {"task": 0, "step": 5, "accuracies": [0.40, 0.1, 0.1]},
    {"task": 1, "step": 5, "accuracies": [0.30, 0.40, 0.1]},
    {"task": 2, "step": 5, "accuracies": [0.35, 0.75, 0.5]},
]
# Class-incremental: what has not begun has no columns.
LOWER = np.where(np.tri(3, dtype=bool), R, NAN)


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    tasks = draw(st.integers(1, 6))
    return draw(arrays(np.float64, (tasks, tasks), elements=st.integers(0, 64).map(lambda k: k / 64)))


@pytest.mark.parametrize(
    ("metric", "after_0", "after_1", "after_2"),
    [
        (lambda i: m.average_accuracy(R, after=i), 0.9, 0.65, 2.15 / 3),
        (lambda i: m.average_incremental_accuracy(R, after=i), 0.9, (0.9 + 0.65) / 2, (0.9 + 0.65 + 2.15 / 3) / 3),
        (lambda i: m.learning_accuracy(R, after=i), 0.9, 0.85, 0.8),
        (lambda i: m.plasticity(R, after=i), 0.9, 0.85, 0.8),
        # After task 2: task 0 peaked at .9, task 1 at .8 (row 2 itself does not count).
        (lambda i: m.forgetting(R, after=i), 0.0, 0.4, ((0.9 - 0.6) + (0.8 - 0.85)) / 2),
        (lambda i: m.backward_transfer(R, after=i), 0.0, -0.4, ((0.6 - 0.9) + (0.85 - 0.8)) / 2),
        (lambda i: m.forward_transfer(R, UNTRAINED, after=i), None, 0.1, ((0.2 - 0.1) + (0.3 - 0.15)) / 2),
        (lambda i: m.intransigence(R, [0.95, 0.9, 0.6], after=i), 0.05, 0.1, -0.1),
        (lambda i: m.stability(R, after=i), 1.0, 0.6, 1 - 0.125),
        (lambda i: m.stability(R, kind="retained", after=i), 1.0, 0.5 / 0.9, (0.6 / 0.9 + 0.85 / 0.8) / 2),
        (lambda i: m.minimum_accuracy(R, after=i), None, 0.5, (0.5 + 0.85) / 2),
        (lambda i: m.minimum_accuracy(R, HISTORY, after=i), None, 0.3, (0.3 + 0.75) / 2),
        (lambda i: m.worst_case_accuracy(R, HISTORY, after=i), 0.9, 0.8 / 2 + 0.3 / 2, 0.7 / 3 + 2 / 3 * 0.525),
        (
            lambda i: m.average_anytime_accuracy(R, HISTORY, after=i),
            (0.4 + 0.9) / 2,
            (0.4 + 0.9 + 0.35 + 0.65) / 4,
            (0.4 + 0.9 + 0.35 + 0.65 + 1.6 / 3 + 2.15 / 3) / 6,
        ),
    ],
)
def test_a_matrix_worked_out_by_hand(metric, after_0, after_1, after_2):
    for i, expected in enumerate([after_0, after_1, after_2]):
        found = metric(i)
        assert found is None if expected is None else found == pytest.approx(expected, abs=1e-12)
    assert metric(None) == metric(2)


def test_a_prefix_of_the_stream_is_a_shorter_stream():
    for i in range(3):
        part = R[: i + 1, : i + 1]
        assert m.forgetting(R, after=i) == m.forgetting(part)
        assert m.average_accuracy(R, after=i) == m.average_accuracy(part)
        assert m.forward_transfer(R, UNTRAINED, after=i) == m.forward_transfer(part, UNTRAINED[: i + 1])


def test_the_class_incremental_average_counts_every_example_once():
    sizes = [100, 300, 600]
    correct = [90, 50 + 240, 60 + 255 + 420]
    seen = [100, 400, 1000]
    expected = np.mean(np.divide(correct, seen))
    by_sample, by_task = m.average_incremental_accuracy(LOWER, test_sizes=sizes), m.average_incremental_accuracy(LOWER)
    assert by_sample == pytest.approx(expected)
    assert by_sample != pytest.approx(by_task)
    assert m.average_incremental_accuracy(LOWER, test_sizes=[7, 7, 7]) == pytest.approx(by_task)


@given(matrices())
def test_forgetting_is_at_least_minus_backward_transfer_and_equal_iff_tasks_peak_when_learned(matrix):
    tasks = len(matrix)
    peaks_on_diagonal = all(matrix[k, j] <= matrix[j, j] for j in range(tasks) for k in range(j, tasks - 1))
    difference = m.forgetting(matrix) + m.backward_transfer(matrix)
    assert difference >= -1e-12
    assert (difference < 1e-12) == peaks_on_diagonal


@given(st.integers(1, 6), st.integers(0, 64))
def test_a_constant_matrix_has_no_transfer(tasks, value):
    matrix = np.full((tasks, tasks), value / 64)
    assert m.forgetting(matrix) == m.backward_transfer(matrix) == 0.0
    assert m.stability(matrix) == 1.0
    assert m.average_accuracy(matrix) == m.learning_accuracy(matrix) == value / 64


def test_a_single_task_has_neither_forgetting_nor_forward_transfer():
    assert m.forgetting([[0.7]]) == 0.0
    assert m.backward_transfer([[0.7]]) == 0.0
    assert m.forward_transfer([[0.7]], [0.1]) is None
    assert m.minimum_accuracy([[0.7]]) is None
    assert m.worst_case_accuracy([[0.7]]) == 0.7


def test_forgetting_may_be_negative_because_the_last_row_is_not_in_the_maximum():
    assert m.forgetting([[0.5, 0.0], [0.75, 0.5]]) == -0.25


def test_transfers_divide_by_the_number_of_earlier_tasks():
    matrix = [[1.0, 0.5, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]]
    assert m.backward_transfer(matrix) == -1.0
    assert m.forward_transfer(matrix, [0.0, 0.0, 0.0]) == 0.5


def test_forward_transfer_is_measured_from_the_untrained_model():
    assert m.forward_transfer(R, UNTRAINED) != 0.0
    assert m.forward_transfer(R, UNTRAINED + 0.01) == pytest.approx(m.forward_transfer(R, UNTRAINED) - 0.01)


NEEDS = {
    "average_accuracy": (lambda x: m.average_accuracy(x), {(2, 0), (2, 1), (2, 2)}),
    "average_incremental_accuracy": (
        lambda x: m.average_incremental_accuracy(x, test_sizes=[1, 2, 3]),
        {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)},
    ),
    "learning_accuracy": (lambda x: m.learning_accuracy(x), {(0, 0), (1, 1), (2, 2)}),
    "forgetting": (lambda x: m.forgetting(x), {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)}),
    "backward_transfer": (lambda x: m.backward_transfer(x), {(0, 0), (1, 1), (2, 0), (2, 1)}),
    "forward_transfer": (lambda x: m.forward_transfer(x, UNTRAINED), {(0, 1), (1, 2)}),
    "intransigence": (lambda x: m.intransigence(x, [1, 1, 1]), {(2, 2)}),
    "retained": (lambda x: m.stability(x, kind="retained"), {(0, 0), (1, 1), (2, 0), (2, 1)}),
    "minimum_accuracy": (lambda x: m.minimum_accuracy(x, HISTORY), {(1, 0), (2, 0), (2, 1)}),
    "worst_case_accuracy": (lambda x: m.worst_case_accuracy(x, HISTORY), {(1, 0), (2, 0), (2, 1), (2, 2)}),
    "average_anytime_accuracy": (
        lambda x: m.average_anytime_accuracy(x, HISTORY),
        {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)},
    ),
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_accuracy_is_an_error_if_needed_and_otherwise_changes_nothing(name):
    metric, needed = NEEDS[name]
    for cell in np.ndindex(3, 3):
        holed = R.copy()
        holed[cell] = NAN
        if cell in needed:
            with pytest.raises(UsageError, match=f"task {cell[1]} after task {cell[0]}"):
                metric(holed)
        else:
            assert metric(holed) == metric(R)


def test_other_missing_numbers_are_errors_too():
    with pytest.raises(UsageError, match="untrained accuracy on task 1"):
        m.forward_transfer(R, [NAN, NAN, 0.1])
    assert m.forward_transfer(R, [NAN, 0.1, 0.15]) == m.forward_transfer(R, UNTRAINED)
    with pytest.raises(UsageError, match="joint accuracy on task 2"):
        m.intransigence(R, [1, 1, NAN])
    with pytest.raises(UsageError, match="task 0 at step 7 of task 1"):
        m.minimum_accuracy(R, [{"task": 1, "step": 7, "accuracies": [None, 0.5, None]}])
    with pytest.raises(UsageError, match="NaN"):
        m.lca([[0.5, NAN]], beta=1)
    with pytest.raises(UsageError, match="probabilities"):
        m.brier_score([[0.5, NAN]], [0])
    with pytest.raises(UsageError, match="NaN"):
        m.accuracy([0, NAN], [0, 1])


def test_an_evaluation_counts_for_the_tasks_finished_before_it():
    # Task 1 is bad while it is being learned, which is no forgetting of it.
    history = [{"task": 1, "step": 0, "accuracies": [0.45, 0.0, 0.0]}]
    assert m.minimum_accuracy(R, history) == pytest.approx((0.45 + 0.85) / 2)


@pytest.mark.parametrize("after", [-1, 3])
def test_after_must_be_a_task(after):
    with pytest.raises(UsageError, match="tasks 0 to 2"):
        m.average_accuracy(R, after=after)


@pytest.mark.parametrize("matrix", [[[1.0, 0.5]], [0.5], np.zeros((0, 0))])
def test_a_matrix_must_be_square(matrix):
    with pytest.raises(UsageError, match=r"\[T, T\]"):
        m.forgetting(matrix)


def test_shares_that_divide_by_zero_are_not_invented():
    with pytest.raises(UsageError, match="task 0"):
        m.stability([[0.0, 0.0], [0.5, 0.5]], kind="retained")
    assert m.task_inference_accuracy([[0.0]], [[0.0]]) is None
    with pytest.raises(UsageError, match="positive"):
        m.average_incremental_accuracy(R, test_sizes=[1, 0, 1])


def test_harmonic_mean_lies_between_and_never_above_the_arithmetic_mean():
    assert m.harmonic_mean(0.5, 0.5) == 0.5
    assert m.harmonic_mean(0.0, 0.0) == 0.0
    assert m.harmonic_mean(0.2, 0.8) == pytest.approx(0.32)
    with pytest.raises(UsageError, match="not negative"):
        m.harmonic_mean(NAN, 0.5)


def test_lca_is_the_mean_of_the_first_points_of_the_curve():
    curves = np.array([[0.1, 0.5, 0.9, 0.0], [0.3, 0.7, 0.9, 0.0]])
    assert m.lca(curves, beta=0) == pytest.approx(0.2)
    assert m.lca(curves, beta=2) == pytest.approx((0.2 + 0.6 + 0.9) / 3)
    with pytest.raises(UsageError, match="beta 10"):
        m.lca(curves)


@given(st.permutations(range(40)))
def test_the_order_of_test_samples_does_not_matter(order):
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.ones(4), size=40)
    y = rng.integers(0, 4, size=40)
    shuffled = np.array(order)
    predicted = p.argmax(axis=1)
    assert m.accuracy(predicted[shuffled], y[shuffled]) == m.accuracy(predicted, y)
    assert m.old_to_new_bias(predicted[shuffled], y[shuffled], [3]) == m.old_to_new_bias(predicted, y, [3])
    for metric in (m.expected_calibration_error, m.negative_log_likelihood, m.brier_score):
        assert metric(p[shuffled], y[shuffled]) == pytest.approx(metric(p, y))


def test_calibration_error_against_a_loop_over_the_bins():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(5, 0.4), size=500)
    y = rng.integers(0, 5, size=500)
    expected = 0.0
    for b in range(15):
        inside = [k for k in range(500) if b / 15 < max(p[k]) <= (b + 1) / 15]
        if inside:
            confidence = np.mean([max(p[k]) for k in inside])
            right = np.mean([np.argmax(p[k]) == y[k] for k in inside])
            expected += len(inside) / 500 * abs(right - confidence)
    assert m.expected_calibration_error(p, y) == pytest.approx(expected)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    # 0.6 = 9/15 shares a bin with 0.58, where one right and one wrong nearly cancel; 0.62 does not.
    assert m.expected_calibration_error([[0.6, 0.4], [0.58, 0.42]], [1, 0]) == pytest.approx((0.6 - 0.42) / 2)
    assert m.expected_calibration_error([[0.62, 0.38], [0.58, 0.42]], [1, 0]) == pytest.approx((0.62 + 0.42) / 2)


def test_calibration_of_the_certain():
    certain = np.eye(3)
    assert m.expected_calibration_error(certain, [0, 1, 2]) == m.brier_score(certain, [0, 1, 2]) == 0.0
    assert m.negative_log_likelihood(certain, [0, 1, 2]) == 0.0
    assert m.expected_calibration_error(certain, [1, 2, 0]) == 1.0
    assert m.brier_score(certain, [1, 2, 0]) == 2.0
    assert 80 < m.negative_log_likelihood(certain, [1, 2, 0]) < 100


def test_logits_are_not_taken_for_probabilities():
    with pytest.raises(UsageError, match="softmax"):
        m.expected_calibration_error([[2.0, -1.0]], [0])
    with pytest.raises(UsageError, match="columns 0 to 1"):
        m.brier_score([[0.5, 0.5]], [2])


def test_bias_looks_at_old_samples_only():
    targets, predictions = [0, 0, 1, 1, 2, 2], [0, 2, 2, 1, 2, 0]
    assert m.old_to_new_bias(predictions, targets, new_classes=[2]) == 0.5
    assert m.old_to_new_bias([2, 2], [2, 2], new_classes=[2]) is None


def test_prequential_accuracy_is_correct_predictions_over_samples():
    assert m.prequential_accuracy([1, 1, 0], [1, 0, 0]) == pytest.approx(2 / 3)
    with pytest.raises(UsageError, match="n at least 1"):
        m.prequential_accuracy([], [])
