from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Command = Callable[..., Any]


def test_advice_has_a_reason_a_number_and_a_command_that_is_right(perdure: Command) -> None:
    outcome = perdure("choose", "class", "--no-boundaries", "--memory", "40k", "--example-bytes", "64")
    assert outcome.code == 0, outcome.err
    first = outcome.out.split("\n\n")[0]
    assert first.startswith("1. derpp\n")
    assert "published 91.0" in first
    assert "about 625 examples" in first
    assert re.search(r"^ +ewc +has to be told where a task ends$", outcome.out, flags=re.M)
    argv = first.split("perdure run ")[1].split()
    argv[argv.index("DATA")] = "split-digits"
    run = perdure("run", *argv, "--set", "train.steps=2", "--set", "train.eval_future=false", "--json")
    assert run.code == 0, run.err


def test_nothing_is_said_to_help_where_nothing_does(perdure: Command) -> None:
    found = perdure("choose", "class", "--no-examples", "--json").json
    assert "ewc" not in [advice["method"] for advice in found["fits"]]
    assert found["others"]["ewc"].startswith("forgets old classes")


def test_bad_input_is_one_sentence(perdure: Command) -> None:
    for argv, sentence in (
        (["clas"], "Did you mean"),
        (["--memory", "lots"], "--memory is 'lots', it must be a number such as 500000, 500k or 20M"),
        (["--slowdown", "0.5"], "slowdown is 0.5, it must be at least 1"),
    ):
        outcome = perdure("choose", *argv)
        assert (outcome.code, outcome.out) == (2, "")
        assert sentence in outcome.sentence
