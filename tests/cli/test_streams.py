"""Scenarios, orders and shapes of streams on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from perdure import registry
from perdure.streams.task import SCENARIOS

Command = Callable[..., Any]
SMALL = ("--set", "model.hidden=[16]")


@pytest.mark.parametrize(
    ("words", "stream"),
    [
        (("--scenario", "online"), {}),
        (("--scenario", "online", "--set", "stream.transition=1"), {"transition": 1.0}),
        (("--scenario", "blurry", "--set", "stream.share=0.3"), {"share": 0.3}),
        (
            ("--scenario", "online", "--set", "stream.repeats=2", "--set", "stream.imbalance=10"),
            {"repeats": 2, "imbalance": 10.0},
        ),
    ],
)
def test_a_stream_without_boundaries_is_run_once_and_counts_its_predictions(
    perdure: Command, words: tuple[str, ...], stream: dict[str, Any], tmp_path: Path
) -> None:
    outcome = perdure("run", "-b", "split-digits", "-m", "replay", *SMALL, *words, "--json", "-o", "a")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert found["scenario"] == words[1]
    assert 0 < found["metrics"]["prequential_accuracy"] < 1
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert config["train"]["epochs"] == 1
    assert {**stream, "tasks": 5, "class_order": None} == config["stream"]
    again = perdure("run", tmp_path / "a" / "config.yaml", "--json").json
    assert again["prequential"] == found["prequential"]
    assert again["matrix"] == found["matrix"]


def test_the_order_of_the_tasks_is_a_flag_and_an_option(perdure: Command) -> None:
    words = ("run", *SMALL, "--set", "train.epochs=1", "--json")
    names = perdure(*words, "--order", "4,0,1,2,3").json["task_names"]
    assert names == ["8, 9", "0, 1", "2, 3", "4, 5", "6, 7"]
    assert perdure(*words, "--set", "stream.order=[4,0,1,2,3]").json["task_names"] == names
    easy = perdure(*words, "--order", "easy_to_hard").json["task_names"]
    hard = perdure(*words, "--order", "hard_to_easy").json["task_names"]
    assert easy == hard[::-1] != names
    assert sorted(perdure(*words, "--order", "random").json["task_names"]) == sorted(names)


def test_a_table_compares_methods_online_with_their_prequential_accuracy(perdure: Command, tmp_path: Path) -> None:
    outcome = perdure("compare", "-m", "finetune,replay", "--scenario", "online", *SMALL, "--seeds", "1", "--jobs", "1")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("split_digits (online, 5 tasks)")
    assert "prequential" in outcome.out
    page = (tmp_path / "runs" / "compare" / "report.html").read_text()
    assert 'data-method="replay" data-metric="prequential_accuracy"' in page
    announced = perdure("compare", "-m", "finetune", *SMALL, "--set", "train.epochs=1", "--seeds", "1", "--jobs", "1")
    assert "prequential" not in announced.out


def test_all_scenarios_are_listed_and_benchmarks_say_what_they_take(perdure: Command) -> None:
    listed = perdure("list", "scenarios", "--json").json
    assert [entry["name"] for entry in listed] == list(SCENARIOS)
    assert {entry["name"]: entry["arguments"] for entry in listed}["blurry"] == ["base", "share"]
    assert "one pass, no boundaries" in perdure("list", "scenarios").out
    for entry in perdure("list", "benchmarks", "--json").json:
        if not registry.benchmarks.get(entry["name"]).__module__.startswith("perdure."):
            continue  # of another test
        assert {"share", "transition", "repeats", "imbalance", "order"} <= set(entry["arguments"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--scenario", "onlin"), "unknown scenario 'onlin'; did you mean 'online'?"),
        (("--scenario", "blurry", "--set", "stream.shar=0.1"), "unknown key 'stream.shar'; did you mean 'share'?"),
        (("--scenario", "blurry", "--set", "stream.share=lots"), "stream.share is 'lots', it must be a number"),
        (("--scenario", "online", "--set", "stream.share=0.1"), "share=0.1 is for scenario 'blurry'"),
        (("--scenario", "online", "--set", "train.epochs=3"), "epochs is 3, but an online stream passes once"),
        (
            ("--scenario", "online", "-m", "ewc"),
            "'ewc' needs task boundaries, which an online stream does not announce",
        ),
        (("--order", "easy_to_hrad"), "unknown order 'easy_to_hrad'; did you mean 'easy_to_hard'?"),
        (("--order", "0,1"), "order=[0, 1] should name each of the tasks 0 to 4 once"),
        (("--set", "stream.visits=cicle"), "stream.visits is 'cicle', it must be 'cycle' or 'shuffled'"),
        (("--resume", "a", "--order", "random"), "--resume takes everything from the folder of the run; leave --order"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_any_training(
    perdure: Command, words: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    outcome = perdure("run", *SMALL, *words)
    assert outcome.code in (1, 2)
    assert sentence in outcome.sentence
    assert not list(tmp_path.iterdir())


def test_a_detector_makes_a_method_with_boundaries_possible_online(perdure: Command) -> None:
    outcome = perdure(
        "run", "-m", "ewc", "--scenario", "online", *SMALL, "--set", "boundaries.name=page_hinkley", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.json["metrics"]["prequential_accuracy"] is not None
