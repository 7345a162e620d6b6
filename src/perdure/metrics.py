"""Every metric of the field, as pure functions on numpy arrays.

`matrix[i, j]` is the accuracy on task j after training on task i, both counted from 0; NaN says that it was not
evaluated or is not defined. `untrained[j]` is the accuracy on task j before any training. `after=i` gives a metric as
it stood after task i; left out, it is the last one.

A function raises `UsageError` for a NaN that it needs and never averages over it. It returns `None` where its own
definition says nothing, such as forward transfer with a single task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.errors import UsageError

Array = npt.NDArray[np.float64]
History = Sequence[Mapping[str, Any]]


class Description(NamedTuple):
    """How a metric is called, which direction is good, and what it is in one clause."""

    label: str
    better: Literal["higher", "lower"]
    meaning: str


DESCRIPTIONS: dict[str, Description] = {
    "final_average_accuracy": Description(
        "final average accuracy", "higher", "the mean accuracy over all tasks after the last one"
    ),
    "average_incremental_accuracy": Description(
        "average incremental accuracy", "higher", "the mean, over the tasks, of the accuracy on everything seen so far"
    ),
    "forgetting": Description(
        "forgetting", "lower", "how far the earlier tasks have dropped below the best they ever were, on average"
    ),
    "backward_transfer": Description(
        "backward transfer", "higher", "how much the earlier tasks have changed since each was learned, on average"
    ),
    "forward_transfer": Description(
        "forward transfer", "higher", "how much better a task is before its training than with an untrained model"
    ),
    "learning_accuracy": Description(
        "learning accuracy", "higher", "the mean accuracy on each task right after it was learned (plasticity)"
    ),
    "task_restricted_accuracy": Description(
        "task-restricted accuracy", "higher", "the final average accuracy if the model is told the task of each example"
    ),
    "task_inference_accuracy": Description(
        "task inference accuracy", "higher", "the share of the task-restricted accuracy that is left without being told"
    ),
    "minimum_accuracy": Description(
        "minimum accuracy", "higher", "the lowest an earlier task ever fell to, at any evaluation, on average"
    ),
    "worst_case_accuracy": Description(
        "worst-case accuracy", "higher", "the accuracy on the last task joined with the minimum accuracy of the others"
    ),
    "average_anytime_accuracy": Description(
        "average anytime accuracy", "higher", "the mean over all evaluations of the accuracy on the tasks begun by then"
    ),
    "prequential_accuracy": Description(
        "prequential accuracy", "higher", "the share of new examples predicted correctly before they were learned from"
    ),
    "stability": Description("stability", "higher", "one minus forgetting"),
    "stability_plasticity": Description(
        "stability-plasticity", "higher", "the harmonic mean of stability and learning accuracy"
    ),
}


def accuracy(predictions: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Share of `predictions` [n] that equal `targets` [n].

    >>> accuracy([0, 1, 2, 2], [0, 1, 1, 2])
    0.75
    """
    predicted, true = _labels(predictions, targets)
    return float(np.mean(predicted == true))


def average_accuracy(matrix: npt.ArrayLike, *, after: int | None = None) -> float:
    """ACC_i = mean over j <= i of R[i, j] (Lopez-Paz and Ranzato, 2017, arXiv:1706.08840).

    >>> average_accuracy([[0.9, 0.1], [0.5, 0.8]])
    0.65
    >>> average_accuracy([[0.9, 0.1], [0.5, 0.8]], after=0)
    0.9
    """
    R, i = _matrix(matrix, after)
    return float(np.mean([_cell(R, i, j, "average accuracy") for j in range(i + 1)]))


def average_incremental_accuracy(
    matrix: npt.ArrayLike, *, test_sizes: npt.ArrayLike | None = None, after: int | None = None
) -> float:
    """AIA_i = mean over k <= i of A_k, the accuracy on all seen up to task k (Rebuffi et al., 2017, arXiv:1611.07725).

    With `test_sizes` [T] (examples in each test set) A_k is the accuracy on the union of the seen test sets, so that
    every example counts once: the class-incremental definition. Without, A_k is `average_accuracy(after=k)`, where
    every task counts once: the definition for task- and domain-incremental streams.

    >>> average_incremental_accuracy([[1.0, 0.0], [0.5, 0.8]])
    0.825
    >>> average_incremental_accuracy([[1.0, 0.0], [0.5, 0.8]], test_sizes=[200, 100])
    0.8
    """
    R, i = _matrix(matrix, after)
    sizes = np.ones(len(R)) if test_sizes is None else np.asarray(test_sizes, dtype=np.float64)
    if sizes.shape != (len(R),) or not (sizes > 0).all():
        raise UsageError(f"test_sizes must be {len(R)} positive numbers, one a task; they are {sizes.tolist()}")
    seen = []
    for k in range(i + 1):
        row = [_cell(R, k, j, "average incremental accuracy") for j in range(k + 1)]
        seen.append(float(np.dot(row, sizes[: k + 1]) / sizes[: k + 1].sum()))
    return float(np.mean(seen))


def learning_accuracy(matrix: npt.ArrayLike, *, after: int | None = None) -> float:
    """LA_i = mean over j <= i of R[j, j], also called plasticity (Riemer et al., 2019, arXiv:1810.11910).

    >>> learning_accuracy([[0.9, 0.1], [0.5, 0.7]])
    0.8
    """
    R, i = _matrix(matrix, after)
    return float(np.mean([_cell(R, j, j, "learning accuracy") for j in range(i + 1)]))


plasticity = learning_accuracy


def forgetting(matrix: npt.ArrayLike, *, after: int | None = None) -> float:
    """F_i = mean over j < i of (max over j <= l < i of R[l, j]) - R[i, j] (Chaudhry et al., 2018, arXiv:1801.10112).

    The maximum leaves out row i itself, so a task that improves at the last step has negative forgetting. With no
    earlier task it is 0.

    >>> forgetting([[0.75, 0.0], [0.5, 0.8]])
    0.25
    """
    R, i = _matrix(matrix, after)
    drops = [max(_cell(R, k, j, "forgetting") for k in range(j, i)) - _cell(R, i, j, "forgetting") for j in range(i)]
    return float(np.mean(drops)) if drops else 0.0


def backward_transfer(matrix: npt.ArrayLike, *, after: int | None = None) -> float:
    """BWT_i = mean over j < i of R[i, j] - R[j, j], 0 if i = 0 (Lopez-Paz and Ranzato, 2017, arXiv:1706.08840).

    >>> backward_transfer([[0.75, 0.0], [0.5, 0.8]])
    -0.25
    """
    R, i = _matrix(matrix, after)
    changes = [_cell(R, i, j, "backward transfer") - _cell(R, j, j, "backward transfer") for j in range(i)]
    return float(np.mean(changes)) if changes else 0.0


def forward_transfer(matrix: npt.ArrayLike, untrained: npt.ArrayLike, *, after: int | None = None) -> float | None:
    """FWT_i = mean over 1 <= j <= i of R[j-1, j] - untrained[j] (Lopez-Paz and Ranzato, 2017, arXiv:1706.08840).

    `None` with a single task. It is defined only if a task's outputs exist before its training, so not for
    class-incremental columns and not for heads that are made when their task begins.

    >>> forward_transfer([[0.9, 0.25], [0.5, 0.8]], untrained=[0.1, 0.125])
    0.125
    """
    R, i = _matrix(matrix, after)
    base = _per_task(untrained, len(R), "untrained")
    gains = []
    for j in range(1, i + 1):
        if np.isnan(base[j]):
            raise UsageError(f"forward transfer needs the untrained accuracy on task {j}, which {_MISSING}")
        gains.append(_cell(R, j - 1, j, "forward transfer") - float(base[j]))
    return float(np.mean(gains)) if gains else None


def intransigence(matrix: npt.ArrayLike, joint: npt.ArrayLike, *, after: int | None = None) -> float:
    """I_i = joint[i] - R[i, i] (Chaudhry et al., 2018, arXiv:1801.10112).

    `joint` [T] holds the accuracy on task i of a reference model trained on tasks 0 to i together. Negative values mean
    that the stream helped.

    >>> intransigence([[0.75, 0.1], [0.5, 0.75]], joint=[0.75, 1.0])
    0.25
    """
    R, i = _matrix(matrix, after)
    reference = _per_task(joint, len(R), "joint")
    if np.isnan(reference[i]):
        raise UsageError(f"intransigence needs the joint accuracy on task {i}, which {_MISSING}")
    return float(reference[i]) - _cell(R, i, i, "intransigence")


def stability(
    matrix: npt.ArrayLike, *, kind: Literal["forgetting", "retained"] = "forgetting", after: int | None = None
) -> float:
    """1 - F_i, or with `kind="retained"` the mean over j < i of R[i, j] / R[j, j]; 1 with no earlier task.

    >>> stability([[0.75, 0.0], [0.5, 0.8]])
    0.75
    >>> round(stability([[0.75, 0.0], [0.5, 0.8]], kind="retained"), 4)
    0.6667
    """
    if kind == "forgetting":
        return 1.0 - forgetting(matrix, after=after)
    if kind != "retained":
        raise UsageError(f"stability has no kind '{kind}'; 'forgetting' and 'retained' are allowed")
    R, i = _matrix(matrix, after)
    shares = []
    for j in range(i):
        learned = _cell(R, j, j, "stability")
        if learned == 0.0:
            raise UsageError(f"the retained share of task {j} is not defined: its accuracy when learned was 0")
        shares.append(_cell(R, i, j, "stability") / learned)
    return float(np.mean(shares)) if shares else 1.0


def harmonic_mean(stability: float, plasticity: float) -> float:
    """2 s p / (s + p), and 0 if both are 0: a secondary number beside stability and plasticity, not a summary of them.

    >>> harmonic_mean(1.0, 0.5)
    0.6666666666666666
    """
    if not (stability >= 0 and plasticity >= 0):
        raise UsageError(f"a harmonic mean needs two numbers that are not negative, not {stability} and {plasticity}")
    total = stability + plasticity
    return 2 * stability * plasticity / total if total else 0.0


def task_inference_accuracy(
    class_incremental: npt.ArrayLike, task_restricted: npt.ArrayLike, *, after: int | None = None
) -> float | None:
    """ACC_i of the class-incremental matrix over ACC_i of the task-restricted one; `None` if the latter is 0.

    An example that is right among all classes is right among its task's classes too, so this is the share of those that
    the model also assigns to the right task.

    >>> task_inference_accuracy([[0.5]], [[1.0]])
    0.5
    """
    restricted = average_accuracy(task_restricted, after=after)
    return average_accuracy(class_incremental, after=after) / restricted if restricted else None


def lca(curves: npt.ArrayLike, *, beta: int = 10) -> float:
    """LCA = mean over n = 0..beta of Z_n, the learning curve's area (Chaudhry et al., 2019, arXiv:1812.00420).

    `curves` [T, at least beta + 1] holds the accuracy on task k after n of its own minibatches (n = 0: before the
    first); Z_n is its mean over tasks.

    >>> lca([[0.0, 0.5, 1.0], [0.5, 1.0, 1.0]], beta=1)
    0.5
    """
    Z = np.asarray(curves, dtype=np.float64)
    if Z.ndim != 2 or not 0 <= beta < Z.shape[1]:
        raise UsageError(f"lca with beta {beta} needs an array [tasks, at least {beta + 1}]; it is {list(Z.shape)}")
    used = Z[:, : beta + 1]
    if np.isnan(used).any():
        raise UsageError(f"lca needs the accuracy of every task after 0 to {beta} minibatches; some are NaN")
    return float(used.mean())


def minimum_accuracy(matrix: npt.ArrayLike, history: History = (), *, after: int | None = None) -> float | None:
    """min-ACC_i = mean over j < i of the lowest accuracy on task j in any evaluation after it (De Lange et al., 2023).

    The evaluations are rows j+1 to i of the matrix and those of `history`, a list of
    `{"task": k, "step": s, "accuracies": [T]}` made while task k was trained. Only a dense history shows the stability
    gap. `None` with no earlier task.

    >>> minimum_accuracy([[0.9, 0.0], [0.7, 0.8]], [{"task": 1, "step": 5, "accuracies": [0.25, 0.1]}])
    0.25
    """
    R, i = _matrix(matrix, after)
    lowest = []
    for j in range(i):
        scores = [_cell(R, k, j, "minimum accuracy") for k in range(j + 1, i + 1)]
        scores += [_past(entry, j, "minimum accuracy") for entry in history if j < entry["task"] <= i]
        lowest.append(min(scores))
    return float(np.mean(lowest)) if lowest else None


def worst_case_accuracy(matrix: npt.ArrayLike, history: History = (), *, after: int | None = None) -> float:
    """WC-ACC = R[i, i] / n + (1 - 1/n) min-ACC_i with n = i + 1 (De Lange et al., 2023).

    >>> worst_case_accuracy([[0.9, 0.0], [0.5, 0.75]])
    0.625
    """
    R, i = _matrix(matrix, after)
    current = _cell(R, i, i, "worst-case accuracy")
    lowest = minimum_accuracy(R, history, after=i)
    return current if lowest is None else current / (i + 1) + (1 - 1 / (i + 1)) * lowest


def average_anytime_accuracy(matrix: npt.ArrayLike, history: History = (), *, after: int | None = None) -> float:
    """Mean, over all evaluations up to the end of task i, of the mean accuracy on the tasks begun by then.

    The evaluations are those of `history` (while a task was trained) and the rows of the matrix (after each task).

    >>> average_anytime_accuracy([[1.0, 0.0], [0.5, 1.0]], [{"task": 0, "step": 5, "accuracies": [0.5, 0.0]}])
    0.75
    """
    R, i = _matrix(matrix, after)
    name = "average anytime accuracy"
    points = [[_past(entry, j, name) for j in range(entry["task"] + 1)] for entry in history if entry["task"] <= i]
    points += [[_cell(R, k, j, name) for j in range(k + 1)] for k in range(i + 1)]
    return float(np.mean([np.mean(point) for point in points]))


def prequential_accuracy(predictions: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Correct predictions / samples, each prediction made before the update that uses its sample (online accuracy).

    >>> prequential_accuracy([0, 0, 1, 1], [0, 1, 1, 1])
    0.75
    """
    return accuracy(predictions, targets)


def old_to_new_bias(predictions: npt.ArrayLike, targets: npt.ArrayLike, new_classes: Sequence[int]) -> float | None:
    """Share of the samples of old classes that are predicted as one of `new_classes`; `None` if there are none of them.

    >>> old_to_new_bias([0, 2, 2, 3], [0, 0, 1, 3], new_classes=[2, 3])
    0.6666666666666666
    """
    predicted, true = _labels(predictions, targets)
    old = ~np.isin(true, list(new_classes))
    return float(np.mean(np.isin(predicted[old], list(new_classes)))) if old.any() else None


def expected_calibration_error(probabilities: npt.ArrayLike, targets: npt.ArrayLike, *, bins: int = 15) -> float:
    """ECE = sum over bins of (share of samples) |accuracy - mean confidence| (Guo et al., 2017, arXiv:1706.04599).

    `probabilities` [n, C]; confidence is their maximum; the bins ((m-1)/bins, m/bins] have equal width.

    >>> expected_calibration_error([[0.75, 0.25], [0.75, 0.25]], [0, 1])
    0.25
    """
    p, y = _probabilities(probabilities, targets)
    if bins < 1:
        raise UsageError(f"the calibration error needs at least one bin, not {bins}")
    confidence = p.max(axis=1)
    gap = (p.argmax(axis=1) == y) - confidence
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(index, weights=gap, minlength=bins)).sum() / len(y))


def negative_log_likelihood(probabilities: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """NLL = mean of -log p[y] in nats; a probability that has underflowed to 0 counts as the smallest normal float32.

    >>> round(negative_log_likelihood([[0.5, 0.5]], [0]), 4)
    0.6931
    """
    p, y = _probabilities(probabilities, targets)
    return float(np.mean(-np.log(np.maximum(p[np.arange(len(y)), y], np.finfo(np.float32).tiny))))


def brier_score(probabilities: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Mean over samples of the sum over classes of (p_c - [c = y])^2, between 0 and 2 (Brier, 1950).

    >>> brier_score([[0.5, 0.5]], [0])
    0.5
    """
    p, y = _probabilities(probabilities, targets)
    return float(np.mean(((p - np.eye(p.shape[1])[y]) ** 2).sum(axis=1)))


_MISSING = "was not evaluated or is not defined (NaN)"


def _matrix(matrix: npt.ArrayLike, after: int | None) -> tuple[Array, int]:
    R = np.asarray(matrix, dtype=np.float64)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or not len(R):
        raise UsageError(f"an accuracy matrix has shape [T, T] with T at least 1, not {list(R.shape)}")
    i = len(R) - 1 if after is None else after
    if not 0 <= i < len(R):
        raise UsageError(f"after={after} is not a task; this stream has tasks 0 to {len(R) - 1}")
    return R, i


def _cell(R: Array, i: int, j: int, metric: str) -> float:
    if np.isnan(R[i, j]):
        raise UsageError(f"{metric} needs the accuracy on task {j} after task {i}, which {_MISSING}")
    return float(R[i, j])


def _past(entry: Mapping[str, Any], j: int, metric: str) -> float:
    value = entry["accuracies"][j]
    if value is None or np.isnan(value):
        where = f"at step {entry.get('step')} of task {entry['task']}"
        raise UsageError(f"{metric} needs the accuracy on task {j} {where}, which {_MISSING}")
    return float(value)


def _per_task(values: npt.ArrayLike, tasks: int, name: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (tasks,):
        raise UsageError(f"{name} must have shape [{tasks}], one value a task, not {list(array.shape)}")
    return array


def _labels(predictions: npt.ArrayLike, targets: npt.ArrayLike) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    predicted, true = np.asarray(predictions), np.asarray(targets)
    if predicted.ndim != 1 or predicted.shape != true.shape or not len(true):
        raise UsageError(
            f"predictions and targets must be two arrays [n] with n at least 1, not {list(predicted.shape)} "
            f"and {list(true.shape)}"
        )
    for name, array in (("predictions", predicted), ("targets", true)):
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise UsageError(f"{name} hold NaN where a class is needed")
    return predicted, true


def _probabilities(probabilities: npt.ArrayLike, targets: npt.ArrayLike) -> tuple[Array, npt.NDArray[np.int64]]:
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(targets)
    if p.ndim != 2 or y.shape != p.shape[:1] or not len(y):
        raise UsageError(f"probabilities [n, C] and targets [n] are needed, not {list(p.shape)} and {list(y.shape)}")
    # Written as "not all right" so that NaN fails it too; the tolerance is that of a half-precision softmax.
    if not ((p >= 0).all() and (np.abs(p.sum(axis=1) - 1) < 1e-2).all()):
        raise UsageError("probabilities must be numbers of at least 0 whose rows sum to 1; softmax makes them so")
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= p.shape[1]:
        raise UsageError(f"targets must be integer columns 0 to {p.shape[1] - 1}")
    return p, y.astype(np.int64)
