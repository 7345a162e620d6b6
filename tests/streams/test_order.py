from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numbered_streams import arrived, numbered

import perdure
from perdure.data.examples import Examples
from perdure.errors import UsageError
from perdure.streams import difficulties
from perdure.streams.task import Stream, Task


def graded(noise: list[float], rows: int = 400) -> Stream:
    """Two classes a task, whose means are as far apart everywhere and whose noise differs: the more, the harder."""
    tasks = []
    for index, spread in enumerate(noise):
        draw = torch.Generator().manual_seed(index)
        y = torch.arange(rows) % 2
        x = torch.randn(rows, 4, generator=draw) * spread
        x[:, index % 4] += 2.0 * y - 1.0
        tasks.append(Task(index, f"t{index}", Examples(x, y + 2 * index), None, (2 * index, 2 * index + 1)))
    return Stream(tasks, scenario="class", seed=1)


@given(order=st.permutations(range(4)))
def test_columns_are_numbered_again_in_the_order_of_arrival_and_rows_keep_their_labels(order: list[int]) -> None:
    base = numbered([6, 7, 8, 9])
    base = base.replace(base.tasks, class_names=list("abcdefgh"), class_order=[17, 16, 15, 14, 13, 12, 11, 10])
    stream = base.reordered(order)
    assert [task.name for task in stream] == [f"t{number}" for number in order]
    assert [task.index for task in stream] == [0, 1, 2, 3]
    assert [column for task in stream for column in task.classes] == list(range(8))
    for task, number in zip(stream, order, strict=True):
        old = base[number]
        assert sorted(arrived(stream)[task.index]) == sorted(arrived(base)[number])
        for part, before in ((task.train, old.train), (task.test, old.test)):
            assert part is not None
            assert before is not None
            for names in ("class_names", "class_order"):
                new = [getattr(stream, names)[y] for y in part.targets.tolist()]
                assert new == [getattr(base, names)[y] for y in before.targets.tolist()]
    inverse = [order.index(k) for k in range(4)]
    assert stream.reordered(inverse).fingerprint() == base.fingerprint()


def test_shared_columns_stay_and_the_labels_follow_their_tasks() -> None:
    stream = perdure.benchmarks.split_digits(scenario="domain", tasks=5)
    turned = stream.reordered([4, 3, 2, 1, 0])
    assert turned.class_order == (8, 9, 6, 7, 4, 5, 2, 3, 0, 1)
    assert [task.name for task in turned] == ["8, 9", "6, 7", "4, 5", "2, 3", "0, 1"]
    assert turned[0].train is stream[4].train
    assert turned[0].classes == (0, 1)
    assert turned.columns == 2


def test_tasks_are_ordered_by_what_a_small_network_learns_of_each_alone() -> None:
    noise = [0.9, 0.1, 2.5, 0.4]
    stream = graded(noise)
    measured = difficulties(stream)
    assert sorted(range(4), key=lambda k: measured[k]) == [1, 3, 0, 2]
    assert measured[1].error < 0.05 < 0.25 < measured[2].error
    assert [task.name for task in stream.reordered("easy_to_hard")] == ["t1", "t3", "t0", "t2"]
    assert [task.name for task in stream.reordered("hard_to_easy")] == ["t2", "t0", "t3", "t1"]
    assert stream.reordered("easy_to_hard").options["order"] == "easy_to_hard"


def test_difficulty_reads_no_test_set_and_touches_no_global_generator() -> None:
    stream = graded([0.5, 1.0], rows=80)

    class Untouchable(Examples):
        def gather(self, rows: torch.Tensor, number: int = 0) -> object:  # type: ignore[override]
            raise AssertionError("a test set was read")

    guarded = stream.replace(
        [replace(task, test=Untouchable(torch.zeros(3, 4), torch.zeros(3).long())) for task in stream]
    )
    state = torch.get_rng_state()
    assert difficulties(guarded) == difficulties(stream) == difficulties(stream)
    assert torch.equal(torch.get_rng_state(), state)
    other = stream.replace(stream.tasks, seed=2)
    assert difficulties(other) != difficulties(stream)


def test_held_out_rows_are_not_trained_on() -> None:
    """Labels that are noise cannot be predicted on rows that were not seen."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (2000,), generator=draw)
    y[:2] = torch.tensor([0, 1])
    stream = Stream(
        [Task(0, "noise", Examples(torch.randn(2000, 300, generator=draw), y), None, (0, 1))], scenario="class"
    )
    assert 0.42 < difficulties(stream)[0].error < 0.58


def test_a_random_order_is_drawn_from_the_seed() -> None:
    base = numbered([4] * 6)
    names = [[t.name for t in base.replace(base.tasks, seed=s).reordered("random")] for s in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert sorted(names[2]) == [t.name for t in base]


def test_what_is_no_order_is_refused() -> None:
    base = numbered([4, 4])
    with pytest.raises(UsageError, match="unknown order 'easy-to-hrad'; did you mean 'easy_to_hard'"):
        base.reordered("easy-to-hrad")
    with pytest.raises(UsageError, match=r"order=\[0, 0\] should name each of the tasks 0 to 1 once"):
        base.reordered([0, 0])
    regression = Stream([Task(0, "a", Examples(torch.rand(9, 1), torch.rand(9)), None, ())], scenario="domain")
    with pytest.raises(UsageError, match="needs classes"):
        regression.reordered("easy_to_hard")
    assert regression.reordered([0])[0].train is regression[0].train
