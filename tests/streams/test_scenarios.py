from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import TensorDataset

from perdure.data.examples import DatasetExamples, Examples
from perdure.errors import DataError, UsageError
from perdure.seeding import generator
from perdure.streams.classes import hold_out, order_classes, task_sizes
from perdure.streams.scenarios import (
    class_incremental,
    domain_incremental,
    split_classes,
    task_incremental,
    transformed,
)
from perdure.streams.task import Stream
from perdure.streams.transforms import Permute


def numbered(labels: list[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Inputs that are their own row numbers."""
    return torch.arange(len(labels)).float().unsqueeze(1), torch.as_tensor(labels)


def rows_of(examples: Examples | None) -> list[int]:
    if examples is None:
        return []
    return [int(row) for x, _, _ in examples.ordered(1000) for row in x]


LABELS = st.lists(st.sampled_from([0, 1, 3, 4, 8, 9]), min_size=12, max_size=60).map(
    lambda found: [0, 1, 3, 4, 8, 9, *found]
)


@given(
    labels=LABELS,
    class_order=st.sampled_from([None, "natural", "shuffled"]) | st.permutations([0, 1, 3, 4, 8, 9]),
    tasks=st.sampled_from([1, 2, 3, 6, [1, 5], [2, 3, 1]]),
    fraction=st.sampled_from([0.0, 0.2, 0.5]),
    scenario=st.sampled_from(["class", "task"]),
)
def test_tasks_are_disjoint_and_together_the_data_set(
    labels: list[int], class_order: Any, tasks: Any, fraction: float, scenario: str
) -> None:
    stream = split_classes(
        numbered(labels), scenario=scenario, tasks=tasks, class_order=class_order, test_fraction=fraction
    )
    seen = [row for task in stream for part in (task.train, task.test) for row in rows_of(part)]
    assert sorted(seen) == list(range(len(labels)))
    assert [column for task in stream for column in task.classes] == list(range(6))
    assert sorted(stream.class_order) == [0, 1, 3, 4, 8, 9]
    for task in stream:
        for part in (task.train, task.test):
            if part is not None:
                assert set(part.targets.tolist()) <= set(task.classes)
                assert [stream.class_order[column] for column in part.targets.tolist()] == [
                    labels[row] for row in rows_of(part)
                ]
                assert rows_of(part) == sorted(rows_of(part))
        names = [stream.class_names[column] for column in task.classes]
        assert task.name == (", ".join(names) if len(names) < 6 else f"{names[0]} ... {names[-1]}")


@given(labels=LABELS, tasks=st.sampled_from([1, 2, 3]), order=st.permutations([0, 1, 3, 4, 8, 9]))
def test_a_domain_split_numbers_classes_within_their_task(labels: list[int], tasks: int, order: list[int]) -> None:
    stream = domain_incremental(numbered(labels), tasks=tasks, class_order=order)
    width = 6 // tasks
    assert stream.columns == width
    for task in stream:
        assert task.classes == tuple(range(width))
        own = order[task.index * width : (task.index + 1) * width]
        assert [own[target] for target in task.train.targets.tolist()] == [labels[row] for row in rows_of(task.train)]
    assert stream.class_names[0] == "/".join(str(label) for label in order[::width])


def test_a_given_test_set_is_split_alike_and_nothing_is_held_out() -> None:
    x, y = numbered([0, 1, 2, 3] * 5)
    stream = class_incremental((x, y), (x + 100, y.flip(0)), tasks=2, class_order=[2, 0, 3, 1])
    assert sum(len(task.train) for task in stream) == 20
    assert stream[1].test is not None
    assert [3 - row % 4 for row in rows_of(stream[1].test)] == [
        stream.class_order[column] for column in stream[1].test.targets.tolist()
    ]


def test_a_task_without_test_rows_has_no_test_set() -> None:
    x, y = numbered([0, 1, 2, 3])
    stream = class_incremental((x, y), (x[:2], y[:2]), tasks=2)
    assert stream[0].test is not None
    assert stream[1].test is None


@pytest.mark.parametrize("wrap", [lambda x, y: (x, y), lambda x, y: (x.numpy(), y.numpy()), TensorDataset, Examples])
def test_every_form_of_the_data_gives_the_same_stream(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    x, y = numbered([0, 1, 2, 3] * 5)
    expected = task_incremental((x, y), tasks=2, seed=3)
    assert task_incremental(wrap(x, y), tasks=2, seed=3).fingerprint() == expected.fingerprint()


def test_the_tasks_share_the_memory_of_tensors_that_were_passed() -> None:
    x, y = numbered([0, 1, 2, 3] * 5)
    for task in class_incremental((x, y), tasks=4):
        assert task.train.x.data_ptr() == x.data_ptr()


def test_items_of_a_data_set_are_read_by_task() -> None:
    x, y = numbered([0, 1, 2, 3] * 5)
    stream = class_incremental(DatasetExamples(TensorDataset(x, y)), tasks=2)
    assert [y[row] for row in rows_of(stream[1].train)] == stream[1].train.targets.tolist()


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=5), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 9)
)
def test_every_class_gives_its_share_of_test_rows(counts: list[int], fraction: float, seed: int) -> None:
    targets = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    targets = targets[torch.randperm(len(targets), generator=generator(seed))]
    train, test = hold_out(targets, fraction, generator(seed, "test"))
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(targets)))
    for label, count in enumerate(counts):
        held = int((targets[test] == label).sum())
        assert held == min(max(1, round(count * fraction)), count - 1)


def test_the_shuffled_order_comes_from_the_seed_alone() -> None:
    labels = torch.arange(10)
    orders = {order_classes("shuffled", labels, seed) for seed in range(5)}
    assert len(orders) == 5
    assert all(sorted(order) == list(range(10)) for order in orders)
    torch.rand(3)
    assert order_classes("shuffled", labels.repeat(2), 0) == order_classes("shuffled", labels, 0)


def test_domains_are_tasks_in_the_order_of_their_first_row() -> None:
    x, y = numbered([0, 1] * 12)
    domains = np.array([7] * 8 + [2] * 12 + [5] * 4)
    stream = domain_incremental((x, y), domains=domains, test_fraction=0.25)
    assert [task.name for task in stream] == ["domain 7", "domain 2", "domain 5"]
    assert [len(task.train) for task in stream] == [6, 8, 2]
    for task, expected in zip(stream, (range(8), range(8, 20), range(20, 24)), strict=True):
        assert sorted(rows_of(task.train) + rows_of(task.test)) == list(expected)
        assert task.classes == (0, 1)


def test_rows_are_split_into_consecutive_blocks() -> None:
    x, y = numbered([0, 1] * 12)
    stream = domain_incremental((x, y), domains="rows", tasks=5, test_fraction=0)
    assert [row for task in stream for row in rows_of(task.train)] == list(range(24))
    assert [len(task.train) for task in stream] == [5, 5, 5, 5, 4]
    assert all(task.test is None for task in stream)


def test_a_list_of_data_sets_is_a_list_of_tasks_and_targets_may_be_floats() -> None:
    parts = [(torch.full((6, 2), float(part)), torch.rand(6)) for part in range(3)]
    stream = domain_incremental(parts, test=parts)
    assert [len(task.train) for task in stream] == [6, 6, 6]
    assert (stream.columns, stream[0].classes) == (1, ())
    assert torch.equal(stream[2].train.targets, parts[2][1])


def _transformed(scenario: str) -> Stream:
    examples = Examples(torch.arange(12, dtype=torch.uint8).view(4, 3), torch.tensor([5, 6, 5, 6]))
    return transformed(
        examples, examples, [None, Permute(torch.tensor([2, 0, 1]))], scenario=scenario, task_names=["a", "b"]
    )


def test_transformed_tasks_share_inputs_and_columns_or_have_their_own() -> None:
    domain, classes = _transformed("domain"), _transformed("class")
    assert [task.classes for task in domain] == [(0, 1), (0, 1)]
    assert [task.classes for task in classes] == [(0, 1), (2, 3)]
    assert classes.class_order == (5, 6, 5, 6)
    assert classes.class_names == ("5 (a)", "6 (a)", "5 (b)", "6 (b)")
    assert classes[1].train.targets.tolist() == [2, 3, 2, 3]
    assert domain[1].train.targets.tolist() == [0, 1, 0, 1]
    assert domain[0].train.x is domain[1].train.x
    batch, _ = domain[1].train.gather(torch.tensor([1]))
    assert batch.tolist() == [[5, 3, 4]]


GOOD = numbered([0, 1, 2, 3] * 4)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: class_incremental(GOOD, tasks=3),
            UsageError,
            "4 classes cannot be split evenly into 3 tasks; use one of 1, 2, 4",
        ),
        (lambda: class_incremental(GOOD, classes_per_task=3), UsageError, "cannot be split into tasks of 3"),
        (lambda: class_incremental(GOOD, tasks=[3, 2]), UsageError, r"tasks=\[3, 2\] should be positive sizes"),
        (lambda: class_incremental(GOOD, tasks=[5, -1]), UsageError, "should be positive sizes"),
        (lambda: class_incremental(GOOD), UsageError, "say how to split the 4 classes"),
        (lambda: class_incremental(GOOD, tasks=2, classes_per_task=1), UsageError, "does not agree"),
        (lambda: class_incremental(GOOD, tasks=2, class_order="shufled"), UsageError, "did you mean 'shuffled'"),
        (lambda: class_incremental(GOOD, tasks=2, class_order=[0, 1, 2, 2]), UsageError, "every label once"),
        (
            lambda: class_incremental(GOOD, tasks=3, class_order=[0, 1, 2]),
            DataError,
            "have the label 3, which is not among",
        ),
        (
            lambda: class_incremental(GOOD, tasks=5, class_order=range(5)),
            DataError,
            "class 4 of class_order has no training",
        ),
        (
            lambda: class_incremental(GOOD, numbered([0, 9, 1]), tasks=2),
            DataError,
            r"the test data have the label 9 in row 1, which is not among the classes \[0, 1, 2, 3\]",
        ),
        (lambda: class_incremental((GOOD[0], GOOD[0][:, 0]), tasks=2), DataError, "classes need one integer a row"),
        (lambda: class_incremental((GOOD[0], GOOD[1][:, None]), tasks=2), DataError, "classes need one integer a row"),
        (lambda: class_incremental(GOOD, tasks=2, test_fraction=1.0), UsageError, "test_fraction=1.0 should be"),
        (
            lambda: split_classes(GOOD, scenario="online", tasks=2),
            UsageError,
            "scenario 'online' does not fit here; choose task, domain or class, and make",
        ),
        (lambda: domain_incremental(GOOD, tasks=[3, 1]), UsageError, "as many classes in every task"),
        (lambda: domain_incremental(GOOD, domains=[0, 1]), DataError, "there are 16 rows but domains of shape"),
        (lambda: domain_incremental(GOOD, domains="row", tasks=2), UsageError, "domains='row' should be 'rows'"),
        (lambda: domain_incremental(GOOD, domains="rows"), UsageError, "tasks=None should be a number of blocks"),
        (
            lambda: domain_incremental(GOOD, domains=[0, 1] * 8, tasks=3),
            UsageError,
            "tasks=3 but the data have 2 domains",
        ),
        (lambda: domain_incremental(GOOD, GOOD, domains=[0, 1] * 8), UsageError, "give test= as a list, one a task"),
        (lambda: domain_incremental([GOOD, GOOD], [GOOD]), UsageError, "there are 2 tasks but 1 test sets"),
    ],
)
def test_what_cannot_be_split_is_refused(call: Callable[[], Stream], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()


@given(classes=st.integers(1, 30), size=st.integers(1, 30))
def test_a_number_of_tasks_and_their_size_say_the_same(classes: int, size: int) -> None:
    if classes % size:
        with pytest.raises(UsageError):
            task_sizes(None, size, classes)
    else:
        assert (
            task_sizes(None, size, classes) == task_sizes(classes // size, None, classes) == [size] * (classes // size)
        )
