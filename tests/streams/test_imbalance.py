from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numbered_streams import arrived, numbered

from perdure.data.examples import Examples
from perdure.errors import UsageError
from perdure.streams import imbalanced
from perdure.streams.task import Stream, Task


def counts(stream: Stream) -> list[int]:
    return torch.bincount(torch.cat([task.train.targets for task in stream]), minlength=stream.columns).tolist()


@given(factor=st.floats(1.0, 200.0), tasks=st.integers(1, 4))
def test_a_long_tail_falls_by_the_same_factor_from_class_to_class(factor: float, tasks: int) -> None:
    stream = imbalanced(numbered([400] * tasks), imbalance=factor)
    classes = 2 * tasks
    expected = [200 * factor ** (-k / (classes - 1)) for k in range(classes)]
    assert all(abs(found - wanted) <= 0.5 or found == 1 for found, wanted in zip(counts(stream), expected, strict=True))
    assert counts(stream)[0] == 200


def test_the_frequent_classes_come_first_or_anywhere() -> None:
    base = numbered([200] * 5)
    ordered, shuffled = (counts(imbalanced(base, imbalance=50, imbalance_order=o)) for o in ("ordered", "shuffled"))
    assert ordered == sorted(ordered, reverse=True)
    assert shuffled != ordered
    assert sorted(shuffled) == sorted(ordered)
    assert shuffled == counts(imbalanced(base, imbalance=50, imbalance_order="shuffled"))
    other = base.replace(base.tasks, seed=8)
    assert shuffled != counts(imbalanced(other, imbalance=50, imbalance_order="shuffled"))


def test_given_sizes_are_kept_and_test_sets_are_untouched() -> None:
    base = numbered([20, 20])
    stream = imbalanced(base, class_sizes=[10, 3, 1, 7])
    assert counts(stream) == [10, 3, 1, 7]
    assert all(task.test is old.test for task, old in zip(stream, base, strict=True))
    assert all(set(rows) <= set(old) for rows, old in zip(arrived(stream), arrived(base), strict=True))
    domain = imbalanced(numbered([20, 20], scenario="domain"), class_sizes=[10, 3])
    assert [torch.bincount(task.train.targets).tolist() for task in domain] == [[10, 3], [10, 3]]


def test_what_cannot_be_made_rare_is_refused() -> None:
    base = numbered([20, 20])
    with pytest.raises(UsageError, match=r"imbalance=0\.5 should be at least 1"):
        imbalanced(base, imbalance=0.5)
    with pytest.raises(UsageError, match=r"column 1 should have 11 rows, but task 0 \('t0'\) has 10"):
        imbalanced(base, class_sizes=[10, 11, 1, 1])
    with pytest.raises(UsageError, match=r"class_sizes=\[1, 1\] should be 4 positive numbers"):
        imbalanced(base, class_sizes=[1, 1])
    with pytest.raises(UsageError, match="unknown imbalance_order 'orderd'; did you mean 'ordered'"):
        imbalanced(base, imbalance_order="orderd")
    regression = Stream([Task(0, "a", Examples(torch.rand(4, 1), torch.rand(4)), None, ())], scenario="domain")
    with pytest.raises(UsageError, match="are no classes"):
        imbalanced(regression)
