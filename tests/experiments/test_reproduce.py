"""Runs of a protocol: kept by their settings, continued, judged, and written down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perdure.errors import DataError
from perdure.experiments import protocol as protocols
from perdure.experiments import reproduce as module
from perdure.experiments.protocol import Protocol, Row, choose_rows, protocol_of
from perdure.experiments.reproduce import Reproduction, reproduce
from perdure.experiments.reproduced import as_markdown, as_text
from perdure.experiments.run import run_seed

# The published numbers are inventions: one that any run hits, one that none does.
TINY = """
title: Tiny digits
source: nobody, nowhere
provenance: ["means: invented"]
notes: [Made for a test.]
published_runs: 10
floor: 1.0
first_seed: 1
seeds: 3
class_order: numpy
experiment:
  benchmark: split_digits
  scenario: class
  stream: {tasks: 5}
  model: {name: mlp, hidden: [8]}
  train: {optimizer: sgd, lr: 0.05, steps: 12, batch_size: 8, eval_future: false}
runs:
  sgd: {methods: []}
  er: {methods: [{name: replay, capacity: 30}], train: {lr: 0.1}}
rows:
  sgd: {published: 20.0, sd: 30.0, grade: C}
  sgd-task: {run: sgd, metric: task_restricted_accuracy, published: 50.0, sem: 30.0, grade: B}
  er: {published: 99.5, sd: 0.1, grade: A, finding: The number was invented.}
checks:
- {better: er, than: sgd, at_least: -100.0}
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Protocol:
    folder = tmp_path / "protocols"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(protocols, "FOLDER", folder)
    return protocol_of("tiny")


def run(protocol: Protocol, folder: Path, *rows: str, **options: Any) -> tuple[Reproduction, list[str]]:
    """The reproduction, and which runs were made for it."""
    made: list[str] = []
    found = reproduce(
        [protocol],
        choose_rows([protocol], rows),
        folder,
        on_event=lambda event: (
            made.append(f"{event['label']} {event['seed']}") if event["event"] == "run_end" else None
        ),
        **options,
    )
    return found, made


def numbers(found: Reproduction) -> Any:
    content = found.to_dict()
    return [{key: value for key, value in row.items() if key != "seconds"} for row in content["rows"]]


def test_rows_share_their_runs_and_a_miss_is_shown_with_three_and_with_six_seeds(
    tiny: Protocol, tmp_path: Path
) -> None:
    found, made = run(tiny, tmp_path / "work")
    sgd, task, er = found.to_dict()["rows"]
    assert made == [f"tiny {name} {seed}" for name, seed in
                    [("sgd", 1), ("sgd", 2), ("sgd", 3), ("er", 1), ("er", 2), ("er", 3),
                     ("er", 4), ("er", 5), ("er", 6)]]  # fmt: skip
    assert sgd["seeds"] == task["seeds"] == [1, 2, 3]
    assert sgd["seconds"] == task["seconds"]
    assert (sgd["inside"], sgd["first"]) == (True, None)
    assert task["ours"] > sgd["ours"], "the same models with fewer columns to choose from"
    assert (er["inside"], er["seeds"]) == (False, [1, 2, 3, 4, 5, 6])
    assert (er["first"]["inside"], er["first"]["seeds"]) == (False, [1, 2, 3])
    assert er["first"]["values"] == er["values"][:3]
    assert er["ours"] == pytest.approx(sum(er["values"]) / 6, abs=0.01)
    (check,) = found.to_dict()["checks"]
    assert check["seeds"] == [1, 2, 3]
    differences = [a - b for a, b in zip(er["values"], sgd["values"], strict=False)]
    assert check["values"] == pytest.approx(differences, abs=0.02)
    json.dumps(found.to_dict(), allow_nan=False)


def test_values_are_those_of_the_experiment_and_do_not_depend_on_processes(tiny: Protocol, tmp_path: Path) -> None:
    one, _ = run(tiny, tmp_path / "one", seeds=2)
    two, _ = run(tiny, tmp_path / "two", seeds=2, jobs=2)
    assert numbers(one) == numbers(two)
    results = run_seed(tiny.experiment_of("er", 2), 2, None)
    assert one.rows[2].verdict.values[2] == 100 * (results.metrics()["final_average_accuracy"] or 0)
    orders = [tiny.experiment_of("er", seed).stream["class_order"] for seed in (1, 2)]
    assert orders[0] != orders[1]


def test_what_is_kept_is_not_run_again_unless_its_settings_change(tiny: Protocol, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first, made = run(tiny, work, seeds=2)
    assert len(made) == 4
    again, made = run(tiny, work, seeds=2)
    assert (made, numbers(again)) == ([], numbers(first))
    assert not list(work.glob("**/checkpoint"))
    slower = replace(tiny, runs={**tiny.runs, "sgd": {"methods": [], "train": {"lr": 0.01}}})
    changed, made = run(slower, work, seeds=2)
    assert made == ["tiny sgd 1", "tiny sgd 2"]
    assert numbers(changed)[0] != numbers(first)[0]
    assert numbers(changed)[2] == numbers(first)[2]
    _, made = run(slower, work, "er", seeds=1, fresh=True)
    assert made == ["tiny er 1"]


def test_a_damaged_result_and_one_of_another_version_are_run_again(tiny: Protocol, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first, _ = run(tiny, work, "er", seeds=1)
    path = work / "tiny" / "er" / "seed-1" / "results.json"
    for text in ("{", path.read_text().replace('"torch": "', '"torch": "1.')):
        path.write_text(text)
        again, made = run(tiny, work, "er", seeds=1)
        assert made == ["tiny er 1"]
        assert numbers(again) == numbers(first)


def test_a_stopped_run_continues(tiny: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "evaluation" and event["after"] == 2:
            raise Stop

    folder = tmp_path / "work" / "tiny" / "er" / "seed-1"
    with pytest.raises(Stop):
        run_seed(tiny.experiment_of("er", 1), 1, folder, stop)
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["000000012", "000000024"]
    emptied: list[Path] = []
    monkeypatch.setattr(module, "clear", emptied.append)
    found, _ = run(tiny, tmp_path / "work", "er", seeds=1)
    assert not emptied
    whole, _ = run(tiny, tmp_path / "whole", "er", seeds=1)
    assert numbers(found) == numbers(whole)


def test_missing_data_are_known_before_anything_is_emptied(tmp_path: Path) -> None:
    protocol = protocol_of("der-split-mnist")
    kept = tmp_path / "work" / "der-split-mnist" / "sgd" / "seed-0" / "results.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    with pytest.raises(DataError, match="mnist"):
        run(protocol, tmp_path / "work", "sgd", seeds=1, data_root=str(tmp_path / "nothing"))
    assert kept.read_text() == "{}"


def test_the_page_shows_sources_misses_and_findings(tiny: Protocol, tmp_path: Path) -> None:
    found, _ = run(tiny, tmp_path / "work")
    page = as_markdown(found, "perdure reproduce tiny")
    joined = " ".join(page.split())
    for text in (
        "## Tiny digits", "nobody, nowhere", "- means: invented", "- Made for a test.", "2 of 3 rows are inside",
        "- **er**: The number was invented.", "| er minus sgd | -100 |", "`perdure reproduce tiny`",
    ):  # fmt: skip
        assert text in joined, text
    lines = [line for line in page.splitlines() if line.startswith("| er | A |")]
    assert len(lines) == 2
    assert all("| **outside** |" in line for line in lines)
    assert "| 1 – 3 |" in lines[0]
    assert "| 1 – 6 |" in lines[1]
    assert max(len(line) for line in page.splitlines() if not line.startswith("|")) <= 120
    text = as_text(found)
    assert text.startswith("Tiny digits\n\nrow ")
    assert text.count("outside") == 2
    assert "er minus sgd" in text


def test_a_row_without_a_verdict_is_only_reported(tiny: Protocol, tmp_path: Path) -> None:
    quiet = Row(run="er", published=99.5, sd=0.1, grade="C", report_only=True)
    found, made = run(replace(tiny, rows={"er": quiet}, checks=()), tmp_path / "work")
    assert len(made) == 3
    assert found.to_dict()["rows"][0]["inside"] is None
    assert "reported only" in as_text(found)
    assert "0 of 0 rows" in as_markdown(found, "perdure reproduce tiny")
