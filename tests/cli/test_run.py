from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Command = Callable[..., Any]
SHORT = ("--set", "train.epochs=1", "--set", "model.hidden=[16]")

METRICS = {
    "final_average_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer", "forward_transfer",
    "task_restricted_accuracy", "learning_accuracy", "minimum_accuracy",
}  # fmt: skip


def test_json_is_one_object_of_named_numbers_and_nothing_else_is_on_standard_output(perdure: Command) -> None:
    outcome = perdure(
        "run", "-b", "split-digits", "--scenario", "class", "-m", "replay", *SHORT, "--seed", "4", "--json"
    )
    assert outcome.code == 0
    found = outcome.json
    assert set(found["metrics"]) >= METRICS
    assert found["seed"] == 4
    assert len(found["matrix"]) == len(found["untrained"]) == 5
    assert found["matrix"][0][1] is None  # an untrained class column is no prediction
    assert found["metrics"]["forward_transfer"] is None
    assert all(0 <= value <= 1 for value in found["matrix"][4])
    assert {"train", "evaluate", "total"} <= set(found["seconds"])
    assert found["state_bytes"]["replay"] > 0
    assert found["versions"]["torch"]
    assert "seed 4: after task 5 of 5" in outcome.err


def test_several_seeds_are_runs_with_mean_std_and_interval(perdure: Command) -> None:
    outcome = perdure("run", *SHORT, "--seeds", "2", "--json", "--out", "a")
    found = outcome.json
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    assert set(found["mean"]) == set(found["std"]) == set(found["ci95"]) == set(found["runs"][0]["metrics"])
    values = [run["metrics"]["final_average_accuracy"] for run in found["runs"]]
    assert found["mean"]["final_average_accuracy"] == pytest.approx(sum(values) / 2)
    assert perdure("run", "--resume", "a", "--json").json == found


def test_seeds_by_name_in_processes_are_those_one_after_the_other(perdure: Command) -> None:
    words = ("run", *SHORT, "-m", "replay", "--seeds", "3,1")
    spread = perdure(*words, "--jobs", "2", "--json", "--out", "a")
    assert spread.code == 0, spread.err
    alone = perdure(*words, "--jobs", "1", "--json")
    assert [run["seed"] for run in spread.json["runs"]] == [3, 1]
    assert [run["matrix"] for run in spread.json["runs"]] == [run["matrix"] for run in alone.json["runs"]]
    lines = spread.err.splitlines()
    assert sorted(line.split(":")[0] for line in lines[:2]) == ["replay, seed 1", "replay, seed 3"]
    assert lines[1].endswith("(2 of 2)")
    assert "seed 3: after task 5 of 5" in alone.err


def test_processes_take_the_threads_that_are_given_and_one_otherwise(perdure: Command) -> None:
    words = ("run", "--set", "model.name=small_cnn", "--set", "train.steps=1", "--seeds", "2", "--jobs")
    for number, (jobs, more, threads) in enumerate((("2", (), 1), ("1", (), 1), ("2", ("--threads", "2"), 2))):
        assert perdure(*words, jobs, *more, "--out", str(number)).code == 0
        assert yaml.safe_load(Path(f"{number}/seed-1/config.yaml").read_text())["threads"] == threads


def test_the_printed_result_names_its_numbers(perdure: Command) -> None:
    one = perdure("run", *SHORT)
    assert "final average accuracy" in one.out
    several = perdure("run", *SHORT, "--seeds", "2")
    assert "±" in several.out


def test_nothing_is_written_without_a_folder(perdure: Command, tmp_path: Path) -> None:
    perdure("run", *SHORT)
    assert list(tmp_path.iterdir()) == []


def test_a_file_and_flags_are_the_same_experiment(perdure: Command, tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(
        "benchmark: split_digits\nmethods:\n- name: replay\n  capacity: 30\n- lwf\n"
        "train: {epochs: 1, lr: 1e-3}\nmodel: {hidden: [16]}\nseeds: [2]\n"
    )
    file = perdure("run", "experiment.yaml", "--json").json
    flags = perdure("run", "-m", "lwf+replay", "--set", "replay.capacity=30", *SHORT, "--seed", "2", "--json").json
    assert file["matrix"] == flags["matrix"]
    assert perdure("run", "experiment.yaml", "--seed", "3", "--json").json["seed"] == 3


def test_what_a_run_wrote_runs_again(perdure: Command) -> None:
    first = perdure("run", *SHORT, "-m", "si", "--scenario", "task", "--out", "a", "--json").json
    again = perdure("run", "a/config.yaml", "--json").json
    assert first["matrix"] == again["matrix"]
    assert first["scenario"] == again["scenario"] == "task"


def test_own_csv_and_image_folder(perdure: Command, tmp_path: Path) -> None:
    rows = "".join(f"{i % 3 + 0.1 * (i % 7)},{i % 5},{'abcd'[i % 4]}\n" for i in range(200))
    (tmp_path / "mine.csv").write_text(f"length,width,kind\n{rows}")
    settings = ("--set", "stream.target=kind", "--set", "stream.tasks=2", "--set", "train.epochs=1")
    found = perdure("run", "-b", "mine.csv", *settings, "--json", "--out", "a")
    assert found.code == 0, found.err
    assert (found.json["benchmark"], len(found.json["matrix"])) == ("mine", 2)
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["benchmark"] == str(tmp_path / "mine.csv")

    from PIL import Image

    for name, shade in (("cat", 20), ("dog", 200), ("eel", 90), ("fox", 150)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (8, 8), shade + i).save(tmp_path / "photos" / name / f"{i}.png")
    flags = ("--set", "stream.tasks=2", "--set", "train.epochs=1", "--set", "model.width=4")
    found = perdure("run", "-b", "photos", *flags, "--json")
    assert found.code == 0, found.err
    assert found.json["task_names"] == ["cat, dog", "eel, fox"]


def test_a_doubtful_combination_is_warned_about_in_one_line(perdure: Command) -> None:
    outcome = perdure("run", *SHORT, "-m", "lwf", "--seeds", "2", "--json")
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "add replay" in warnings[0]
    assert outcome.json["runs"]


BAD_USAGE = [
    (["-m", "ewcc"], "unknown method 'ewcc'; did you mean 'ewc'?"),
    (["-b", "split-mnits"], "unknown benchmark 'split-mnits'; did you mean 'split_mnist'?"),
    (["-m", "replay", "--set", "replay.capcity=5"], "unknown key 'replay.capcity'; did you mean 'capacity'?"),
    (["--set", "trian.lr=5"], "unknown section 'trian'"),
    (["-m", "replay", "--set", "replay.capacity=-5"], "capacity is -5"),
    (["--set", "train.lr=quick"], "train.lr is 'quick', it must be a number"),
    (["--scenario", "clas"], "unknown scenario 'clas'; did you mean 'class'?"),
    (["-m", "gem", "-m", "agem"], "'gem' and 'agem'"),
    (["-m", "finetune", "-m", "ewc"], "'finetune' is the run without any method"),
    (["--set", "stream.tasks=7"], "7"),
    (["--set", "model.head=multy"], "unknown head 'multy'; did you mean 'multi'?"),
    (["--device", "abacus"], "device 'abacus' is not usable here"),
    (["--seed", "1", "--seeds", "2"], "give one of them"),
    (["--seeds", "0"], "seeds is 0"),
    (["--seeds", "2,2"], "seeds is [2, 2], it must be a number of seeds or a list of different numbers from 0"),
    (["--seeds", "some"], "--seeds is 'some', it must be a number of seeds or seeds such as 0,3,5"),
    (["--jobs", "0"], "--jobs is 0"),
    (["--seed", "-1"], "--seed is -1"),
    (["--threads", "0"], "threads is 0"),
    (["--overwrite"], "add --out DIR"),
    (["--resume", "nowhere"], "'nowhere' holds no run"),
    (["--resume", "nowhere", "-m", "ewc"], "leave --method out"),
    (["list.yaml"], "list.yaml holds a list, it must be a mapping"),
    (["odd.yaml"], "unknown key 'train.epoch'; did you mean 'epochs'?"),
    (["--out", "full"], "full is not empty and holds no run"),
    (["--out", "list.yaml"], "list.yaml is a file"),
]
FAILURES = [
    (["missing.yaml"], "cannot read missing.yaml: no such file"),
    (["-b", "missing.csv"], "'missing.csv' does not exist"),
    (["-b", "split-mnist"], "run 'perdure data get mnist'"),
    (["-b", "split-mnist", "--data-root", "full"], "data set 'mnist' is not in full"),
    (["-b", "table.csv", "--set", "stream.target=colour"], "has no column 'colour'"),
    (["-b", "nan.csv"], "which is not a finite number"),
    (["-b", "empty"], "empty"),
    (["-b", "full/notes.txt"], "neither a .csv or .tsv file nor a folder"),
]


@pytest.mark.parametrize(
    ("argv", "code", "sentence"), [(a, 2, s) for a, s in BAD_USAGE] + [(a, 1, s) for a, s in FAILURES]
)
def test_bad_input_is_one_sentence_before_anything_is_written(
    perdure: Command, tmp_path: Path, argv: list[str], code: int, sentence: str
) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "odd.yaml").write_text("train: {epoch: 3}\n")
    (tmp_path / "table.csv").write_text("a,kind\n" + "1,x\n2,y\n" * 10)
    (tmp_path / "nan.csv").write_text("a,label\n" + "1,x\n2,y\n" * 10 + "nan,x\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    written = [] if {"--out", "--resume", "--overwrite"} & set(argv) else ["--out", "new"]
    outcome = perdure("run", *argv, *written)
    assert outcome.code == code, outcome.err
    assert sentence in outcome.sentence
    assert outcome.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_that_the_system_refuses(perdure: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    outcome = perdure("run", *SHORT, "--out", "notes.txt/a")
    assert outcome.code == 1
    assert outcome.sentence == "cannot write to notes.txt/a: not a directory; choose another folder"

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))  # what root never sees

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        outcome = perdure("run", *SHORT, "--out", "closed/a")
    assert outcome.code == 1
    assert outcome.sentence == "cannot write to closed/a: permission denied; choose another folder"
    with monkeypatch.context() as patch:
        patch.setattr("perdure.streams.own.read_path", refuse)
        outcome = perdure("run", "-b", str(tmp_path))
    assert outcome.code == 1
    assert outcome.sentence.startswith(f"{tmp_path}: permission denied")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
