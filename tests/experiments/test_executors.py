"""Calls in processes: told in the order of their ends, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import perdure
from perdure.errors import DataError, PerdureWarning
from perdure.experiments.executors import run_each

SCRIPT = """
import dataclasses, sys
from pathlib import Path
import perdure
from perdure.experiments.compare import experiments_of, run_all

import helper

@perdure.register("mine")
@dataclasses.dataclass
class Mine(perdure.methods.L2):
    pass

short = {"train": {"steps": 3}, "model": {"name": "mlp", "hidden": [8]}, "seeds": 2}
if __name__ == "__main__":
    found = run_all(experiments_of(short, [["mine"], ["theirs"]], []), Path(sys.argv[1]), jobs=2)
    print(sorted(found), [run.seed for run in found["mine"]])
"""


HELPER = """
import dataclasses
import perdure

@perdure.register("theirs")
@dataclasses.dataclass
class Theirs(perdure.methods.L2):
    pass
"""


def nap(seconds: float, file: Path | None = None) -> tuple[float, int, int]:
    time.sleep(seconds)
    if file is not None:
        file.write_text("written")
    return seconds, os.getpid(), torch.get_num_threads()


def fail(seconds: float, file: Path | None) -> None:
    time.sleep(seconds)
    if file is None:
        raise DataError("no such row")
    time.sleep(1)
    file.write_text("written")


def test_every_end_is_told_at_once_by_single_threaded_processes() -> None:
    ends: list[str] = []
    told: list[float] = []
    results = {}

    def finished(key: str, result: tuple[float, int, int]) -> None:
        ends.append(key)
        told.append(time.monotonic())
        results[key] = result

    run_each(nap, {"slow": (2.0,), "fast": (0.0,), "later": (0.1,)}, 2, finished)
    assert ends == ["fast", "later", "slow"]
    assert told[2] - told[1] > 1
    assert len({process for _, process, _ in results.values()} - {os.getpid()}) == 2
    assert {threads for *_, threads in results.values()} == {1}


def where() -> tuple[str, str | None]:
    return os.getcwd(), os.environ.get("PERDURE_DATA")


def test_workers_are_started_where_the_caller_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setenv("PERDURE_DATA", name)
        found: dict[int, tuple[str, str | None]] = {}
        run_each(where, {0: (), 1: ()}, 2, found.__setitem__)
        assert set(found.values()) == {(str(tmp_path / name), name)}


def test_one_job_is_this_process() -> None:
    found = {}
    run_each(nap, {1: (0.0,), 2: (0.0,)}, 1, found.__setitem__)
    run_each(nap, {3: (0.0,)}, 5, found.__setitem__)
    assert {process for _, process, _ in found.values()} == {os.getpid()}


@pytest.mark.filterwarnings("error")
def test_an_error_is_raised_and_ends_everything_else(tmp_path: Path) -> None:
    arguments = {"bad": (0.5, None), "good": (0.5, tmp_path / "a"), "waiting": (0.0, tmp_path / "b")}
    with pytest.raises(DataError, match="no such row"):
        run_each(fail, arguments, 2, lambda key, result: None)
    assert not multiprocessing.active_children()
    time.sleep(1.2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("error")
def test_an_error_of_the_listener_ends_everything(tmp_path: Path) -> None:
    def finished(key: int, result: object) -> None:
        raise PerdureWarning("enough")

    with pytest.raises(PerdureWarning, match="enough"):
        run_each(nap, {0: (0.0, tmp_path / "a"), 1: (3.0, tmp_path / "b")}, 2, finished)
    assert not multiprocessing.active_children()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_workers_know_what_a_script_has_registered(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    environment = {**os.environ, "PYTHONPATH": str(Path(perdure.__file__).parents[1])}
    words = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "runs")]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)

    (tmp_path / "script.py").write_text(SCRIPT.replace("if __name__", "if True or __name__"))
    assert "put what runs under if __name__ == '__main__':" in run().stderr
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run()
    assert done.stdout == "['mine', 'theirs'] [0, 1]\n", done.stderr
