"""`perdure audit`: what it finds of runs made by `perdure run` on the embedded digits, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.audit import ROWS, fixed_rows
from perdure.checkpoint import load_state, save_state
from perdure.experiments.build import prepare
from perdure.experiments.run import read_run

Command = Callable[..., Any]
SHORT = ("--scenario", "task", "--set", "train.steps=4", "--set", "model.hidden=[16]")
NAMES = ["0, 1", "2, 3", "4, 5", "6, 7", "8, 9"]


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoint").iterdir())[-1]


def tampered(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The newest checkpoint with another content and the right checksums."""
    path = newest(folder)
    state = load_state(path)
    change(state)
    shutil.rmtree(path)
    save_state(path, state)


def test_fine_tuning_changes_every_old_task_and_packnet_none(perdure: Command) -> None:
    assert perdure("run", *SHORT, "--out", "plain").code == 0
    outcome = perdure("audit", "plain")
    assert outcome.code == 1, outcome.err
    assert outcome.out.splitlines()[-1].startswith("finetune: 4 of 4 old tasks changed: '0, 1' (by '2, 3'), ")
    assert outcome.out.count("  changed") == 10
    assert outcome.err == ""

    assert perdure("run", *SHORT, "-m", "packnet", "--out", "packed").code == 0
    outcome = perdure("audit", "packed")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == ("packnet: all 4 old tasks give bit-identical logits after every later task")
    assert outcome.out.count("  equal") == 10
    lines = [line.split("  ") for line in outcome.out.splitlines()[3:-2]]
    assert [(line[0], line[1]) for line in lines] == [(NAMES[j], NAMES[i]) for j in range(5) for i in range(j + 1, 5)]


def test_json_says_the_same(perdure: Command) -> None:
    perdure("run", *SHORT, "-m", "packnet", "--seeds", "2", "--jobs", "1", "--out", "a")
    outcome = perdure("audit", "a", "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert found["passed"] is True
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    run = found["runs"][1]
    assert (run["label"], run["compared"], run["finished"], run["task_names"][0]) == ("packnet", "logits", 5, NAMES[0])
    assert run["reproduced"] == [True] * 5
    assert [(row["task"], row["after"]) for row in run["rows"]] == [(j, i) for j in range(5) for i in range(j + 1, 5)]
    assert [row["recomputed"] for row in run["rows"]] == [row["after"] == 4 for row in run["rows"]]
    one = perdure("audit", Path("a") / "seed-1", "--json").json
    assert one["runs"][0]["rows"] == run["rows"]


def test_a_checkpoint_is_audited_as_it_was_then(perdure: Command, tmp_path: Path) -> None:
    flags = ("--set", "train.checkpoint_every=3", "--set", "train.optimizer=adamw", "--set", "train.weight_decay=0.1")
    perdure("run", *SHORT, *flags, "-m", "packnet", "--out", "a")
    older, last = sorted((tmp_path / "a" / "checkpoint").iterdir())
    assert load_state(older)["position"]["step"] == 3, "the one before the last is inside the last task"
    found = perdure("audit", older, "--json")
    assert found.code == 0, found.err
    run = found.json["runs"][0]
    assert (run["finished"], run["reproduced"]) == (4, None)
    assert [row["after"] for row in run["rows"] if row["recomputed"]] == [4, 4, 4, 4]
    assert perdure("audit", last, "--json").json["runs"][0]["finished"] == 5
    shutil.copytree(older, tmp_path / "alone")
    outcome = perdure("audit", tmp_path / "alone")
    assert outcome.code == 2
    assert "lies in no folder of a run" in outcome.sentence


def test_a_resumed_run_has_the_digests_of_an_uninterrupted_one(perdure: Command, tmp_path: Path) -> None:
    perdure("run", *SHORT, "-m", "packnet", "--out", "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(newest(tmp_path / "cut"))
    (tmp_path / "cut" / "results.json").unlink()
    assert len(load_state(newest(tmp_path / "cut"))["position"]["audit"]) == 4
    assert perdure("run", "--resume", "cut").code == 0
    whole, cut = (load_state(newest(tmp_path / name))["position"]["audit"] for name in ("whole", "cut"))
    assert whole == cut
    assert [len(taken["outputs"]) for taken in whole] == [1, 2, 3, 4, 5]


def test_digests_leave_no_trace_in_the_run(perdure: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from perdure import fitting

    perdure("run", *SHORT, "-m", "hat", "-m", "replay", "--out", "with")
    monkeypatch.setattr(fitting._Run, "_take_digests", lambda *_: None)
    perdure("run", *SHORT, "-m", "hat", "-m", "replay", "--out", "without")
    a, b = (load_state(newest(tmp_path / name)) for name in ("with", "without"))
    assert a["learner"]["model"].keys() == b["learner"]["model"].keys()
    assert all(torch.equal(a["learner"]["model"][key], b["learner"]["model"][key]) for key in a["learner"]["model"])
    assert torch.equal(a["rng"], b["rng"])
    assert a["learner"]["passes"] == b["learner"]["passes"]
    assert a["learner"]["modes"] == b["learner"]["modes"]
    outcome = perdure("audit", "without")
    assert outcome.code == 1
    assert "has no digests" in outcome.sentence


def test_one_bit_of_one_weight_in_the_checkpoint_is_noticed(perdure: Command, tmp_path: Path) -> None:
    perdure("run", *SHORT, "-m", "packnet", "--out", "a")

    def flip(state: dict[str, Any]) -> None:
        bits = state["learner"]["model"]["head.weight"][2].view(torch.int32)  # a row of the second task
        bits[bits.abs().argmax()] ^= 1 << 22

    tampered(tmp_path / "a", flip)
    outcome = perdure("audit", "a", "--json")
    assert outcome.code == 1, outcome.err
    run = outcome.json["runs"][0]
    assert run["reproduced"] == [True, False, True, True, True]
    assert {(row["task"], row["after"]) for row in run["rows"] if not row["equal"]} == {(1, 4)}
    outcome = perdure("audit", "a")
    assert outcome.code == 1
    assert "does not give the outputs that its run had for 2, 3" in outcome.err


def test_the_rows_are_few_and_follow_from_the_seed_alone(perdure: Command, tmp_path: Path) -> None:
    perdure("run", *SHORT, "--out", "a")
    stream = prepare(read_run(tmp_path / "a"), 0).stream
    before = torch.get_rng_state()
    rows = [fixed_rows(task, stream.seed) for task in stream]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(len(chosen) == ROWS == 32 and len(set(chosen.tolist())) == ROWS for chosen in rows)
    assert all(torch.equal(chosen, fixed_rows(task, stream.seed)) for chosen, task in zip(rows, stream, strict=True))
    assert not torch.equal(fixed_rows(stream[0], 0), fixed_rows(stream[0], 1))
    taken = load_state(newest(tmp_path / "a"))["position"]["audit"]
    assert len({taken[i]["inputs"][0] for i in range(5)}) == 1, "the same rows after every task"
    assert sum(len(digest) for digest in taken[-1]["outputs"]) == 5 * 64, "nothing but digests is kept"


def test_predictions_are_compared_where_a_method_makes_them(perdure: Command) -> None:
    perdure("run", *SHORT, "-m", "gdumb", "--set", "gdumb.epochs=1", "--set", "gdumb.capacity=40", "--out", "a")
    found = perdure("audit", "a", "--json")
    assert found.json["runs"][0]["compared"] == "predictions"
    assert found.json["runs"][0]["reproduced"] == [True] * 5
    assert found.code == int(any(not row["equal"] for row in found.json["runs"][0]["rows"]))


def test_what_cannot_be_audited(perdure: Command, tmp_path: Path) -> None:
    perdure("run", "--scenario", "class", *SHORT[2:], "--out", "class")
    rows = "".join(f"{i % 3},{i % 5},{'abcd'[i % 4]}\n" for i in range(80))
    (tmp_path / "mine.csv").write_text(f"length,width,label\n{rows}")
    perdure("run", *SHORT, "-b", "mine.csv", "--set", "stream.tasks=2", "--out", "mine")
    assert perdure("audit", "mine").code == 1
    (tmp_path / "mine.csv").write_text(f"length,width,label\n{rows}9,9,a\n")
    perdure("run", *SHORT, "--out", "empty")
    shutil.rmtree(tmp_path / "empty" / "checkpoint")
    for folder, code, sentence in (
        ("nowhere", 2, "'nowhere' holds no run"),
        ("class", 2, "class-incremental, where old outputs are meant to change"),
        ("mine", 1, "the data of the run in mine are not what they were"),
        ("empty", 1, "has no checkpoint; continue it"),
    ):
        outcome = perdure("audit", folder)
        assert outcome.code == code
        assert sentence in outcome.sentence
        assert json.loads(json.dumps(outcome.out)) == ""
