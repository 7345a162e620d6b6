"""The beginning of a stream with a test part of its own: nothing else is in it, and no example is on both sides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import perdure
from perdure.data.examples import Examples
from perdure.errors import UsageError
from perdure.streams.held_out import held_out
from perdure.streams.task import Stream, Task
from perdure.streams.transforms import Permute


def pixels(examples: Examples | None) -> Tensor:
    assert examples is not None
    return examples.gather(torch.arange(len(examples)))[0].flatten(1)


def rows_of(examples: Examples | None) -> set[tuple[int, ...]]:
    return {tuple(row) for row in pixels(examples).tolist()}


def test_every_class_of_the_first_tasks_gives_a_tenth_of_its_training_data() -> None:
    whole = perdure.benchmarks.split_digits(seed=3)
    part = held_out(whole, first=3, fraction=0.1)
    assert (len(part), part.columns, part.seed, part.scenario) == (3, 10, 3, "class")
    for task, origin in zip(part, whole, strict=False):
        assert task.test is not None
        for label in task.classes:
            count = int((origin.train.targets == label).sum())
            assert int((task.test.targets == label).sum()) == round(count / 10)
        assert len(task.train) + len(task.test) == len(origin.train)
        assert rows_of(task.train) | rows_of(task.test) == rows_of(origin.train)
        assert not rows_of(task.test) & rows_of(origin.test)


def test_another_seed_holds_out_other_rows_and_the_same_seed_the_same() -> None:
    streams = [held_out(perdure.benchmarks.split_digits(seed=seed), 1) for seed in (0, 0, 1)]
    first, again, other = (rows_of(stream[0].test) for stream in streams)
    assert first == again
    assert first != other


def test_an_example_that_several_tasks_show_is_held_out_of_all_or_none() -> None:
    x = torch.arange(60).view(60, 1).expand(60, 4).contiguous().to(torch.uint8)
    y = torch.arange(60) % 2
    every = Examples(x, y)
    turned = every.with_transform(Permute(torch.tensor([1, 0, 3, 2])))
    some = every.subset(torch.arange(20, 60).flip(0))
    tasks = [Task(i, str(i), examples, None, (0, 1)) for i, examples in enumerate((some, every, turned))]
    part = held_out(Stream(tasks, scenario="domain"), 3, 0.2)
    tested = set().union(*(rows_of(task.test) for task in part))
    trained = set().union(*(rows_of(task.train) for task in part))
    assert not tested & trained
    assert len(tested | trained) == 60
    assert rows_of(part[1].test) == rows_of(part[2].test)


@pytest.mark.parametrize(("first", "fraction", "said"), [(0, 0.1, "tasks is 0"), (6, 0.1, "has 5"), (2, 1.0, "is 1.0")])
def test_what_cannot_be_held_out_is_said(first: int, fraction: float, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        held_out(perdure.benchmarks.split_digits(), first, fraction)


def test_tasks_of_single_rows_are_refused() -> None:
    task = Task(0, "tiny", Examples(torch.zeros(2, 3), torch.tensor([0, 1])), None, (0, 1))
    with pytest.raises(UsageError, match="too few to hold out"):
        held_out(Stream([task], scenario="class"), 1)
