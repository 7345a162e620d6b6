"""Exemplars that a method joins to a task's data are no new rows: not for buffers, counts and importances beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from small_problems import Watcher, sgd, toy_model, toy_stream
from torch import Tensor

import perdure
from perdure.batch import Batch, Source
from perdure.data.examples import Examples
from perdure.data.joined import JoinedExamples, new_rows, own_examples
from perdure.methods import (
    AGEM,
    EWC,
    GEM,
    MIR,
    WA,
    BiC,
    DERpp,
    ICaRL,
    Joint,
    Method,
    Replay,
)
from perdure.streams.task import Stream

pytestmark = pytest.mark.filterwarnings("ignore::perdure.errors.PerdureWarning")
JOINING = [partial(ICaRL, 18), partial(WA, 18), partial(BiC, 60), Joint]
WRITING = ("reservoir", "class_balanced", "task_balanced", "greedy_balanced", "ring", "class_ring", "loss_aware")
MEMORIES = {
    **{name: partial(Replay, 200, writing=name) for name in (*WRITING, "herding", "k_center")},
    "small": partial(Replay, 20),
    "per_class": partial(Replay, None, per_class=5),
    "derpp": partial(DERpp, 200),
    "mir": partial(MIR, 200, candidates=8, batch_size=4, compare_to_old_logits=True),
    "gem": partial(GEM, per_task=12),
    "agem": partial(AGEM, per_task=12),
}


def stored(method: Any) -> tuple[Tensor, Tensor]:
    """The rows in a method's memory and their task numbers."""
    parts = method.memory.finished if hasattr(method, "memory") else [{n: method.buffer.view(n) for n in ("x", "task")}]
    return torch.cat([part["x"] for part in parts]), torch.cat([part["task"] for part in parts])


def origin(stream: Stream, x: Tensor) -> list[tuple[int, int]]:
    """Task and row of the training data that each row of `x` is; no row occurs twice in the stream."""
    every = [(task.index, row, own) for task in stream for row, own in enumerate(task.train.x)]
    return [next((task, row) for task, row, own in every if torch.equal(own, one)) for one in x]


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_memory_beside_them_keeps_every_row_once_and_under_its_own_task(memory: str) -> None:
    stream, method = toy_stream(), MEMORIES[memory]()
    perdure.Learner(toy_model(), sgd, [WA(18), method], augment=lambda x, generator: x + 1).fit(stream, batch_size=8)
    x, tasks = stored(method)
    found = origin(stream, x)
    assert len(set(found)) == len(found) > 0
    assert [task for task, _ in found] == tasks.tolist()
    if memory in (*WRITING, "derpp", "mir"):
        assert len(found) == method.buffer.seen == 120


@pytest.mark.parametrize("joining", JOINING)
def test_whoever_joins_them_says_which_rows_are_new(joining: Callable[[], Method]) -> None:
    stream, watcher, replay = toy_stream(), Watcher(), Replay(200)
    perdure.Learner(toy_model(), sgd, [joining(), watcher, replay]).fit(stream, batch_size=8)
    mixed = [step["batch"] for step in watcher.steps if step["batch"].now.new is not None]
    assert len(mixed) > 5
    for batch in mixed:
        own = [task == batch.task for task, _ in origin(stream, batch.now.x)]
        assert batch.now.new.tolist() == own
    x, tasks = stored(replay)
    assert [task for task, _ in origin(stream, x)] == tasks.tolist()
    assert len(x) == replay.buffer.seen


def test_stored_logits_are_those_of_the_stored_rows() -> None:
    class Spy(Method):
        name = "spy"

        def __init__(self) -> None:
            self.outputs: dict[tuple[float, ...], Tensor] = {}

        def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
            assert outputs is not None
            for row, x in enumerate(batch.now.x):
                self.outputs.setdefault(tuple(x.tolist()), outputs[row])

    spy, derpp = Spy(), DERpp(200)
    perdure.Learner(toy_model(), sgd, [WA(18), spy, derpp]).fit(toy_stream(), batch_size=8)
    for x, logits in zip(derpp.buffer.view("x"), derpp.buffer.view("logits"), strict=True):
        assert torch.equal(spy.outputs[tuple(x.tolist())], logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_of_exemplars_do_not_count(dtype: torch.dtype) -> None:
    results = perdure.Learner(toy_model(), sgd, [WA(18)]).fit(toy_stream(), batch_size=8, prequential=True)
    assert results.prequential is not None
    assert results.prequential["rows"] == [40, 40, 40]
    counts = perdure.prequential.Prequential(perdure.classes.ClassTable("all", torch.device("cpu")))
    now = Source("current", torch.rand(4, 2), torch.tensor([0, 1, 0, 1]), new=torch.tensor([True, False, True, False]))
    counts.count(Batch((now,)), torch.tensor([[1, 0], [0, 1], [0, 1], [0, 1]], dtype=dtype))
    assert (counts.correct, counts.rows) == (1, 2)


@pytest.mark.parametrize("samples", [None, 7])
def test_importance_is_measured_on_the_tasks_own_rows(samples: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, seen = toy_stream(), []
    measure = EWC.measure

    def watched(self: EWC, batches: Any, *rest: Any) -> Any:
        kept = list(batches)
        seen.append(torch.cat([x for x, _ in kept]))
        return measure(self, kept, *rest)

    monkeypatch.setattr(EWC, "measure", watched)
    perdure.Learner(toy_model(), sgd, [WA(18), EWC(strength=1.0, n_samples=samples)]).fit(stream, batch_size=8)
    for task, x in zip(stream, seen, strict=True):
        found = origin(stream, x)
        assert {own for own, _ in found} == {task.index}
        assert len(set(found)) == (samples or 40)


def test_own_rows_are_told_apart_in_every_selection() -> None:
    def numbered(first: int, count: int) -> Examples:
        return Examples(torch.arange(first, first + count)[:, None], torch.zeros(count, dtype=torch.int64))

    joined = JoinedExamples([numbered(0, 3), numbered(10, 4)], own=1)
    assert new_rows(joined, torch.tensor([0, 5, 3])).tolist() == [False, True, True]  # type: ignore[union-attr]
    assert new_rows(joined, torch.tensor([6, 3])) is None
    assert new_rows(joined, None) is None
    assert new_rows(JoinedExamples(joined.parts), torch.tensor([0])) is None
    part = joined.subset(torch.tensor([6, 0, 4]))
    x, _ = own_examples(part).gather(torch.arange(2))
    assert x[:, 0].tolist() == [13, 11]
    now = Source("current", x=torch.arange(4), y=torch.arange(4), new=torch.tensor([True, False, False, True]))
    pieces = [piece.now for piece in Batch((now,)).pieces(2)]
    assert [piece.only_new(piece.x).tolist() for piece in pieces] == [[0], [3]]
