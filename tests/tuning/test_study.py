"""Workers that share a study: nothing is done twice, and nothing that has finished is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import perdure
from perdure.errors import StorageError, UsageError
from perdure.tuning import study
from perdure.tuning.study import StudyLedger
from perdure.tuning.trials import Outcome, Unit

pytest.importorskip("optuna")
from counting_worker import SEARCH, SPACE, UNITS, ledger

Start = Callable[..., "subprocess.Popen[str]"]
FIRST = Unit("grid 0", {"ewc.strength": 0})


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start(workers: int, hang_at: int = 0) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("counting_worker.py")
        environment = {**os.environ, "PYTHONPATH": str(Path(perdure.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, str(script), str(tmp_path), str(workers), str(hang_at)]
        started.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def lines(folder: Path, process: int | None = None) -> list[str]:
    files = folder.glob("log-*" if process is None else f"log-{process}")
    return [line for file in files for line in file.read_text().splitlines()]


def test_workers_share_a_grid_and_do_no_trial_twice(tmp_path: Path, start: Start) -> None:
    ledger(tmp_path)  # one that makes the tables, so that all begin with the first unit at the same moment
    workers = [start(3) for _ in range(3)]
    for worker in workers:
        assert worker.wait(100) == 0, worker.communicate()[1]
    assert Counter(lines(tmp_path)) == Counter([f"{e} grid {i}" for i in range(UNITS) for e in ("begin", "end")])
    assert sum(bool(lines(tmp_path, worker.pid)) for worker in workers) > 1
    finished, in_hand = ledger(tmp_path).look()
    assert {key: trial.score for key, trial in finished.items()} == {f"grid {i}": i / UNITS for i in range(UNITS)}
    assert not in_hand


def test_a_killed_worker_loses_no_finished_trial_and_another_takes_up_the_one_in_hand(
    tmp_path: Path, start: Start
) -> None:
    doomed, other = start(2, hang_at=3), start(2)
    deadline = time.monotonic() + 60
    while sum(line.startswith("begin") for line in lines(tmp_path, doomed.pid)) < 3:
        assert time.monotonic() < deadline, other.poll()
        time.sleep(0.01)
    doomed.send_signal(signal.SIGKILL)  # and nobody waits for it: it stays in the table of processes
    assert other.wait(100) == 0, other.communicate()[1]
    *done, hung = [line for line in lines(tmp_path, doomed.pid) if line.startswith("begin")]
    ended = Counter(line for line in lines(tmp_path) if line.startswith("end"))
    assert ended == Counter(f"end grid {i}" for i in range(UNITS))
    taken_over = lines(tmp_path, other.pid)
    assert hung in taken_over
    assert not set(done) & set(taken_over)
    assert len(ledger(tmp_path).look()[0]) == UNITS


def test_of_two_who_reach_for_a_trial_at_once_the_first_has_it(tmp_path: Path) -> None:
    ours, theirs = ledger(tmp_path), ledger(tmp_path)
    theirs.worker["process"] = os.getppid()
    assert FIRST.params is not None
    with ours.claim(FIRST, FIRST.params) as got:
        assert got
        assert list(theirs.look()[1]) == ["grid 0"]
        with theirs.claim(FIRST, FIRST.params) as also:
            assert not also
        ours.finish(FIRST, Outcome(0.5, 1.0))
    with theirs.claim(FIRST, FIRST.params) as late:
        assert not late
    assert theirs.look()[0]["grid 0"].score == 0.5


def test_an_error_gives_the_trial_back_at_once(tmp_path: Path) -> None:
    ours, theirs = ledger(tmp_path), ledger(tmp_path)
    with pytest.raises(KeyboardInterrupt), ours.claim(FIRST, {"ewc.strength": 0}):
        raise KeyboardInterrupt
    assert theirs.look() == ({}, {})
    with theirs.claim(FIRST, {"ewc.strength": 0}) as got:
        assert got


def test_a_diverged_trial_has_finished(tmp_path: Path) -> None:
    ours = ledger(tmp_path)
    with ours.claim(FIRST, {"ewc.strength": 0}):
        ours.finish(FIRST, Outcome(None, 2.0, "the loss is nan"))
    outcome = ledger(tmp_path).look()[0]["grid 0"].outcome
    assert (outcome.score, outcome.seconds, outcome.why) == (None, 2.0, "the loss is nan")


def test_another_machine_is_dead_when_it_is_silent_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(study, "SILENT_SECONDS", 0.6)
    far, near = ledger(tmp_path), ledger(tmp_path)
    far.worker.update(machine="far away", process=2**22 + 1)
    with far.claim(FIRST, {"ewc.strength": 0}):
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            assert "grid 0" in near.look()[1]
            time.sleep(0.05)
        far._storage.set_trial_user_attr = lambda *_: None  # the network is gone
        until = time.monotonic() + 10
        while "grid 0" in near.look()[1]:
            assert time.monotonic() < until
            time.sleep(0.05)
        with near.claim(FIRST, {"ewc.strength": 0}) as got:
            assert got
            del far._storage.set_trial_user_attr
            far.finish(FIRST, Outcome(0.1, 0))  # it comes back and is told nothing, but counts no more
            near.finish(FIRST, Outcome(0.2, 0))
    assert near.look()[0]["grid 0"].score == 0.2


def test_what_a_dead_worker_had_drawn_is_what_the_next_one_begins_with(tmp_path: Path) -> None:
    dead, ours = ledger(tmp_path), ledger(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead.worker["process"] = gone.pid
    drawn = Unit("trial 0", None)
    dead._make(drawn, {"ewc.strength": 7})
    assert ours.look() == ({}, {})
    assert ours.begun("trial 0") == {"ewc.strength": 7}
    assert ours.begun("trial 1") is None


def test_a_study_of_another_search_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    StudyLedger(url, "test", SPACE, '{"tune": {"seed": 1000, "tasks": 3}}')
    with pytest.raises(UsageError, match=r"holds a search with tune.seed = 1000, and this one has 1001"):
        StudyLedger(url, "test", SPACE, '{"tune": {"seed": 1001, "tasks": 3}}')
    StudyLedger(url, "another", SPACE, '{"tune": {"seed": 1001, "tasks": 3}}')


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/study.db", "nodb://me:secret@there/x"])
def test_a_storage_that_is_not_there_is_one_sentence_without_the_password(url: str) -> None:
    with pytest.raises(StorageError) as caught:
        StudyLedger(url, "test", SPACE, "{}")
    assert str(caught.value).startswith("cannot open the storage")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_optunas_own_tools_read_the_study(tmp_path: Path) -> None:
    import optuna

    ours = ledger(tmp_path)
    for unit in SEARCH.units[:4]:
        assert unit.params is not None
        with ours.claim(unit, unit.params):
            ours.finish(unit, Outcome(unit.params["ewc.strength"] / UNITS, 0))
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [trial.value for trial in study.trials] == [i / UNITS for i in range(4)]
    assert study.best_trial.params == {"ewc.strength": 3}
