from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
Start = Callable[..., Any]
SHORT = ("--set", "train.epochs=1", "--set", "model.hidden=[16]")


FAST = (*SHORT, "--seeds", "2", "--jobs", "1")


def test_the_table_the_report_and_the_plot(perdure: Command, tmp_path: Path) -> None:
    outcome = perdure("compare", "--methods", "finetune,lwf+replay", *FAST)
    assert outcome.code == 0, outcome.err
    assert "lwf+replay" in outcome.out
    assert "±" in outcome.out
    assert "no difference can reach p < .05" in outcome.out
    assert "replay remembers 200" not in outcome.out  # small buffers are the default comparison's, not anybody's
    for name, path in (("report", "runs/compare/report.html"), ("plot", "runs/compare/accuracy.png")):
        assert f"{name:<8} {path}" in outcome.out.splitlines()
        assert (tmp_path / path).stat().st_size > 1000
    assert "(4 of 4)" in outcome.err
    again = perdure("compare", "--methods", "replay", *FAST)
    assert again.code == 0, again.err
    assert not (tmp_path / "runs" / "compare" / "finetune").exists()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["compare"]


def test_json_has_summaries_differences_and_paths(perdure: Command) -> None:
    found = perdure("compare", "--methods", "finetune,replay", *FAST, "--json").json
    assert set(found["summaries"]) == {"finetune", "replay"}
    assert found["differences"][0]["seeds"] == 2
    assert (found["report"], found["plot"]) == ("runs/compare/report.html", "runs/compare/accuracy.png")


def test_the_default_is_five_methods_and_the_joint_reference_with_small_buffers(perdure: Command) -> None:
    outcome = perdure("compare", *SHORT, "--seeds", "1", "--jobs", "1", "--out", "all", "--json")
    assert list(outcome.json["summaries"]) == ["finetune", "ewc", "lwf", "replay", "derpp", "joint"]
    text = Path("all/replay/config.yaml").read_text()
    assert "capacity: 200" in text
    task = perdure("compare", *SHORT, "--seeds", "1", "--jobs", "1", "--scenario", "task", "--out", "task", "--json")
    assert list(task.json["summaries"]) == ["finetune", "ewc", "lwf", "replay", "derpp", "joint"]


def test_what_cannot_work_is_found_before_anything_is_trained_or_written(perdure: Command, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for argv, sentence in (
        (["--methods", "finetune,replya"], "unknown method 'replya'; did you mean 'replay'?"),
        (["--methods", "replay,replay"], "'replay' are listed twice"),
        (["--methods", ","], "--methods is empty"),
        (["--methods", "gem+agem"], "'gem' and 'agem'"),
        (["--set", "gem.margin=3"], "unknown section 'gem'"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--seeds", "0"], "seeds is 0"),
        (["--out", "full"], "full is not empty and holds no comparison"),
    ):
        outcome = perdure("compare", *argv)
        assert outcome.code == 2, outcome.err
        assert sentence in outcome.err.splitlines()[-1]
        assert outcome.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# A terminal interrupts everybody, a script the command alone. Small systems have no pgrep, by which joblib kills.
@pytest.mark.parametrize(
    ("whom", "when", "path"),
    [("everybody", "starting", None), ("the command", "training", None), ("the command", "training", "/nowhere")],
)
def test_ctrl_c_ends_the_workers_and_leaves_no_traces(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, whom: str, path: str | None
) -> None:
    if path is not None:
        monkeypatch.setenv("PATH", path)
    words = ["compare", "--methods", "joint,replay", "--set", "train.epochs=200", "--jobs", "2"]
    process = start(*words, start_new_session=True)
    deadline = time.monotonic() + 240
    pattern = "runs/.compare.*/*/*/log.jsonl" if when == "training" else "runs/.compare.*"
    while not list(tmp_path.glob(pattern)) and time.monotonic() < deadline:
        time.sleep(0.02)
    while len(children(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = children(process.pid)
    assert len(workers) >= 2
    if whom == "everybody":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    outcome = process.outcome()
    assert outcome.code == 130
    assert outcome.sentence == "interrupted; nothing was kept of this comparison"
    assert list(tmp_path.iterdir()) == []
    wait_for_the_end_of(workers)


@pytest.mark.parametrize("path", ["its own", "empty"], ids=["", "without pgrep"])
def test_a_worker_that_dies_is_one_sentence_and_no_worker_goes_on(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    if path == "empty":
        monkeypatch.setenv("PATH", "/nowhere")
    process = start("compare", "--methods", "joint,replay", "--set", "train.epochs=500", "--jobs", "2")
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("runs/.compare.*/*/*/log.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = [pid for pid in children(process.pid) if "LokyProcess" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    outcome = process.outcome()
    assert outcome.code == 1
    assert outcome.sentence == "a worker process died; free memory, or try --jobs 1"
    assert list(tmp_path.iterdir()) == []
    wait_for_the_end_of(workers)


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def test_workers_end_with_their_parent(start: Start, tmp_path: Path) -> None:
    process = start("compare", "--methods", "joint,replay", "--set", "train.epochs=500", "--jobs", "2")
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("runs/.compare.*/*/*/log.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = children(process.pid)
    process.kill()
    process.wait(timeout=60)
    wait_for_the_end_of(workers)


def wait_for_the_end_of(processes: list[int]) -> None:
    deadline = time.monotonic() + 240
    while [pid for pid in processes if running(pid)] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in processes if running(pid)]


def running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except OSError:
        return False
