"""`perdure tune`: a file or flags, one sentence for what is wrong, and on after a kill."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from perdure.errors import PerdureWarning

pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore::perdure.errors.PerdureWarning")
Perdure = Callable[..., Any]

SPACE: dict[str, Any] = {
    "scenario": "task",
    "methods": ["ewc"],
    "train": {"epochs": 2},
    "space": {"ewc.strength": [1, 100, 10000], "lr": [0.001, 0.01]},
    "tune": {"sampler": "grid", "tasks": 2},
}


def write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(SPACE | changes))
    return path


def test_a_file_gives_a_table_and_an_experiment_that_runs(perdure: Perdure, tmp_path: Path) -> None:
    file = write(tmp_path / "space.yaml")
    outcome = perdure("tune", file, "--out", "search")
    assert outcome.code == 0, outcome.err
    assert "(6 of 6, 0 s left)" in outcome.err
    assert "chosen: ewc.strength=" in outcome.out
    assert "the first 2 tasks, 10% of their training data held out, seed 1000" in outcome.out
    again = perdure("tune", "--resume", "search", "--json")
    assert again.code == 0
    assert "6 of 6 trials are there already" in again.err
    best = again.json["best"]
    assert best["score"] == max(trial["score"] for trial in again.json["trials"])
    ran = perdure("run", "search/best.yaml", "--out", "run", "--json")
    assert ran.code == 0, ran.err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["methods"][0]["strength"] == best["values"]["ewc.strength"]
    assert config["train"]["lr"] == best["values"]["train.lr"]


def test_flags_do_without_a_file(perdure: Perdure) -> None:
    words = ["tune", "-m", "ewc", "--scenario", "task", "--set", "train.epochs=1", "--seed", "7"]
    words += ["--space", "ewc.strength=loguniform(1, 1e4)", "--space", "train.batch-size=[16,32]", "--json"]
    words += ["--sampler", "random", "--trials", "3", "--out", "search"]
    outcome = perdure(*words, "--tasks", "2")
    assert outcome.code == 0, outcome.err
    assert len(outcome.json["trials"]) == 3
    assert {trial["values"]["train.batch_size"] for trial in outcome.json["trials"]} <= {16, 32}
    other = perdure(*words, "--tasks", "3")
    assert other.code == 2
    assert "holds a search with tune.tasks = 2, and this one has 3" in other.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["tune"], 2, "the key 'space' is missing"),
        (["tune", "-m", "ewc", "--space", "ewc.strength"], 2, "is not SECTION.KEY=VALUES"),
        (["tune", "-m", "ewc", "--space", "ewc.strength=[1"], 2, "is no YAML"),
        (["tune", "-m", "ewc", "--space", "ewc.strenth=[1]"], 2, "did you mean 'strength'"),
        (["tune", "-m", "ewc", "--space", "ewc.strength=[1]", "--sampler", "best"], 2, "tune.sampler is 'best'"),
        (["tune", "-m", "ewc", "--space", "ewc.strength=[1]", "--seed", "0"], 2, "among the seeds to be reported"),
        (["tune", "-m", "ewc", "--space", "ewc.strength=[1]", "--workers", "0"], 2, "workers is 0"),
        (["tune", "--resume", "nothing"], 2, "holds no search"),
        (["tune", "--resume", "nothing", "--tasks", "2"], 2, "leave --tasks out"),
        (["tune", "nothing.yaml"], 1, "cannot read nothing.yaml"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(
    perdure: Perdure, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    outcome = perdure(*words)
    assert outcome.code == code
    assert said in outcome.sentence
    assert not list(tmp_path.iterdir())


def test_without_optuna_it_says_what_to_install(
    perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    outcome = perdure("tune", write(tmp_path / "space.yaml"), "--out", "search")
    assert outcome.code == 1
    assert outcome.sentence == "perdure tune needs optuna; pip install 'perdure[tune]' installs it"
    assert not (tmp_path / "search").exists()


def attempts(file: Path) -> list[tuple[int, str]]:
    """Number and state of every attempt that the study holds."""
    if not file.is_file():
        return []
    with sqlite3.connect(file, timeout=60) as study:
        try:
            return study.execute("select number, state from trials order by number").fetchall()
        except sqlite3.OperationalError:  # the tables are being made
            return []
        finally:
            study.commit()


def test_a_killed_search_of_two_workers_goes_on_and_does_nothing_twice(
    perdure: Perdure, start: Callable[..., Any], tmp_path: Path
) -> None:
    write(tmp_path / "space.yaml", train={"epochs": 15}, space={"ewc.strength": list(range(1, 9))})
    killed = start("tune", "space.yaml", "--out", "search", "--workers", "2")
    database = tmp_path / "search" / "study.db"
    deadline = time.monotonic() + 100
    while sum(state == "COMPLETE" for _, state in attempts(database)) < 2:
        assert time.monotonic() < deadline, killed.poll()
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    time.sleep(1.0)  # its workers notice within a fifth of a second
    before = attempts(database)
    time.sleep(0.5)
    assert attempts(database) == before, "the workers of a killed search go on"
    outcome = perdure("tune", "--resume", "search", "--json")
    assert outcome.code == 0, outcome.err
    after = attempts(database)
    done = [number for number, state in before if state == "COMPLETE"]
    assert f"{len(done)} of 8 trials are there already" in outcome.err
    assert [number for number, state in after if state == "COMPLETE"][: len(done)] == done
    assert sum(state == "COMPLETE" for _, state in after) == 8
    assert not any(state == "RUNNING" for _, state in after)
    assert [trial["values"]["ewc.strength"] for trial in outcome.json["trials"]] == list(range(1, 9))


def test_a_warning_of_the_methods_is_one_line(perdure: Perdure, tmp_path: Path) -> None:
    assert issubclass(PerdureWarning, UserWarning)
    outcome = perdure("tune", write(tmp_path / "space.yaml", scenario="class"), "--out", "search")
    assert outcome.code == 0
    assert sum("known to forget everything" in line for line in outcome.err.splitlines()) == 1
