"""Rings are the newest rows of every group, greedy balancing never favours a class, and tasks can be balanced."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from perdure.errors import UsageError
from perdure.memory import Buffer


def stream(seed: int, rows: int = 200, groups: int = 5, sort: bool = False) -> torch.Tensor:
    """Labels with very different frequencies, in blocks if sorted."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(groups, generator=generator) ** 3 + 0.01
    y = torch.multinomial(weights, rows, replacement=True, generator=generator)
    return y.sort().values if sort else y


def offered(buffer: Buffer, y: torch.Tensor, start: int = 0, size: int = 1, stop: int | None = None) -> Buffer:
    for part in torch.arange(start, len(y) if stop is None else stop).split(size):
        buffer.add({"x": part, "y": y[part], "task": y[part]})
    return buffer


ALL = ["ring", "class_ring", "greedy_balanced", "task_balanced"]


@pytest.mark.parametrize("writing", ["ring", "class_ring"])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_ring_holds_the_last_rows_of_every_group_and_groups_are_even(writing, sort, seed):
    y = stream(seed, sort=sort)
    buffer = Buffer(23, writing=writing)
    for row in range(len(y)):
        offered(buffer, y, row, stop=row + 1)
        held = [buffer.view("x")[buffer.view("y") == group].sort().values for group in range(5)]
        seen = [(y[: row + 1] == group).nonzero().squeeze(1) for group in range(5)]
        for rows, every in zip(held, seen, strict=True):
            assert torch.equal(rows, every[len(every) - len(rows) :])
        assert len(buffer) == min(23, row + 1)
        limited = [len(rows) for rows, every in zip(held, seen, strict=True) if len(rows) < len(every)]
        assert not limited or max(map(len, held)) - min(limited) <= 1


@pytest.mark.parametrize("writing", ["ring", "class_ring"])
def test_a_ring_of_one_group_is_first_in_first_out(writing):
    buffer = Buffer(7, writing=writing)
    offered(buffer, torch.zeros(100, dtype=torch.int64), size=9)
    assert sorted(buffer.view("x").tolist()) == list(range(93, 100))
    buffer.resize(4)
    assert sorted(buffer.view("x").tolist()) == [96, 97, 98, 99]
    buffer.resize(6)
    buffer.add({"x": torch.tensor([100, 101, 102]), "y": torch.zeros(3).long(), "task": 0})
    assert sorted(buffer.view("x").tolist()) == [97, 98, 99, 100, 101, 102]


def test_more_groups_than_room_leave_the_newest_ones():
    buffer = offered(Buffer(3, writing="ring"), torch.arange(50))
    assert sorted(buffer.view("x").tolist()) == [47, 48, 49]
    assert len(buffer.writing.queues) == 3  # no trace of the others, however many there were


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("capacity", [4, 23, 60])
def test_greedy_balancing_gives_every_class_its_share_or_all_of_its_rows_at_all_times(sort, seed, capacity):
    y = stream(seed, sort=sort)
    buffer = Buffer(capacity, writing="greedy_balanced", seed=seed)
    for row in range(len(y)):
        offered(buffer, y, row, stop=row + 1)
        seen, held = Counter(y[: row + 1].tolist()), Counter(buffer.view("y").tolist())
        assert torch.equal(buffer.view("y"), y[buffer.view("x")])
        assert len(buffer.view("x").unique()) == len(buffer) <= capacity
        for label, count in seen.items():
            assert held[label] >= min(count, capacity // len(seen))
        # Nobody holds more than a share unless he came when shares were larger and nobody has wanted the room.
        if len(buffer) == capacity and all(held[label] < seen[label] for label in seen):
            assert max(held.values()) - min(held.values()) <= 1


def test_greedy_balancing_pushes_out_random_rows_of_the_largest_class():
    counts = torch.zeros(12)
    y = torch.tensor([0] * 12 + [1] * 6)
    for seed in range(1500):
        buffer = offered(Buffer(12, writing="greedy_balanced", seed=seed), y, size=5)
        rows = buffer.view("x")
        assert buffer.view("y").bincount().tolist() == [6, 6]
        counts[rows[rows < 12]] += 1
    # Each of 12 rows stays with probability 1/2; mean 1, standard deviation sqrt(2 / 11) of the statistic below.
    assert float(((counts - 750) ** 2 / 750).sum() / 0.5 / 11) < 1 + 4.5 * (2 / 11) ** 0.5


def test_a_full_and_even_buffer_is_left_alone_by_more_of_the_same_classes():
    y = torch.arange(3).repeat(4)
    buffer = offered(Buffer(10, writing="greedy_balanced"), y)
    before = buffer.view("x").clone()
    offered(buffer, torch.arange(3).repeat(50), size=7)
    assert torch.equal(buffer.view("x"), before)


def test_task_balanced_is_the_class_balanced_law_over_tasks():
    y = stream(1, sort=True)
    task, label = Buffer(17, writing="task_balanced", seed=4), Buffer(17, writing="class_balanced", seed=4)
    offered(task, y, size=9)
    offered(label, y, size=9)
    assert torch.equal(task.view("x"), label.view("x"))
    alone = Buffer(10, writing="task_balanced", seed=2)
    for start in range(0, 90, 9):
        alone.add({"x": torch.arange(start, start + 9), "y": torch.zeros(9), "task": start // 30})
    assert alone.stats()["tasks"] in ({0: 3, 1: 3, 2: 4}, {0: 3, 1: 4, 2: 3}, {0: 4, 1: 3, 2: 3})


@pytest.mark.parametrize("writing", ALL)
def test_the_cut_into_batches_changes_nothing(writing):
    y = stream(7)
    one, other = (offered(Buffer(31, writing=writing, seed=5), y, size=size) for size in (1, 64))
    assert torch.equal(one.view("x"), other.view("x"))


@pytest.mark.parametrize("writing", ALL)
@pytest.mark.parametrize("resized", [None, 11, 50])
def test_a_restored_buffer_continues_identically(writing, resized):
    y = stream(8, rows=300)
    buffer = offered(Buffer(31, writing=writing, seed=5), y, size=7, stop=140)
    if resized is not None:
        buffer.resize(resized)
        offered(buffer, y, 140, size=7, stop=147)
    state, start = buffer.state_dict(), 140 if resized is None else 147
    other = Buffer(3, writing=writing, seed=77)
    other.load_state_dict(state)
    offered(buffer, y, start, size=5)
    offered(other, y, start, size=5)
    assert torch.equal(buffer.view("x"), other.view("x"))
    assert torch.equal(buffer.sample(9)["slot"], other.sample(9)["slot"])


@pytest.mark.parametrize("writing", ALL)
def test_a_budget_in_bytes_and_no_capacity_are_respected(writing):
    y = stream(3)
    buffer = offered(Buffer(None, bytes_budget=24 * 13 + 5, writing=writing), y, size=6)
    assert len(buffer) == buffer.capacity == 13
    assert len(offered(Buffer(0, writing=writing), y)) == 0


def test_merging_greedily_balanced_buffers_stays_balanced_and_rings_refuse():
    first, second = stream(11, groups=3), stream(12, groups=3) + 1
    one = offered(Buffer(20, writing="greedy_balanced", seed=1), first)
    two = offered(Buffer(20, writing="greedy_balanced", seed=2), second)
    every = Counter((one.view("y").tolist()) + two.view("y").tolist())
    one.merge(two)
    held = Counter(one.view("y").tolist())
    assert len(one) == 20
    assert max(held.values()) - min(held[c] for c in held if held[c] < every[c]) <= 1
    offered(one, stream(13, groups=3), size=4)
    assert len(one) == 20
    with pytest.raises(UsageError, match="cannot merge one written by 'ring'"):
        one.merge(offered(Buffer(20, writing="ring"), first))
    with pytest.raises(UsageError, match="which of their rows are newer"):
        offered(Buffer(20, writing="ring"), first).merge(offered(Buffer(20, writing="ring"), first))


def test_groups_have_to_be_named():
    with pytest.raises(UsageError, match="the ring writing policy needs integer task labels in column 'task'"):
        Buffer(3, writing="ring").add({"x": torch.zeros(2), "y": torch.zeros(2)})
    with pytest.raises(UsageError, match="the greedy_balanced writing policy needs integer class labels"):
        Buffer(3, writing="greedy_balanced").add({"x": torch.zeros(2), "y": torch.zeros(2)})
