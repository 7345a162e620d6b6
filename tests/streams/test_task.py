from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perdure.data.examples import Examples
from perdure.errors import DataError, UsageError
from perdure.streams.task import Stream, Task, count_batches, draw_plan


def make(rows: tuple[int, ...] = (10, 7, 12), seed: int = 0) -> Stream:
    tasks = []
    for index, count in enumerate(rows):
        examples = Examples(torch.rand(count, 3), torch.arange(count) % 2 + 2 * index)
        tasks.append(Task(index, f"task {index}", examples, None, (2 * index, 2 * index + 1)))
    return Stream(tasks, scenario="class", seed=seed)


def as_lists(plan: Iterator[torch.Tensor]) -> list[list[int]]:
    return [batch.tolist() for batch in plan]


@given(rows=st.integers(1, 60), batch_size=st.integers(1, 20), epochs=st.integers(0, 3), seed=st.integers(0, 99))
def test_every_pass_covers_every_row_once(rows: int, batch_size: int, epochs: int, seed: int) -> None:
    batches = as_lists(draw_plan(rows, (seed,), epochs=epochs, batch_size=batch_size))
    per_pass = count_batches(rows, batch_size, drop_last=False)
    assert len(batches) == epochs * per_pass
    for first in range(0, len(batches), per_pass):
        one_pass = batches[first : first + per_pass]
        assert all(len(batch) == batch_size for batch in one_pass[:-1])
        assert sorted(row for batch in one_pass for row in batch) == list(range(rows))


@given(rows=st.integers(1, 60), batch_size=st.integers(1, 20), epochs=st.integers(1, 3))
def test_drop_last_leaves_out_exactly_the_short_batch(rows: int, batch_size: int, epochs: int) -> None:
    if rows < batch_size:
        with pytest.raises(UsageError, match="drop_last leaves no batch"):
            draw_plan(rows, (0,), batch_size=batch_size, drop_last=True)
        return
    dropped = as_lists(draw_plan(rows, (0,), epochs=epochs, batch_size=batch_size, drop_last=True))
    kept = as_lists(draw_plan(rows, (0,), epochs=epochs, batch_size=batch_size))
    assert dropped == [batch for batch in kept if len(batch) == batch_size]


@given(steps=st.integers(0, 25), drop_last=st.booleans())
def test_steps_are_the_beginning_of_as_many_passes_as_they_need(steps: int, drop_last: bool) -> None:
    batches = as_lists(draw_plan(11, (0,), steps=steps, batch_size=4, drop_last=drop_last))
    passes = as_lists(draw_plan(11, (0,), epochs=13, batch_size=4, drop_last=drop_last))
    assert batches == passes[:steps]
    assert len(batches) == steps


def test_shuffles_differ_between_passes_tasks_and_seeds() -> None:
    def order(stream: Stream, task: int, epochs: int = 1) -> list[int]:
        return [row for batch in as_lists(stream.plan(stream[task], epochs)) for row in batch]

    stream = make((50, 50))
    twice = order(stream, 0, epochs=2)
    orders = [twice[:50], twice[50:], order(stream, 1), order(make((50, 50), seed=1), 0), list(range(50))]
    assert len({tuple(order) for order in orders}) == 5


@given(calls=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), max_size=6))
def test_a_plan_depends_on_nothing_else_that_is_drawn(calls: list[tuple[int, int]]) -> None:
    stream = make()
    expected = [as_lists(make().plan(task, 3, 4)) for task in make()]
    state = torch.get_rng_state()
    running = [stream.plan(stream[index], epochs, 4) for index, epochs in calls]
    for plan in running:
        next(plan)
        torch.rand(1, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    for task in reversed(stream):
        assert as_lists(stream.plan(task, 3, 4)) == expected[task.index]
    for (index, epochs), plan in zip(calls, running, strict=True):
        assert as_lists(plan) == expected[index][1 : epochs * stream.batches_per_pass(stream[index], 4)]


def test_index_tensors_are_int64_on_the_cpu() -> None:
    batch = next(make().plan(make()[0]))
    assert batch.dtype == torch.int64
    assert batch.device.type == "cpu"


@pytest.mark.parametrize(
    "arguments", [{"batch_size": 0}, {"epochs": -1}, {"steps": -1}, {"batch_size": 11, "drop_last": True}]
)
def test_numbers_out_of_range_are_refused_before_the_first_batch(arguments: dict[str, int]) -> None:
    stream = make()
    with pytest.raises(UsageError):
        stream.plan(stream[0], **arguments)  # type: ignore[arg-type]


def test_a_stream_is_a_sequence_that_knows_its_columns_and_input_shape() -> None:
    stream = make()
    assert len(stream) == 3
    assert [task.index for task in stream] == [0, 1, 2]
    assert stream[-1] is stream.tasks[2]
    assert stream[1:] == stream.tasks[1:]
    assert stream.columns == 6
    assert stream.class_names == tuple("012345")
    assert stream.input_shape == (3,)
    bytes_ = Examples(torch.zeros(4, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    assert Stream([Task(0, "a", bytes_, None, (0,))], scenario="domain").input_shape == (1, 8, 8)


def test_regression_needs_as_many_columns_as_targets() -> None:
    def columns(*shape: int) -> int:
        examples = Examples(torch.zeros(4, 2), torch.zeros(4, *shape))
        return Stream([Task(0, "a", examples, None, ())], scenario="domain").columns

    assert (columns(), columns(3)) == (1, 3)


def test_wrong_streams_are_refused() -> None:
    tasks = make().tasks
    with pytest.raises(UsageError, match="unknown scenario 'clas'; did you mean 'class'"):
        Stream(tasks, scenario="clas")
    with pytest.raises(UsageError, match="at least one task"):
        Stream([], scenario="class")
    empty = Task(0, "nothing", tasks[0].train.subset(torch.arange(0)), None, (0,))
    with pytest.raises(DataError, match=r"task 0 \('nothing'\) has no training examples"):
        Stream([empty], scenario="class")


def test_the_fingerprint_changes_with_content_seed_and_scenario() -> None:
    x, y = torch.rand(8, 3), torch.arange(8) % 2

    def fingerprint(x: torch.Tensor = x, y: torch.Tensor = y, seed: int = 0, scenario: str = "class") -> str:
        return Stream(
            [Task(0, "a", Examples(x, y), Examples(x, y), (0, 1))], scenario=scenario, seed=seed
        ).fingerprint()

    prints = [
        fingerprint(),
        fingerprint(x=x + 1),
        fingerprint(y=1 - y),
        fingerprint(seed=1),
        fingerprint(scenario="task"),
    ]
    assert len(set(prints)) == 5
    assert fingerprint() == prints[0]
