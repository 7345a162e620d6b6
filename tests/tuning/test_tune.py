"""Whole searches on the digits: what they see, that they go on, and what they leave."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import perdure
from perdure.errors import DataError, PerdureWarning, StorageError, UsageError
from perdure.experiments.config import Experiment, read_yaml
from perdure.experiments.run import run as run_experiment
from perdure.methods import EWC
from perdure.registry import benchmarks
from perdure.streams.held_out import held_out
from perdure.tuning import scoring
from perdure.tuning.report import table, trials_csv, write
from perdure.tuning.run import Found, read_search, tune
from perdure.tuning.settings import Tuning

pytest.importorskip("optuna")
from guarded_stream import READABLE, guarded

benchmarks.register("guarded")(guarded)

BASE: dict[str, Any] = {
    "scenario": "task",
    "methods": ["ewc"],
    "train": {"epochs": 2},
    "model": {"name": "mlp", "hidden": [16]},
    "space": {"ewc.strength": [1, 100, 10000]},
    "tune": {"sampler": "grid", "tasks": 2},
}
RANGE = {"ewc.strength": "loguniform(1, 1e5)", "train.lr": "loguniform(1e-4, 1e-2)"}


def tuning(**changes: Any) -> Tuning:
    return Tuning.from_mapping(BASE | changes)


def scores(found: Found) -> list[tuple[str, dict[str, Any], float]]:
    return [(trial.unit.key, dict(trial.params), trial.score) for trial in found.trials]


@pytest.mark.parametrize(
    "rules",
    [
        {"sampler": "grid"},
        {"sampler": "tpe", "trials": 4},
        {"sampler": "halving", "trials": 3},
        {"policy": "chf", "decay": 0.01},
    ],
    ids=["grid", "tpe", "halving", "chf"],
)
def test_neither_test_data_nor_later_tasks_are_read(tmp_path: Path, rules: dict[str, Any]) -> None:
    space: dict[str, Any] = {"ewc.strength": {"low": 1, "high": 10000, "log": True, "points": 2}, "lr": [0.001, 0.01]}
    changes = {"benchmark": "guarded", "space": space, "train": {"epochs": 4, "evaluate_every": 3, "batch_size": 64}}
    chosen = tuning(**changes, tune={**rules, "tasks": READABLE})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerdureWarning)
        found = tune(chosen, tmp_path / "search")
    assert len(found.trials) >= 3
    with pytest.raises(AssertionError, match="must not see"):
        run_experiment(found.experiment)
    with pytest.raises(AssertionError, match="must not see"):
        tune(tuning(**changes, tune={**rules, "tasks": READABLE + 1}), tmp_path / "later")


def test_the_score_is_that_of_a_learner_on_the_first_tasks(tmp_path: Path) -> None:
    found = tune(tuning(), tmp_path / "search")
    for trial in found.trials:
        stream = held_out(perdure.benchmarks.split_digits(scenario="task", seed=1000), 2)
        model = perdure.models.MLP(64, [16], 10, seed=1000)
        optimizer = partial(torch.optim.Adam, lr=1e-3, fused=True)
        methods = [EWC(strength=trial.params["ewc.strength"])]
        learner = perdure.Learner(model, optimizer, methods, seed=1000)
        results = learner.fit(stream, epochs=2, batch_size=32)
        assert trial.score == results.metrics()["final_average_accuracy"]
        assert trial.score == results.matrix[-1].mean()
        assert scoring.score_of(results, "new") == results.matrix[1, 1]
    assert found.best.score == max(trial.score for trial in found.trials)


class StopError(Exception):
    """The power is cut."""


def test_a_stopped_search_goes_on_to_what_it_would_have_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tuning(space=RANGE, tune={"sampler": "tpe", "trials": 8, "tasks": 2})
    whole = tune(chosen, tmp_path / "whole")
    real, calls = scoring.run_narrowed, []

    def cut(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise StopError
        return real(*arguments)

    monkeypatch.setattr(scoring, "run_narrowed", cut)
    with pytest.raises(StopError):
        tune(chosen, tmp_path / "stopped")
    calls[:] = [1] * 10
    told: list[dict[str, Any]] = []
    again, storage, _ = read_search(tmp_path / "stopped")
    assert storage is None
    assert again == chosen
    resumed = tune(again, tmp_path / "stopped", on_event=told.append)
    assert scores(resumed) == scores(whole)
    assert len(calls) == 10 + 3
    assert told[0] == {"event": "search_resumed", "done": 5, "total": 8}
    assert [event["done"] for event in told[1:]] == [6, 7, 8]
    assert told[-1]["left"] == 0
    assert told[1]["left"] > told[2]["left"] > 0
    tune(again, tmp_path / "stopped")
    assert len(calls) == 13, "a finished search was run again"


def test_more_trials_go_on_from_those_that_are_there(tmp_path: Path) -> None:
    few, many = (tuning(space=RANGE, tune={"sampler": "random", "trials": n, "tasks": 2}) for n in (2, 4))
    before = tune(few, tmp_path / "search")
    told: list[dict[str, Any]] = []
    after = tune(many, tmp_path / "search", on_event=told.append)
    assert scores(after)[:2] == scores(before)
    assert [event["event"] for event in told] == ["search_resumed", "trial_end", "trial_end"]


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    import optuna

    one = tune(tuning(), tmp_path / "one")
    two = tune(tuning(), tmp_path / "two", workers=2)
    assert scores(two) == scores(one)
    assert two.best.params == one.best.params
    storage = f"sqlite:///{tmp_path / 'two' / 'study.db'}"
    complete = [
        t for t in optuna.load_study(study_name="perdure", storage=storage).trials if t.state.name == "COMPLETE"
    ]
    assert len(complete) == 3


def test_machines_share_a_storage_by_its_url(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    first = tune(tuning(), tmp_path / "a", storage=url, study="ours")
    told: list[dict[str, Any]] = []
    second = tune(tuning(), tmp_path / "b", storage=url, study="ours", on_event=told.append)
    assert [event["event"] for event in told] == ["search_resumed"]
    assert scores(second) == scores(first)
    assert read_search(tmp_path / "b")[1:] == (url, "ours")
    with pytest.raises(UsageError, match=r"tune.tasks = 2, and this one has 1"):
        tune(tuning(tune={"sampler": "grid", "tasks": 1}), tmp_path / "c", storage=url, study="ours")


def test_a_diverged_trial_is_kept_and_never_chosen(tmp_path: Path) -> None:
    sgd = {"epochs": 1, "optimizer": "sgd"}
    chosen = tuning(methods=[], train=sgd, space={"train.lr": [1e30, 0.05]}, tune={"sampler": "grid", "tasks": 1})
    found = tune(chosen, tmp_path / "search")
    assert [trial.outcome.score is None for trial in found.trials] == [True, False]
    assert found.best.params == {"train.lr": 0.05}
    assert "diverged" in table(found)
    assert len(write(found, tmp_path / "search")["trials"].read_text().splitlines()) == 3


def test_the_framework_measures_new_tasks_when_they_have_been_learned(tmp_path: Path) -> None:
    space = {"ewc.strength": {"low": 1, "high": 1e6}, "train.lr": [0.0001, 0.01]}
    found = tune(tuning(space=space, tune={"policy": "chf", "decay": 0.01, "tasks": 2}), tmp_path / "search")
    rates, strengths = ([t for t in found.trials if t.unit.bare is bare] for bare in (True, False))
    best = max(rates, key=lambda trial: trial.score)
    assert {trial.params["train.lr"] for trial in strengths} == {best.params["train.lr"]}
    assert all(trial.score < 0.8 * best.score for trial in strengths[:-1])
    assert found.best is strengths[-1]
    assert found.best.score >= 0.8 * best.score
    stream = held_out(perdure.benchmarks.split_digits(scenario="task", seed=1000), 2)
    optimizer = partial(torch.optim.Adam, lr=best.params["train.lr"], fused=True)
    learner = perdure.Learner(perdure.models.MLP(64, [16], 10, seed=1000), optimizer, seed=1000)
    assert best.score == learner.fit(stream, epochs=2, batch_size=32).matrix[1, 1]


def test_what_it_leaves_is_an_experiment_that_runs_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chosen = tuning(space=RANGE, seeds=[0, 4], tune={"sampler": "random", "trials": 4, "tasks": 2})
    found = tune(chosen, tmp_path / "search")
    files = write(found, tmp_path / "search")
    experiment = Experiment.from_mapping(read_yaml(files["best"]))
    assert experiment == found.experiment
    assert experiment.methods[0].arguments["strength"] == found.best.params["ewc.strength"]
    assert (experiment.train.lr, experiment.seeds) == (found.best.params["train.lr"], (0, 4))
    assert experiment.train.eval_future, "trials evaluate less, what is reported does not"
    assert [results.seed for results in run_experiment(experiment)] == [0, 4]
    assert files["picture"].read_bytes().startswith(b"\x89PNG")
    head, *lines = trials_csv(found).splitlines()
    assert head == "trial,score,seconds,budget,chosen,ewc.strength,train.lr,why"
    assert [json.loads(line.split(",")[5]) for line in lines] == [t.params["ewc.strength"] for t in found.trials]
    assert sum(",yes," in line for line in lines) == 1


def test_nothing_is_written_where_it_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tasks is 6, but split_digits has 5"):
        tune(tuning(tune={"sampler": "grid", "tasks": 6}), tmp_path / "search")
    with pytest.raises(DataError, match="mnist"):
        tune(tuning(benchmark="split_mnist", data_root=str(tmp_path / "none")), tmp_path / "search")
    assert not (tmp_path / "search").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="holds no search"):
        tune(tuning(), tmp_path / "mine")
    with pytest.raises(StorageError, match="cannot open the storage"):
        tune(tuning(), tmp_path / "search", storage="nonsense")
