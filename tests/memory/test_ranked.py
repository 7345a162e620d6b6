"""Ranked rows: every class keeps the beginning of its list, shares are even, and slots stay consistent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.errors import UsageError
from perdure.memory import Buffer
from perdure.memory.ranked import SELECTIONS, fair


def ranked(task: int, counts: dict[int, int]) -> dict[str, torch.Tensor | int]:
    """Rows whose x is 1000 * class + rank."""
    y = torch.cat([torch.full((count,), label) for label, count in counts.items()])
    x = torch.cat([1000 * label + torch.arange(count) for label, count in counts.items()])
    return {"x": x, "y": y, "task": task}


def lists(buffer: Buffer) -> dict[int, list[int]]:
    """The ranks that each class holds."""
    x = buffer.view("x")
    assert torch.equal(x // 1000, buffer.view("y"))
    return {int(c): sorted((x[buffer.view("y") == c] % 1000).tolist()) for c in buffer.view("y").unique()}


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 60))
def test_shares_are_even_fill_the_capacity_and_favour_the_earlier(sizes, capacity):
    groups = {(0, i): size for i, size in enumerate(sizes)}
    shares = list(fair(groups, capacity).values())
    assert sum(shares) == min(capacity, sum(sizes))
    assert all(share <= size for share, size in zip(shares, sizes, strict=True))
    short = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    assert not short or max(shares) <= min(short) + 1
    wanting = [share for share, size in zip(shares, sizes, strict=True) if size > max(shares)]
    assert wanting == sorted(wanting, reverse=True)


@pytest.mark.parametrize("writing", list(SELECTIONS))
def test_each_class_keeps_the_beginning_of_its_list(writing):
    buffer = Buffer(20, writing=writing)
    state = None
    for task in range(4):
        buffer.add(ranked(task, {2 * task: 50, 2 * task + 1: 50 if task != 1 else 3}))
        held = lists(buffer)
        assert all(ranks == list(range(len(ranks))) for ranks in held.values())
        assert len(buffer) == 20
        sizes = [len(ranks) for label, ranks in held.items() if label != 3]
        assert max(sizes) - min(sizes) <= 1
        assert task < 1 or held[3] == [0, 1, 2][: len(held[3])]
        if task == 1:
            state = buffer.state_dict()
    assert state is not None
    restored = Buffer(2, writing=writing)
    restored.load_state_dict(state)
    for task in (2, 3):
        restored.add(ranked(task, {2 * task: 50, 2 * task + 1: 50}))
    assert torch.equal(restored.view("x"), buffer.view("x"))
    buffer.resize(9)
    assert {label: len(ranks) for label, ranks in lists(buffer).items()} == dict(
        zip(range(8), [2] + [1] * 7, strict=True)
    )
    assert all(ranks == list(range(len(ranks))) for ranks in lists(buffer).values())


def test_classes_that_come_again_in_another_task_share_as_new_ones_do():
    buffer = Buffer(12, writing="herding")
    for task in range(3):
        buffer.add(ranked(task, {0: 30, 1: 30}))
    assert buffer.stats()["tasks"] == {0: 4, 1: 4, 2: 4}
    assert buffer.stats()["classes"] == {0: 6, 1: 6}
    assert sorted(buffer.view("x").tolist()) == sorted([0, 1, 1000, 1001] * 3)


def test_merging_two_sets_of_tasks_is_as_if_one_buffer_had_seen_both():
    one, two, both = (Buffer(13, writing="k_center") for _ in range(3))
    for task, buffers in ((0, (one, both)), (1, (two, both)), (2, (two, both))):
        for buffer in buffers:
            buffer.add(ranked(task, {2 * task: 30, 2 * task + 1: 4}))
    one.merge(two)
    assert lists(one) == lists(both)
    assert lists(two) == {2: [0, 1, 2, 3], 3: [0, 1, 2], 4: [0, 1, 2], 5: [0, 1, 2]}
    with pytest.raises(UsageError, match="both buffers hold class 2 of task 1"):
        one.merge(two)
    with pytest.raises(UsageError, match="cannot merge one written by 'herding'"):
        one.merge(_herded())


def _herded() -> Buffer:
    buffer = Buffer(5, writing="herding")
    buffer.add(ranked(7, {9: 3}))
    return buffer


def test_a_budget_in_bytes_counts_for_ranked_rows_too():
    buffer = Buffer(None, bytes_budget=24 * 10, writing="nearest_mean")
    buffer.add({name: column[:0] if name != "task" else column for name, column in ranked(0, {0: 1}).items()})
    assert buffer.capacity == 10
    buffer.add(ranked(0, {0: 30, 1: 30}))
    assert {label: len(ranks) for label, ranks in lists(buffer).items()} == {0: 5, 1: 5}
    none = Buffer(0, writing="herding")
    none.add(ranked(0, {0: 4}))
    assert len(none) == 0
