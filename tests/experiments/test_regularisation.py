"""The benchmark of regularisers: what may decide a strength, what is run again, and what the page says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import regularisation, tuning
from benchmarks.regularisation import Contender, Measured, Table
from benchmarks.tuning import Kept, choose, for_tuning, held_out, with_strength

import perdure
from perdure.experiments.config import Experiment


def experiment(**changes: Any) -> Experiment:
    mapping = {
        "benchmark": "split_digits",
        "scenario": "task",
        "methods": ["l2"],
        "model": {"name": "mlp", "hidden": [8]},
        "train": {"steps": 3, "eval_future": False},
        "seeds": [2],
        "device": "cpu",
        "threads": 1,
    }
    return Experiment.from_mapping(mapping | changes)


def rows_of(examples: perdure.data.Examples) -> set[bytes]:
    return {row.numpy().tobytes() for row in examples.gather(torch.arange(len(examples)))[0]}


def test_held_out_rows_are_training_rows_of_the_first_tasks_that_are_not_trained_on() -> None:
    whole = perdure.benchmarks.split_digits(scenario="task", seed=7)
    cut = held_out(scenario="task", seed=7, of="split_digits", first=2, fraction=0.1)
    assert len(cut) == 2
    assert (cut.columns, cut.scenario, cut.class_order) == (whole.columns, "task", whole.class_order)
    for task, original in zip(cut, whole, strict=False):
        assert task.classes == original.classes
        assert len(task.train) + len(task.test) == len(original.train)
        assert len(task.test) == pytest.approx(len(original.train) / 10, abs=2)
        assert rows_of(task.train) | rows_of(task.test) == rows_of(original.train)
        assert not rows_of(task.test) & rows_of(original.test)
        assert sorted(task.test.targets.unique().tolist()) == list(task.classes)


def test_tasks_of_the_same_images_hold_out_the_same_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(**_: Any) -> perdure.streams.Stream:
        stream = perdure.benchmarks.split_digits(scenario="domain", tasks=1)
        (task,) = stream
        tasks = [perdure.streams.Task(index, str(index), task.train, task.test, task.classes) for index in range(2)]
        return perdure.streams.Stream(tasks, scenario="domain", prepare=stream.prepare)

    monkeypatch.setitem(tuning.benchmarks._entries, "digits_twice", twice)
    first, second = held_out(scenario="domain", of="digits_twice", first=2)
    assert torch.equal(first.test.rows, second.test.rows)
    assert rows_of(first.test) == rows_of(second.test)


def test_tuning_changes_the_stream_alone() -> None:
    main = experiment()
    tuned = for_tuning(main, 3)
    assert tuned.stream["options"] == main.stream
    assert {k: v for k, v in tuned.to_mapping().items() if k not in ("benchmark", "stream")} == {
        k: v for k, v in main.to_mapping().items() if k not in ("benchmark", "stream")
    }
    assert Experiment.from_mapping(tuned.to_mapping()) == tuned
    assert with_strength(main, 7.0).methods[0].arguments == main.methods[0].arguments | {"strength": 7.0}


def test_the_grid_grows_while_the_best_is_at_its_end_and_ties_go_to_the_weakest() -> None:
    asked: list[float] = []

    def peak(strength: float) -> float:
        asked.append(strength)
        return {0.001: 0.9, 0.0001: 0.9}.get(strength, 0.5 - strength)

    found = choose(peak, (0.1, 1.0))
    assert found.strength == 0.0001
    assert sorted(asked) == sorted(found.scores) == [0.00001, 0.0001, 0.001, 0.01, 0.1, 1.0]
    assert len(set(asked)) == len(asked)
    endless = choose(lambda strength: strength, (1.0, 10.0))
    assert (endless.strength, endless.at_the_end) == (1e5, True)
    assert not found.at_the_end


def test_what_is_kept_is_read_and_what_has_other_settings_is_run_again(tmp_path: Path) -> None:
    kept, lines = Kept(tmp_path), []
    first = kept.run("a", experiment())
    stamp = (tmp_path / "a" / "results.json").stat().st_mtime_ns
    again = kept.run("a", experiment())
    assert np.array_equal(again.matrix, first.matrix, equal_nan=True)
    assert (tmp_path / "a" / "results.json").stat().st_mtime_ns == stamp
    assert not (tmp_path / "a" / "checkpoint").exists()
    assert kept.seconds("a") > 0
    Kept(tmp_path, lines.append).run("a", with_strength(experiment(), 100.0))
    assert (tmp_path / "a" / "results.json").stat().st_mtime_ns != stamp
    assert lines[0].startswith("a: ")


def test_strengths_are_chosen_without_test_data_and_on_another_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Experiment] = []
    run = Kept.run

    def watched(self: Kept, name: str, experiment: Experiment) -> Any:
        seen.append(experiment)
        return run(self, name, experiment)

    monkeypatch.setattr(Kept, "run", watched)
    table = Table(
        "digits", "Digits", "", lambda seed: experiment(seeds=[seed], methods=[]), (2,),
        (Contender("fine-tuning"), Contender("L2", {"name": "l2"}, (0.1, 1.0))),
    )  # fmt: skip
    base, l2 = regularisation.measure(table, Kept(tmp_path))
    tuning_runs = [each for each in seen if each.benchmark == "held_out"]
    assert {each.seeds for each in tuning_runs} == {(regularisation.TUNING_SEED,)}
    assert [each.methods[0].arguments["strength"] for each in tuning_runs[:2]] == [0.1, 1.0]
    assert {each.stream["first"] for each in tuning_runs} == {regularisation.FIRST}
    final = [each for each in seen if each.benchmark == "split_digits"]
    assert [each.seeds for each in final] == [(2,), (2,)]
    assert final[1].methods[0].arguments["strength"] == l2.choice.strength
    assert base.choice is None


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    tables = regularisation.quick()
    kept = Kept(tmp_path)
    measured = [(table, list(regularisation.measure(table, kept))) for table in tables]
    text = regularisation.page(measured, "abc1234")
    assert "at commit abc1234" in text
    for table, rows in measured:
        assert f"## {table.title}" in text
        for found in rows:
            check_row(text, found)


def check_row(text: str, found: Measured) -> None:
    values = [100 * run.metrics()["final_average_accuracy"] for run in found.runs]
    mean = sum(values) / len(values)
    start = f"| {found.contender.label} | {regularisation.strength_of(found)} | {mean:.2f} | "
    assert start + " / ".join(f"{value:.2f}" for value in values) in text
    if found.choice is not None:
        assert found.choice.scores[found.choice.strength] == max(found.choice.scores.values())
        assert f"**{found.choice.strength:g}: " in text


def test_protocol_settings_are_taken_as_they_are() -> None:
    protocol = regularisation.protocol_of("vandeven-split-mnist")
    table = regularisation.split_mnist()
    by_label = {contender.label: contender for contender in table.contenders}
    for label, run in [("fine-tuning", "task-none"), ("EWC", "task-ewc"), ("SI", "task-si"), ("LwF", "task-lwf")]:
        assert table.of(by_label[label], 3) == protocol.experiment_of(run, 3), label
        assert not by_label[label].grid
    assert regularisation.TUNING_SEED not in (*table.seeds, *regularisation.permuted_mnist().seeds)
