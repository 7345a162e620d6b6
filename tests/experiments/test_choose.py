"""What rules a method out, what comes first, and where its numbers are from."""

import re
from pathlib import Path
from typing import Any

import pytest

from perdure import registry
from perdure.errors import UsageError
from perdure.experiments import choose as module
from perdure.experiments.choose import Needs, choose

PAGE = Path(__file__).parents[2] / "docs" / "reproduced.md"


def names(**given: Any) -> list[str]:
    return [advice.method for advice in choose(Needs(**given))[0]]


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("boundaries", [True, False])
def test_every_method_fits_or_has_a_reason_and_none_that_fits_lacks_what_it_needs(
    scenario: str, examples: bool, boundaries: bool
) -> None:
    fits, others = choose(Needs(scenario=scenario, examples=examples, boundaries=boundaries))
    assert sorted([advice.method for advice in fits] + list(others)) == registry.methods.names()
    for advice in fits:
        method = registry.methods.get(advice.method)
        assert scenario in method.scenarios
        assert examples or not method.stores_examples
        assert boundaries or not method.needs_boundaries
        assert scenario != "class" or not method.regulariser
    assert all(others.values())


def test_without_examples_nothing_is_recommended_where_new_classes_come_unnamed() -> None:
    fits = choose(Needs(scenario="class", examples=False))[0]
    assert not any(registry.methods.get(advice.method).regulariser for advice in fits)
    assert "ewc" in names(scenario="task", examples=False)


def test_what_has_kept_most_comes_first() -> None:
    fits, _ = choose(Needs(scenario="class"))
    measured = [advice.accuracy for advice in fits if advice.accuracy is not None]
    assert len(measured) >= 4
    assert measured == sorted(measured, key=lambda accuracy: -round(accuracy))
    assert fits[0].method == "derpp"
    assert [advice.accuracy is None for advice in fits] == sorted(advice.accuracy is None for advice in fits)


def test_a_budget_is_turned_into_examples_and_rules_out_what_cannot_fit() -> None:
    fits, others = choose(Needs(memory=1_000_000, example_bytes=1000, parameters=10_000_000))
    replay = next(advice for advice in fits if advice.method == "replay")
    assert replay.keeps == "about 1,000 examples"
    assert replay.command.endswith("-m replay --set replay.capacity=null --set replay.bytes_budget=1000000")
    assert others["joint"] == "keeps all data"
    task = choose(Needs(scenario="task", memory=1_000_000, parameters=10_000_000))[1]
    assert task["ewc"] == "keeps at least 80 MB"


def test_a_limit_on_time_rules_out_what_takes_longer() -> None:
    assert "derpp" not in names(slowdown=2.5)
    assert "replay" in names(slowdown=2.5)


def test_the_numbers_are_those_of_the_page_of_reproduced_results() -> None:
    page, parts = PAGE.read_text(encoding="utf-8"), {}
    for part in page.split("\n## ")[1:]:
        name = re.search(r"`perdure reproduce ([\w-]+)`", part)
        assert name is not None
        parts[name[1]] = dict(re.findall(r"^\| ([\w-]+) \| \w \| [\d.]+ \| ([\d.]+) \|", part, flags=re.M))
    for scenario, (protocol, rows) in module.EVIDENCE.items():
        assert scenario in module.STREAMS
        for row in rows.values():
            found = module._measured(protocol, row)
            assert found is not None, row
            assert f"{found['ours']:.2f}" == parts[protocol][row]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"scenario": "clas"}, "unknown scenario 'clas'; did you mean 'class'?"),
        ({"memory": -1}, "memory is -1, it must be at least 0"),
        ({"slowdown": 0.5}, r"slowdown is 0\.5, it must be at least 1"),
        ({"example_bytes": 0}, "example-bytes is 0, it must be at least 1"),
    ],
)
def test_bad_needs_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence.replace("?", r"\?")):
        Needs(**given)
