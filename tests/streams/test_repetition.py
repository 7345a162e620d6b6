from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numbered_streams import arrived, numbered

from perdure.errors import UsageError
from perdure.streams import online, repeated


@given(
    sizes=st.lists(st.integers(6, 30), min_size=1, max_size=4),
    repeats=st.integers(1, 4),
    visits=st.sampled_from(["cycle", "shuffled"]),
)
def test_visits_of_a_task_share_its_rows_out_and_keep_its_test_set(sizes: list[int], repeats: int, visits: str) -> None:
    base = numbered(sizes)
    stream = repeated(base, repeats=repeats, visits=visits)
    assert len(stream) == repeats * len(base)
    assert [task.index for task in stream] == list(range(len(stream)))
    assert len({task.name for task in stream}) == len(stream)
    rows = arrived(stream)
    assert sorted(row for part in rows for row in part) == list(range(sum(sizes)))
    for visit in range(repeats):
        chunk = stream[visit * len(base) : (visit + 1) * len(base)]
        assert sorted(task.classes for task in chunk) == [task.classes for task in base]
    for task in base:
        own = [other for other in stream if other.classes == task.classes]
        assert all(other.test is task.test for other in own)
        counts = torch.stack([torch.bincount(other.train.targets, minlength=base.columns) for other in own])
        assert int((counts.amax(0) - counts.amin(0)).max()) <= 1, "every visit has its share of every class"


def test_a_cycle_goes_round_and_a_shuffled_round_has_an_order_of_its_own() -> None:
    base = numbered([8] * 5)
    cycle = [task.classes[0] // 2 for task in repeated(base, repeats=3)]
    assert cycle == [0, 1, 2, 3, 4] * 3
    shuffled = [task.classes[0] // 2 for task in repeated(base, repeats=3, visits="shuffled")]
    rounds = [shuffled[k : k + 5] for k in (0, 5, 10)]
    assert rounds[0] == [0, 1, 2, 3, 4], "new classes come in the order of their columns"
    assert rounds[1] != rounds[2]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in rounds)


def test_one_visit_is_the_stream_itself_and_the_draw_is_the_seeds() -> None:
    base = numbered([20, 20])
    assert repeated(base, repeats=1) is base
    again = repeated(base.replace(base.tasks), repeats=2)
    assert again.fingerprint() == repeated(base, repeats=2).fingerprint()
    assert repeated(base.replace(base.tasks, seed=9), repeats=2).fingerprint() != again.fingerprint()


def test_what_cannot_come_back_is_refused() -> None:
    with pytest.raises(UsageError, match=r"repeats=6, but task 1 \('t1'\) has 5 training examples"):
        repeated(numbered([10, 5]), repeats=6)
    with pytest.raises(UsageError, match="repeats=0 should be at least 1"):
        repeated(numbered([5]), repeats=0)
    with pytest.raises(UsageError, match="unknown visits 'shufled'; did you mean 'shuffled'"):
        repeated(numbered([5]), visits="shufled")
    with pytest.raises(UsageError, match="an order of their own"):
        repeated(online(numbered([5, 5]), transition=1.0))
