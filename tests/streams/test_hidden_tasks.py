"""Streams that announce nothing: labels as they come, predictions before the update, refusals, and exact resume."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_problems import FEATURES, Watcher, batches, same_bits, toy_model, toy_stream
from torch import Tensor, nn

import perdure
from perdure.batch import Batch
from perdure.classes import ClassTable
from perdure.errors import IncompatibleError, UsageError
from perdure.folder import unpack_predictions
from perdure.methods import DERpp, ICaRL, Method, Replay
from perdure.models import mean_field
from perdure.models.heads import GrowingHead, MultiHead
from perdure.prequential import Prequential
from perdure.streams import blurry, online
from perdure.streams.task import Stream

pytestmark = pytest.mark.filterwarnings("ignore::perdure.errors.PerdureWarning")
sgd = partial(torch.optim.SGD, lr=0.1)
HIDING = [
    pytest.param(online, id="online"),
    pytest.param(partial(online, transition=1.0), id="gradual"),
    pytest.param(partial(blurry, share=0.3), id="blurry"),
]


def learner_of(methods: Any = (), **options: Any) -> perdure.Learner:
    return perdure.Learner(options.pop("model", None) or toy_model(), sgd, list(methods), **options)


def by_hand(stream: Stream, replayed: Any = None) -> tuple[list[int], list[int], nn.Module, set[int]]:
    """Plain training, with every prediction made from the weights before the update, among the labels seen before."""
    model = toy_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: set[int] = set()
    correct, rows = [], []
    for task in stream:
        right = count = 0
        for x, y in batches(stream, task.index):
            with torch.no_grad():
                outputs = model(x).double()
                hidden = [c for c in range(stream.columns) if seen and c not in seen]
                outputs[:, hidden] = -torch.inf
                right += int((outputs.argmax(1) == y).sum())
                count += len(y)
            seen |= set(y.tolist())
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        correct.append(right)
        rows.append(count)
    return correct, rows, model, seen


@pytest.mark.parametrize("hide", HIDING)
@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_prequential_accuracy_is_that_of_predictions_made_by_hand_before_each_update(hide: Any, scenario: str) -> None:
    stream = hide(toy_stream(scenario))
    learner = learner_of()
    results = learner.fit(stream, batch_size=8)
    correct, rows, model, seen = by_hand(stream)
    assert results.prequential == {"correct": correct, "rows": rows}
    assert 0 < sum(correct) < sum(rows)
    assert results.metrics()["prequential_accuracy"] == pytest.approx(sum(correct) / sum(rows))
    assert same_bits(learner.model, model), "counting changes no bit of the training"
    assert learner.classes.seen == tuple(sorted(seen))


def test_predictions_are_of_current_rows_alone_and_cost_no_forward_pass() -> None:
    stream = online(toy_stream())
    watcher = Watcher()
    counted, silent = learner_of([Replay(capacity=30), watcher]), learner_of([Replay(capacity=30)])
    results = counted.fit(stream, batch_size=8)
    quiet = silent.fit(stream, batch_size=8, prequential=False)
    assert results.prequential is not None
    assert results.prequential["rows"] == [40, 40, 40]
    assert any(step["batch"].size > 8 for step in watcher.steps), "there were remembered rows beside them"
    assert same_bits(counted.model, silent.model)
    assert counted.passes == silent.passes
    assert quiet.prequential is None
    assert "prequential=True" in quiet.reasons()["prequential_accuracy"]


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_announced_streams_count_when_asked_over_the_columns_that_may_be_predicted(scenario: str) -> None:
    stream = toy_stream(scenario)
    results = learner_of().fit(stream, batch_size=8, epochs=2, prequential=True)
    assert results.prequential is not None
    assert results.prequential["rows"] == [40, 40, 40], "a second pass predicts nothing that is new"
    model, expected = toy_model(), []
    learner = perdure.Learner(model, sgd, scenario=scenario)
    for task in stream:
        learner.begin_task(task)
        right = 0
        for number, (x, y) in enumerate(batches(stream, task.index, epochs=2)):
            if number < 5:
                told = task.index if scenario == "task" else None
                right += int((learner.predict(x, told) == y).sum())
                model.train()
            learner.step(x, y)
        learner.end_task()
        expected.append(right)
    assert results.prequential["correct"] == expected
    assert learner_of().fit(stream, batch_size=8).prequential is None


class Stepping(Method):
    name = "stepping"
    owns = ("step",)

    def step(self, batch: Batch) -> Tensor:
        return torch.zeros(())


def test_there_is_none_where_a_method_replaces_the_step_or_targets_are_no_classes() -> None:
    results = learner_of([Stepping()]).fit(online(toy_stream()), batch_size=8)
    assert results.prequential is None
    assert results.metrics()["prequential_accuracy"] is None
    assert "replaces the step or the prediction" in results.reasons()["prequential_accuracy"]
    counts = Prequential(ClassTable("all", torch.device("cpu")))
    counts.count(Batch.current(torch.rand(3, 2), torch.rand(3)), torch.rand(3, 1))
    assert counts.correct is None
    assert counts.accuracy is None
    assert counts.rows == 3


def test_columns_that_are_not_consecutive_are_counted_over_their_own() -> None:
    table = ClassTable("all", torch.device("cpu"))
    table.see(torch.tensor([5, 1, 3]))
    counts = Prequential(table)
    counts.ask("online", None)
    outputs = torch.eye(6) + torch.tensor([0, 0.1, 0, 0.2, 0, 0.3])
    counts.count(Batch.current(torch.rand(6, 2), torch.tensor([5, 1, 5, 3, 5, 5])), outputs)
    assert counts.correct == 6


def test_remembered_rows_behind_the_current_ones_do_not_count() -> None:
    table = ClassTable("all", torch.device("cpu"))
    counts = Prequential(table)
    batch = Batch.current(torch.rand(2, 3), torch.tensor([1, 0]))
    batch = batch.add("replay", torch.rand(3, 3), torch.tensor([1, 1, 1]))
    for dtype in (torch.float32, torch.bfloat16):
        counts.ask("online", None)
        counts.count(batch, torch.tensor([[0, 1], [1, 0], [1, 0], [1, 0], [1, 0]], dtype=dtype))
    assert (counts.correct, counts.rows) == (4, 4)


def test_a_label_that_had_not_come_could_not_be_predicted() -> None:
    model = toy_model()
    with torch.no_grad():
        model.head.bias[3] = 100.0
    learner = learner_of(scenario="online", model=model)
    assert learner.prequential is not None
    for labels, correct in [([0, 0], 0), ([3, 3], 0), ([3, 0], 1)]:
        before = learner.prequential.correct
        learner.step(torch.zeros(2, FEATURES), torch.tensor(labels))
        assert learner.prequential.correct - before == correct


def test_tasks_are_never_announced_and_their_numbers_never_shown() -> None:
    class Spy(Method):
        name = "spy"

        def begin_task(self, task: Any) -> None:
            raise AssertionError("a task was announced")

        def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
            assert batch.task is None
            assert batch.index is None
            assert self.learner.task is None

    learner = learner_of([Spy(), Replay(capacity=20)])
    learner.fit(online(toy_stream()), batch_size=8)
    assert set(learner.methods[0].buffer.view("task").tolist()) == {-1}
    assert learner.tasks_begun == 0


@pytest.mark.parametrize("hide", HIDING)
def test_every_method_sees_the_same_rows_in_the_same_order(hide: Any) -> None:
    def seen(methods: list[Method]) -> list[Tensor]:
        watcher = Watcher()
        learner_of([*methods, watcher]).fit(hide(toy_stream()), batch_size=8)
        return [step["batch"].now.x for step in watcher.steps]

    torch.manual_seed(1)
    first = seen([])
    torch.manual_seed(2)
    for methods in ([Replay(capacity=20)], [DERpp(capacity=7)]):
        again = seen(list(methods))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_class_may_be_predicted_from_its_first_label_on_and_a_head_grows_with_it() -> None:
    wide, growing = learner_of(scenario="online"), learner_of(scenario="online", model=toy_model(head="growing"))
    draw = torch.Generator().manual_seed(0)
    for labels in ([4, 4], [4, 1], [2, 5]):
        x, y = torch.randn(2, FEATURES, generator=draw), torch.tensor(labels)
        for learner in (wide, growing):
            learner.step(x, y)
            assert set(learner.predict(torch.randn(20, FEATURES, generator=draw)).tolist()) <= set(learner.classes.seen)
    assert wide.classes.seen == growing.classes.seen == (1, 2, 4, 5)
    assert growing.model.head.weight.shape[0] == 6
    assert isinstance(growing.model.head, GrowingHead)


def test_a_growing_head_is_trained_online_and_resumes_from_the_middle(tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None) -> Any:
        learner = learner_of([Replay(capacity=20)], model=toy_model(head="growing"))
        return _stopped(learner, online(toy_stream()), folder, stop)

    assert run(tmp_path / "a", None) == run(tmp_path / "b", 7)


class Elsewhere(Tensor):
    """A tensor that says that it lives elsewhere, and may not be looked into."""

    device = torch.device("meta")  # type: ignore[assignment]

    def tolist(self) -> Any:
        raise AssertionError("the step waited for the device")

    def clone(self, **_: Any) -> Any:  # type: ignore[override]
        return self.as_subclass(Tensor)


def test_labels_of_another_device_are_read_when_somebody_asks() -> None:
    """A step must not wait for the device: the labels are put aside, and what was seen is the same in the end."""
    table = ClassTable("all", torch.device("cpu"))
    for labels in ([3, 1], [1, 0]):
        assert table.see(torch.tensor(labels).as_subclass(Elsewhere)) == []
    assert table.seen == (0, 1, 3)
    restored = ClassTable("all", torch.device("cpu"))
    restored.load_state_dict(json.loads(json.dumps(table.state_dict())))
    assert restored.seen == (0, 1, 3)
    assert restored.by_task == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_may_be_predicted_is_known_without_reading_labels_back(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    table, reading = ClassTable("all", torch.device("cpu")), ClassTable("all", torch.device("cpu"))
    counts, expected = Prequential(table), Prequential(reading)

    def refused(_: ClassTable) -> list[int]:
        raise AssertionError("the step waited for the labels")

    right = []
    for number in range(20):
        y = torch.randint(-1, min(2 + number // 4, 6), (8,), generator=draw)
        y[y < 0] = -100
        batch, outputs = Batch.current(torch.rand(8, 2), y), torch.randn(8, 6, generator=draw).to(dtype)
        with monkeypatch.context() as patch:
            patch.setattr(ClassTable, "_read", lambda table: refused(table) if table is counts.classes else table._all)
            counts.ask("online", None)
            table.see(y.as_subclass(Elsewhere))
            counts.count(batch, outputs)
        expected.ask("online", None)
        reading.see(y)
        expected.count(batch, outputs)
        right.append(expected.correct)
    assert (counts.correct, counts.rows) == (expected.correct, expected.rows)
    assert 0 < right[-1] < expected.rows < 160
    assert table.seen == reading.seen == (0, 1, 2, 3, 4, 5)


def test_marks_are_the_columns_seen_or_all_while_there_are_none() -> None:
    table = ClassTable("all", torch.device("cpu"))
    assert table.marks(3).all()
    table.see(torch.full((2,), -100).as_subclass(Elsewhere))
    assert table.waiting
    assert table.marks(3).all()
    before = table.marks(6)
    table.see(torch.tensor([4, -100, 1]).as_subclass(Elsewhere))
    assert before.all(), "marks that were taken stay as they are"
    assert table.marks(6).tolist() == [False, True, False, False, True, False]
    assert table.marks(3).tolist() == [False, True, False]
    assert table.seen == (1, 4)
    assert not table.waiting
    table.see(torch.tensor([0]))
    assert table.marks(6).tolist() == [True, True, False, False, True, False]


@pytest.mark.parametrize("head", [None, "growing"])
def test_rows_to_be_ignored_bring_no_class_and_do_not_count(head: str | None) -> None:
    learner = learner_of(scenario="online", model=toy_model(head=head))
    draw = torch.Generator().manual_seed(0)
    for labels in ([0, -100, 3, 3], [-100, 1, 3, -100]):
        learner.step(torch.randn(4, FEATURES, generator=draw), torch.tensor(labels))
    assert learner.classes.seen == (0, 1, 3)
    assert set(learner.predict(torch.randn(50, FEATURES, generator=draw)).tolist()) <= {0, 1, 3}
    assert learner.prequential is not None
    assert learner.prequential.rows == 5


def test_there_is_none_where_a_method_predicts_by_something_else_than_the_outputs() -> None:
    stream = toy_stream()
    for use, counted in [("both", False), ("prediction", False), ("training", True)]:
        results = learner_of([ICaRL(capacity=12, use=use)]).fit(stream, batch_size=8, prequential=True)
        assert (results.prequential is not None) == counted
    assert results.metrics()["prequential_accuracy"] is not None


def test_a_loss_over_the_labels_seen_leaves_the_other_columns_alone() -> None:
    learner = learner_of(scenario="online", active_classes="seen")
    before = learner.model.head.weight.detach().clone()
    learner.step(torch.randn(8, FEATURES), torch.tensor([0, 4] * 4))
    moved = (learner.model.head.weight != before).any(1)
    assert moved.tolist() == [True, False, False, False, True, False]


def test_the_restricted_view_is_of_the_part_and_the_other_over_all_labels_seen() -> None:
    stream = blurry(toy_stream(), share=0.3)
    learner = learner_of()
    results = learner.fit(stream, batch_size=8)
    for task in stream:
        assert task.test is not None
        outputs = learner.outputs(task.test.x)
        y = task.test.targets
        assert results.matrix[-1, task.index] == float((outputs.argmax(1) == y).double().mean())
        own = outputs[:, list(task.classes)].argmax(1) + task.classes[0]
        assert results.task_restricted is not None
        assert results.task_restricted["matrix"][-1, task.index] == float((own == y).double().mean())
    assert np.isnan(results.untrained).all(), "no class had come before the first step"


def test_transfer_to_parts_that_have_not_come_is_measured_where_classes_are_shared() -> None:
    results = learner_of().fit(online(toy_stream("domain")), batch_size=8)
    assert not np.isnan(results.untrained).any()
    assert results.metrics()["forward_transfer"] is not None
    parted = learner_of().fit(online(toy_stream()), batch_size=8)
    assert parted.metrics()["forward_transfer"] is None
    assert "was not evaluated or is not defined" in parted.reasons()["forward_transfer"]


def test_evaluations_come_at_fixed_intervals_of_the_whole_stream() -> None:
    learner = learner_of([Replay(capacity=20)])
    results = learner.fit(online(toy_stream(rows=56)), batch_size=8, evaluate_every=3)
    updates = [7 * entry["task"] + entry["step"] for entry in results.history]
    assert updates == [3, 6, 9, 12, 15, 18, 21][: len(updates)] == [3, 6, 9, 12, 15, 18]
    announced = learner_of([Replay(capacity=20)]).fit(toy_stream(rows=56), batch_size=8, evaluate_every=3)
    assert [entry["step"] for entry in announced.history] == [3, 6] * 3


@pytest.mark.parametrize("name", perdure.registry.methods.names())
def test_every_method_either_trains_online_or_says_why_not(name: str) -> None:
    method = perdure.registry.methods.get(name)()
    stream = online(toy_stream(rows=16))
    learner = learner_of([method], model=mean_field(toy_model()) if name == "vcl" else toy_model())
    if "online" not in method.scenarios or method.needs_boundaries or method.needs_test_task_id:
        with pytest.raises(IncompatibleError, match=rf"'{name}' .*an online stream.*(it is on|announce|hides)"):
            learner.fit(stream, batch_size=8)
        assert learner.passes["steps"] == 0
        return
    results = learner.fit(stream, batch_size=8)
    assert results.metrics()["final_average_accuracy"] is not None


def test_a_detector_finds_the_boundaries_that_nobody_announces() -> None:
    learner = learner_of([perdure.methods.EWC(strength=1.0)], boundaries="page_hinkley")
    results = learner.fit(online(toy_stream()), batch_size=8)
    assert results.prequential is not None
    assert sum(results.prequential["rows"]) == 120
    assert learner.classes.seen == tuple(range(6))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": 2}, "epochs is 2, but an online stream passes once"),
        ({"steps": 6}, "steps is 6, but an online stream passes once, which is 5 steps in 't0'"),
        ({"reset_optimizer": True}, "none is here"),
    ],
)
def test_an_online_stream_passes_once(options: dict[str, Any], sentence: str) -> None:
    learner = learner_of()
    with pytest.raises(UsageError, match=sentence):
        learner.fit(online(toy_stream()), batch_size=8, **options)
    assert learner.scenario is None
    learner.fit(online(toy_stream()), batch_size=8, steps=5)
    phases = learner_of().fit(blurry(toy_stream()), batch_size=8, epochs=2)
    assert phases.prequential == {"correct": phases.prequential["correct"], "rows": [40, 40, 40]}


def test_a_head_for_every_task_is_refused_where_no_task_is_told() -> None:
    with pytest.raises(
        IncompatibleError, match=r"a part for every task \(MultiHead\), and an online stream tells none"
    ):
        learner_of(model=toy_model(head="multi")).fit(online(toy_stream()))
    with pytest.raises(IncompatibleError, match="a blurry stream tells none"):
        learner_of(model=toy_model(head="multi"), scenario="blurry")
    assert isinstance(toy_model(head="multi").head, MultiHead)


def test_batches_without_end_need_no_task_and_no_stream() -> None:
    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        stream = toy_stream()
        for index in itertools.cycle(range(len(stream))):
            yield from batches(stream, index)

    learner = learner_of([Replay(capacity=30)], scenario="online")
    for x, y in itertools.islice(endless(), 40):
        learner.step(x, y)
    assert learner.prequential is not None
    assert learner.prequential.rows == 320
    assert learner.prequential.accuracy == learner.prequential.correct / 320 > 0
    assert learner.classes.seen == tuple(range(6))
    x, y = next(endless())
    assert learner.partial_fit(x.numpy(), y.numpy()).prequential.rows == 328


def _stopped(learner: perdure.Learner, stream: Stream, folder: Path, stop: int | None) -> Any:
    """The results and weights of a run; with `stop` interrupted before that update and continued by a new learner."""

    class StopError(Exception):
        pass

    options = {"batch_size": 8, "evaluate_every": 3, "checkpoint_every": 2, "folder": folder}
    if stop is not None:
        step = learner.step

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            if learner.passes["steps"] == stop:
                raise StopError
            return step(*args, **kwargs)

        learner.step = counted  # type: ignore[method-assign]
        with pytest.raises(StopError):
            learner.fit(stream, **options)
        head = "growing" if isinstance(learner.model.head, GrowingHead) else None
        learner = learner_of(
            [type(m)(**m.arguments()) for m in learner.methods], model=toy_model(head=head, seed=77), seed=learner.seed
        )
        results = learner.fit(stream, resume=True, **options)
    else:
        results = learner.fit(stream, **options)
    found = results.to_dict()
    for costs in ("seconds", "peak_memory_bytes"):
        found.pop(costs)
    return found, learner.parameters.theta.tolist(), learner.prequential.state_dict(), learner.classes.state_dict()


@pytest.mark.parametrize("hide", HIDING)
@pytest.mark.parametrize("stop", [3, 5, 8])
def test_a_run_that_was_stopped_anywhere_ends_with_the_same_bits_and_counts(
    hide: Any, stop: int, tmp_path: Path
) -> None:
    """Before the end of a part, at it, and within a later one."""
    whole = _stopped(learner_of([DERpp(capacity=20)]), hide(toy_stream()), tmp_path / "a", None)
    parts = _stopped(learner_of([DERpp(capacity=20)]), hide(toy_stream()), tmp_path / "b", stop)
    assert parts == whole


def test_the_stability_gap_is_that_of_the_predictions_in_the_log(tmp_path: Path) -> None:
    """Every number is worked out again from the raw predictions of every evaluation, in the words of its definition."""
    stream = online(toy_stream())
    results = learner_of([Replay(capacity=20)]).fit(stream, batch_size=4, evaluate_every=3, folder=tmp_path)
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    points, finished = [], {}
    for event in events:
        if event["event"] != "evaluation" or event["after"] < 0:
            continue
        packed = event["predictions"]["class_incremental"]
        scores = [
            None if found is None else float(np.mean(unpack_predictions(found) == task.test.targets.numpy()))
            for found, task in zip(packed, stream, strict=True)
        ]
        points.append((event["after"], event["step"] is None, scores))
    lowest: dict[int, list[float]] = {0: [], 1: []}
    anytime = []
    for part, at_end, scores in points:
        anytime.append(np.mean([scores[j] for j in range(part + 1)]))
        for j in finished:
            lowest[j].append(scores[j])
        if at_end and part < 2:
            finished[part] = scores[part]
    assert len(points) == 9 + 3
    minimum = np.mean([min(lowest[0]), min(lowest[1])])
    values = results.metrics()
    assert values["minimum_accuracy"] == pytest.approx(minimum)
    assert values["worst_case_accuracy"] == pytest.approx(points[-1][2][2] / 3 + 2 / 3 * minimum)
    assert values["average_anytime_accuracy"] == pytest.approx(np.mean(anytime))
    assert minimum <= np.mean(results.matrix[-1, :2])


def test_a_run_is_not_continued_on_a_stream_of_another_shape(tmp_path: Path) -> None:
    learner_of().fit(blurry(toy_stream(), share=0.2), batch_size=8, folder=tmp_path)
    with pytest.raises(UsageError, match="holds a run with stream"):
        learner_of().fit(blurry(toy_stream(), share=0.3), batch_size=8, folder=tmp_path, resume=True)
    with pytest.raises(UsageError, match="holds a run with prequential"):
        learner_of().fit(blurry(toy_stream(), share=0.2), batch_size=8, folder=tmp_path, resume=True, prequential=False)
