from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure import cli, registry
from perdure.errors import DataError, PerdureWarning, UsageError

Command = Callable[..., Any]
Start = Callable[..., Any]
SHORT = ("--set", "train.epochs=1", "--set", "model.hidden=[16]")

COMMANDS = ("", "compare", "run", "list", "explain", "data", "data get", "data list", "report", "audit")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(perdure: Command, name: str) -> None:
    outcome = perdure(*name.split(), "--help")
    assert outcome.code == 0
    assert "Usage: perdure" in outcome.out
    assert outcome.err == ""


def test_help_needs_neither_torch_nor_numpy_nor_joblib() -> None:
    script = (
        "import sys\nfrom perdure.cli import main\n"
        f"for name in {COMMANDS!r}:\n    main([*name.split(), '--help'])\n"
        "assert not {'torch', 'numpy', 'pandas', 'matplotlib', 'joblib'} & set(sys.modules)\n"
    )
    source = str(Path(cli.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, stdout=subprocess.DEVNULL)


def test_help_comes_within_half_a_second(start: Start) -> None:
    """Of processor time, which does not depend on what else the machine has to do."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert start("run", "--help").outcome().code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5


@pytest.mark.parametrize(
    "argv",
    [["rnu"], ["run", "--sed", "1"], ["run", "--seed", "one"], ["list", "method"], ["explain"], ["run", "a", "b"]],
)
def test_a_command_line_that_cannot_be_read_is_bad_usage(perdure: Command, argv: list[str]) -> None:
    outcome = perdure(*argv)
    assert outcome.code == 2
    assert "--help" in outcome.sentence
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UsageError("not allowed"), 2, "not allowed"),
        (DataError("bad row"), 1, "bad row"),
        (KeyboardInterrupt("go on so"), 130, "interrupted; go on so"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("two\nlines"), 1, "RuntimeError: two lines; PERDURE_TRACEBACK=1"),
    ],
)
def test_every_error_is_one_sentence_and_a_code(
    perdure: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, sentence: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    outcome = perdure("list", "models")
    assert outcome.code == code
    assert outcome.sentence.startswith(sentence)


def test_a_warning_is_one_line_and_said_once(perdure: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def warn(*_: object, **__: object) -> None:
        warnings.warn("looks\nodd", PerdureWarning, stacklevel=1)
        warnings.warn("looks odd", PerdureWarning, stacklevel=1)

    monkeypatch.setattr(cli, "app", warn)
    outcome = perdure("list", "models")
    assert (outcome.code, outcome.err) == (0, "warning: looks odd\n")


def test_a_reader_that_leaves_early_is_no_error_to_talk_about(start: Start) -> None:
    process = start("list", "benchmarks")
    process.stdout.close()
    process.wait(timeout=60)
    assert process.stderr.read() == ""


def test_the_command_is_a_module_too(start: Start) -> None:
    outcome = start("explain", "nothing").outcome()
    assert outcome.code == 2
    assert outcome.sentence.startswith("unknown method 'nothing'")
    assert start("--version").outcome().out.strip()


def test_ctrl_c_says_how_to_go_on_and_the_run_can_be_continued(start: Start, tmp_path: Path) -> None:
    words = ["run", "-m", "replay", "--set", "train.epochs=60", "--set", "model.hidden=[16]", "--out", "a"]
    process = start(*words)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("a/checkpoint/*/state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    outcome = process.outcome()
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1] == "error: interrupted; continue with: perdure run --resume a"
    resumed = start("run", "--resume", "a", "--json").outcome()
    whole = start(*words[:-2], "--json").outcome()
    assert resumed.code == whole.code == 0
    assert resumed.json["matrix"] == whole.json["matrix"]


def test_ctrl_c_in_processes_says_how_to_go_on_too(start: Start, tmp_path: Path) -> None:
    words = ["run", "-m", "replay", "--set", "train.epochs=60", "--set", "model.hidden=[16]", "--seeds", "2"]
    process = start(*words, "--jobs", "2", "--out", "a", start_new_session=True)
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("a/seed-*/checkpoint/*/state.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    outcome = process.outcome()
    assert outcome.code == 130
    assert outcome.sentence == "interrupted; continue with: perdure run --resume a"
    resumed = start("run", "--resume", "a", "--jobs", "2", "--json").outcome()
    whole = start(*words, "--jobs", "1", "--json").outcome()
    assert resumed.code == whole.code == 0
    assert [run["matrix"] for run in resumed.json["runs"]] == [run["matrix"] for run in whole.json["runs"]]


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(start: Start, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    outcome = start("run", *SHORT, "--out", "new/a", preexec_fn=limit).outcome()
    assert outcome.code == 1
    last = outcome.err.splitlines()[-1]
    assert last.startswith("error: cannot ")
    assert "file too large" in last.lower()
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_the_registry_can_be_listed_and_explained(perdure: Command) -> None:
    for kind in ("methods", "benchmarks", "models", "datasets"):
        names = [entry["name"] for entry in perdure("list", kind, "--json").json]
        assert set(getattr(registry, kind).names()) <= set(names)
        text = perdure("list", kind)
        assert text.code == 0
        assert all(name in text.out for name in names)
        for name in names if kind != "datasets" else ():
            explained = perdure("explain", name.replace("_", "-"), "--json").json
            assert explained["name"] == name
            assert explained["summary"]
            assert perdure("explain", name).out.startswith(f"{name}: ")
