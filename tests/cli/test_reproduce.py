from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure.experiments import protocol as protocols

Command = Callable[..., Any]

TINY = """
title: Tiny digits
source: nobody, nowhere
published_runs: 10
floor: 1.0
first_seed: 0
seeds: 2
experiment:
  benchmark: split_digits
  scenario: class
  model: {name: mlp, hidden: [8]}
  train: {steps: 4, batch_size: 8, eval_future: false}
runs: {sgd: {methods: []}, er: {methods: [{name: replay, capacity: 30}]}}
rows:
  sgd: {published: 20.0, sd: 30.0, grade: C}
  er: {published: 99.5, sd: 0.1, grade: A}
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "protocols"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(protocols, "FOLDER", folder)


@pytest.mark.usefixtures("tiny")
def test_the_table_the_page_and_the_json(perdure: Command, tmp_path: Path) -> None:
    outcome = perdure("reproduce", "tiny", "--jobs", "1", "--out", "docs/reproduced.md")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("Tiny digits\n")
    assert "(4 of 4)" in outcome.err
    assert "outside" in outcome.out, "a miss is a result, not a failure of the command"
    assert "`perdure reproduce tiny`" in Path("docs/reproduced.md").read_text()
    again = perdure("reproduce", "tiny", "--rows", "s*", "--seeds", "1", "--json")
    assert again.code == 0, again.err
    assert again.err == "0 runs to do in runs/reproduce, 1 finished before (--fresh: again)\n"
    content = again.json
    assert content["protocols"] == ["tiny"]
    (row,) = content["rows"]
    assert {"id", "published", "ours", "low", "high", "inside", "seconds"} <= set(row)
    assert (row["id"], row["published"], row["seeds"]) == ("sgd", 20.0, [0])
    assert (tmp_path / "runs/reproduce/tiny/er/seed-1/results.json").is_file()


def test_bad_input_is_one_sentence_and_writes_nothing(perdure: Command, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    for argv, code, sentence in (
        (["der-split-mnits"], 2, "unknown protocol 'der-split-mnits'; did you mean 'der-split-mnist'?"),
        (["der-split-mnist", "--rows", "er200"], 2, "unknown row 'er200'; did you mean 'er-200'?"),
        (["der-split-mnist", "--rows", ","], 2, "--rows is empty"),
        (["der-split-mnist", "--seeds", "0"], 2, "--seeds is 0"),
        (["der-split-mnist", "--jobs", "0"], 2, "--jobs is 0"),
        (["der-split-mnist", "--out", "folder"], 2, "--out folder is a folder"),
        (["der-split-mnist", "--out", "folder/file/a.md"], 1, "file is no folder that may be written to"),
        ([], 2, "give the name of a protocol; there are der-permuted-mnist, der-split-mnist, vandeven-split-mnist"),
        (["der-split-mnist", "--rows", "sgd"], 1, "perdure data get mnist"),
    ):
        outcome = perdure("reproduce", *argv)
        assert outcome.code == code, outcome.err
        assert sentence in outcome.sentence
        assert outcome.out == ""
        assert [path.name for path in tmp_path.iterdir()] == ["folder"], argv
