from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., Any]
SHORT = ("--set", "train.epochs=1", "--set", "model.hidden=[16]")


def test_a_report_of_several_folders(perdure: Command, tmp_path: Path) -> None:
    perdure("run", *SHORT, "--seeds", "2", "--out", "none")
    perdure("run", *SHORT, "-m", "replay", "--seeds", "2", "--out", "replay")
    outcome = perdure("report", "none", "replay", "-o", "both.html")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-2:] == ["report   both.html", "plot     both.png"]
    page = (tmp_path / "both.html").read_text()
    assert "finetune" in page
    assert "replay" in page
    found = perdure("report", "none", "replay", "-o", "both.html", "--json").json
    assert set(found["summaries"]) == {"finetune", "replay"}
    assert found["report"] == "both.html"


def test_the_report_of_one_folder_lies_in_it(perdure: Command, tmp_path: Path) -> None:
    perdure("run", *SHORT, "--out", "a")
    assert perdure("report", "a").code == 0
    assert {"report.html", "accuracy.png"} <= {path.name for path in (tmp_path / "a").iterdir()}
    assert perdure("run", *SHORT, "--out", "a", "--overwrite").code == 0
    assert not (tmp_path / "a" / "report.html").exists()


def test_a_comparison_counts_as_all_that_it_holds(perdure: Command, tmp_path: Path) -> None:
    perdure("compare", "--methods", "finetune,replay", *SHORT, "--seeds", "1", "--jobs", "1")
    found = perdure("report", "runs/compare", "-o", "again", "--json")
    assert found.code == 0, found.err
    assert set(found.json["summaries"]) == {"finetune", "replay"}
    assert (tmp_path / "again" / "report.html").exists()


def test_a_report_needs_neither_the_data_nor_the_configuration_of_a_run(perdure: Command, tmp_path: Path) -> None:
    rows = "".join(f"{i % 3},{i % 5},{'abcd'[i % 4]}\n" for i in range(80))
    (tmp_path / "mine.csv").write_text(f"length,width,label\n{rows}")
    flags = ("-b", "mine.csv", "--set", "stream.tasks=2", "--set", "train.epochs=1", "--set", "train.lr=0.0625")
    assert perdure("run", *flags, "--out", "a").code == 0
    (tmp_path / "mine.csv").unlink()
    assert perdure("report", "a").code == 0
    assert "0.0625" in (tmp_path / "a" / "report.html").read_text()
    (tmp_path / "a" / "config.yaml").unlink()  # as a run from Python leaves it
    assert perdure("report", "a").code == 0


def test_what_cannot_be_reported(perdure: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "results.json").write_text("{")
    for argv, code, sentence in (
        ([], 2, "there is no folder to report on"),
        (["missing"], 2, "'missing' is no folder"),
        (["empty"], 2, "'empty' holds no run"),
        (["odd"], 1, "is damaged"),
    ):
        outcome = perdure("report", *argv)
        assert outcome.code == code
        assert sentence in outcome.sentence
    perdure("run", *SHORT, "--out", "a")
    perdure("run", *SHORT, "--scenario", "task", "--out", "b")
    outcome = perdure("report", "a", "b", "-o", "both.html")
    assert outcome.code == 2
    assert "different scenarios" in outcome.sentence
    assert not (tmp_path / "both.html").exists()
