"""The keywords that every benchmark takes, and the named benchmarks in every scenario."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import perdure
from perdure.errors import UsageError
from perdure.streams import blurry, imbalanced, online, repeated
from perdure.streams.shaping import NOTES, OWN_KEYWORDS, shapable, shape
from perdure.streams.task import SCENARIOS, Stream

digits = perdure.benchmarks.split_digits


@pytest.mark.parametrize(
    ("keywords", "same"),
    [
        ({"scenario": "online"}, lambda: online(digits())),
        ({"scenario": "online", "transition": 1}, lambda: online(digits(), transition=1.0)),
        ({"scenario": "online", "base": "domain"}, lambda: online(digits(scenario="domain"))),
        ({"scenario": "blurry"}, lambda: blurry(digits(), share=0.1)),
        ({"scenario": "blurry", "share": 0.4, "tasks": 2}, lambda: blurry(digits(tasks=2), share=0.4)),
        ({"repeats": 2, "visits": "shuffled"}, lambda: repeated(digits(), repeats=2, visits="shuffled")),
        ({"imbalance": 20}, lambda: imbalanced(digits(), imbalance=20)),
        ({"class_sizes": range(1, 11)}, lambda: imbalanced(digits(), class_sizes=range(1, 11))),
        ({"order": [4, 3, 2, 1, 0]}, lambda: digits().reordered([4, 3, 2, 1, 0])),
        (
            {"scenario": "blurry", "imbalance": 5, "order": "random", "repeats": 2},
            lambda: blurry(repeated(imbalanced(digits(), imbalance=5).reordered("random"), repeats=2)),
        ),
    ],
)
def test_keywords_are_the_functions_one_after_the_other(keywords: dict[str, Any], same: Any) -> None:
    made = digits(**keywords)
    assert made.fingerprint() == same().fingerprint()
    assert {**keywords, "scenario": made.scenario}.items() <= {
        key: value if key != "class_sizes" else range(1, 11) for key, value in made.options.items()
    }.items()


def test_an_online_stream_of_a_task_incremental_benchmark_has_one_output_for_all() -> None:
    @shapable
    def coarse(*, scenario: str = "task", seed: int = 0) -> Stream:
        return digits(scenario=scenario, seed=seed)

    assert coarse().scenario == "task"
    assert coarse(scenario="online").fingerprint() == online(digits()).fingerprint()  # type: ignore[call-arg]


def test_a_domain_benchmark_keeps_its_shared_columns_online() -> None:
    stream = digits(scenario="online", base="domain")
    assert stream.columns == 2
    assert stream.shares_classes
    assert not digits(scenario="online").shares_classes


def test_every_builder_says_in_its_signature_what_it_takes() -> None:
    builders = [perdure.registry.benchmarks.get(name) for name in perdure.registry.benchmarks.names()]
    ours = [builder for builder in builders if builder.__module__.startswith("perdure.")]
    for builder in [*ours, perdure.streams.stream_from_path]:
        assert set(inspect.signature(shape).parameters) <= set(inspect.signature(builder).parameters)
        assert shapable(builder) is builder


def test_a_builder_without_a_scenario_and_keywords_of_its_own_are_left_alone() -> None:
    def fixed(*, seed: int = 0) -> Stream:
        return digits(seed=seed)

    def sharing(*, scenario: str = "class", share: int = 3) -> Stream:
        return digits(tasks=share)

    assert shapable(fixed) is fixed
    assert len(shapable(sharing)(share=2)) == 2


def test_every_scenario_is_described_with_the_keywords_that_are_its_own() -> None:
    assert tuple(NOTES) == SCENARIOS
    known = set(inspect.signature(shape).parameters)
    assert all(set(keywords) <= known for keywords in OWN_KEYWORDS.values())


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        (
            {"scenario": "onlin"},
            "unknown scenario 'onlin'; did you mean 'online'.*task, domain, class, online or blurry",
        ),
        ({"share": 0.2}, "share=0.2 is for scenario 'blurry', and this is 'class'; leave it out"),
        ({"scenario": "blurry", "transition": 1}, "transition=1 is for scenario 'online', and this is 'blurry'"),
        ({"scenario": "task", "base": "class"}, "base='class' says what an online or blurry stream is made of"),
        ({"scenario": "online", "base": "online"}, "scenario 'online' does not fit here; choose task, domain or class"),
    ],
)
def test_keywords_that_mean_nothing_here_are_refused(keywords: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        digits(**keywords)
