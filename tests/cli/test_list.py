"""What `perdure list methods` and `perdure explain` say of each method."""

from __future__ import annotations

import json
import re

import pytest
import torch

from perdure import Learner, benchmarks, models, registry
from perdure.cli import main

METHODS = registry.methods.names()
IN_P = {
    name: found[1] for name in METHODS if (found := re.search(r"memory: (\d*) ?P$", registry.methods.get(name).cost))
}


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    main(["list", "methods", "--json"])
    return {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}


def test_every_method_says_where_it_works_what_it_needs_and_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    entries = listed(capsys)
    assert list(entries) == ["finetune", *METHODS]
    for entry in entries.values():
        assert all(entry[key] for key in ("description", "scenarios", "memory", "time", "paper", "use_when")), entry
    main(["list", "methods"])
    text = capsys.readouterr().out
    for entry in entries.values():
        assert str(entry["paper"]) in text
        assert f"memory: {entry['memory']}; time: " in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", name])
    text = capsys.readouterr().out
    assert all(title in text for title in ("What it costs\n", "Paper\n", "Needs\n"))


@pytest.mark.parametrize("name", IN_P)
def test_a_formula_in_p_is_what_is_held(name: str) -> None:
    learner = Learner(models.MLP(64, [300], 10, seed=0), methods=[registry.methods.get(name)()], scenario="task")
    for task in benchmarks.split_digits(scenario="task", seed=0)[:2]:
        learner.fit_task(task, batch_size=64)
    vectors = sum(method.memory_bytes() for method in learner.methods) + 4 * len(learner.parameters.theta) * any(
        method.needs_update for method in learner.methods
    )
    held = vectors / 4 / sum(parameter.numel() for parameter in learner.model.parameters())
    assert held == pytest.approx(float(IN_P[name] or 1), rel=0.02)
    assert torch.isfinite(learner.parameters.theta).all()
