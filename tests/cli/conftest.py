from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from perdure import cli
from perdure.cli import main


class Outcome(NamedTuple):
    """What a command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON value."""
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """The one line on standard error, which must be an error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")


@pytest.fixture
def perdure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Outcome]:
    """The command in this process, in an empty folder and without data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERDURE_DATA", str(tmp_path / "no-data"))

    def run(*argv: str | Path) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return Outcome(code, *capsys.readouterr())

    return run


class Process(subprocess.Popen[str]):
    """The command in a process of its own."""

    def outcome(self) -> Outcome:
        """Wait for its end."""
        out, err = self.communicate(timeout=120)
        return Outcome(self.returncode, out, err)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts the command in a process of its own, in an empty folder and without data sets."""
    started: list[Process] = []

    def start(*argv: str, **options: Any) -> Process:
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(cli.__file__).parents[2]),
            "PERDURE_DATA": str(tmp_path / "no-data"),
            "OMP_NUM_THREADS": "1",
        }
        words = [sys.executable, "-m", "perdure", *argv]
        options = {"preexec_fn": _hear_ctrl_c, **options}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(Process(words, cwd=tmp_path, env=environment, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _hear_ctrl_c() -> None:
    """A shell has what it starts in the background ignore Ctrl-C, the tests included and all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
