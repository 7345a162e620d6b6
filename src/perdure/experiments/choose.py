"""Which method fits: what rules one out, and what the ones that remain have been measured to keep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from perdure.errors import UsageError
from perdure.registry import methods
from perdure.streams.task import ANNOUNCED, check_scenario

FLOAT = 4  # bytes
FINETUNE = "finetune"

VECTORS = {
    "ewc": 2,
    "l2": 2,
    "mas": 2,
    "si": 3,
    "lwf": 1,
    "kd": 1,
    "spg": 1,
    "packnet": 0.25,
    "agem": 1,
    "gem": 1,
    "vcl": 4,
    "gdumb": 1,
    "icarl": 1,
    "wa": 1,
    "bic": 1,
    "generative_replay": 8,  # a generator as large as twice the model, its optimizer, and copies of both
}
"""State of a method in multiples of the parameters."""

STEPS = {
    "si": 1.3,
    "lwf": 1.5,
    "kd": 1.5,
    "agem": 2.5,
    "gem": 4,
    "replay": 2,
    "der": 2,
    "derpp": 3,
    "er_ace": 2,
    "mir": 5.3,
    "icarl": 1.5,
    "wa": 1.5,
    "bic": 1.5,
    "vcl": 3,
    "generative_replay": 5,
    "packnet": 2.3,  # 1.5 a step, and half as many steps again when a task ends
    "joint": 1,
}
"""Time of a step in steps without a method, rounded up from docs/performance.md where it is there; 1.1 otherwise."""

# Where each method was run for the table of published numbers: buffers of 500 examples where it has one.
EVIDENCE: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "task": (
        "vandeven-split-mnist",
        {
            FINETUNE: "task-none",
            "ewc": "task-ewc",
            "si": "task-si",
            "lwf": "task-lwf",
            "replay": "task-er",
            "generative_replay": "task-dgr",
        },
    ),
    "domain": (
        "der-permuted-mnist",
        {FINETUNE: "sgd", "replay": "er-500", "der": "der-500", "derpp": "derpp-500"},
    ),
    "class": (
        "der-split-mnist",
        {
            FINETUNE: "sgd",
            "replay": "er-500",
            "der": "der-500",
            "derpp": "derpp-500",
            "agem": "agem-500",
            "gem": "gem-500",
            "icarl": "icarl-500",
        },
    ),
}
STREAMS = {
    "task": "Split MNIST, the task named",
    "domain": "Permuted MNIST, 20 tasks",
    "class": "Split MNIST, no task named",
}


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What is given.

    Attributes
    ----------
    scenario
        "task": the task is named when predicting; "domain": same labels, new inputs; "class": new labels, no name.
    examples
        Whether examples of the past may be kept.
    boundaries
        Whether somebody says where a task ends.
    memory
        Bytes that a method may keep; None for no limit.
    parameters, example_bytes
        Trainable values of the model, and bytes of one stored example.
    slowdown
        How many times as long as a plain one a step may take; None for no limit.
    """

    scenario: str = "class"
    examples: bool = True
    boundaries: bool = True
    memory: int | None = None
    parameters: int = 1_000_000
    example_bytes: int = 3072
    slowdown: float | None = None

    def __post_init__(self) -> None:
        check_scenario(self.scenario, ANNOUNCED)
        for name, low in (("memory", 0), ("parameters", 1), ("example_bytes", 1), ("slowdown", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name.replace('_', '-')} is {value}, it must be at least {low}")


@dataclass(frozen=True)
class Advice:
    """A method that fits.

    Attributes
    ----------
    accuracy, floor
        Final average accuracies in percent, measured on a stream of that scenario: the method's and fine-tuning's.
    keeps
        What it keeps, in words with numbers.
    steps
        Time of a step in steps without a method.
    """

    method: str
    why: str
    accuracy: float | None
    floor: float | None
    published: float | None
    keeps: str
    steps: float
    command: str


def choose(needs: Needs) -> tuple[list[Advice], dict[str, str]]:
    """The methods that fit, the one that keeps most first; and why each of the others does not.

    >>> fits, others = choose(Needs(scenario="class", examples=False))
    >>> [advice.method for advice in fits], others["replay"]
    (['generative_replay'], 'keeps examples of the past')
    """
    fits, others = [], {}
    for name in methods.names():
        method = methods.get(name)
        reason = _against(name, method, needs)
        if reason:
            others[name] = reason
        else:
            fits.append(_advice(name, method, needs))
    # Half a point is noise in these tables, and then the cheaper one comes first.
    fits.sort(key=lambda a: (-1 if a.accuracy is None else -round(a.accuracy), a.steps, a.method))
    return sorted(fits, key=lambda a: a.accuracy is None), others


def _against(name: str, method: Any, needs: Needs) -> str:
    if needs.scenario not in method.scenarios:
        return f"is for streams of the kind {' or '.join(sorted(method.scenarios))}"
    if method.needs_test_task_id and needs.scenario != "task":
        return "needs the task's name when predicting"
    if method.stores_examples and not needs.examples:
        return "keeps examples of the past"
    if method.needs_boundaries and not needs.boundaries:
        return "has to be told where a task ends"
    if method.regulariser and needs.scenario == "class":
        return "forgets old classes if no task is named, whatever its strength; only together with replay"
    steps = STEPS.get(name, 1.1)
    if needs.slowdown is not None and steps > needs.slowdown:
        return f"takes about {steps:g} times a plain step"
    state = int(VECTORS.get(name, 0) * needs.parameters * FLOAT)
    if needs.memory is not None and name == "joint":
        return "keeps all data"
    least = state + (10 * needs.example_bytes if method.stores_examples else 0)
    if needs.memory is not None and least > needs.memory:
        return f"keeps at least {_size(least)}"
    return ""


def _advice(name: str, method: Any, needs: Needs) -> Advice:
    protocol, rows = EVIDENCE[needs.scenario]
    found, floor = _measured(protocol, rows.get(name)), _measured(protocol, rows[FINETUNE])
    state = int(VECTORS.get(name, 0) * needs.parameters * FLOAT)
    keeps, options = [_size(state)] if state else [], ""
    if name == "joint":
        keeps = ["all data"]
    elif method.stores_examples:
        if needs.memory is None:
            keeps.append("examples, as many as you say")
        else:
            room = needs.memory - state
            keeps.append(f"about {room // needs.example_bytes:,} examples")
            options = _budget(name, room, needs)
    return Advice(
        name,
        method.use_when or method.summary,
        found["ours"] if found else None,
        floor["ours"] if floor else None,
        found["published"] if found else None,
        " and ".join(keeps) or "nothing",
        STEPS.get(name, 1.1),
        f"perdure run -b DATA --scenario {needs.scenario} -m {name}{options}",
    )


def _budget(name: str, room: int, needs: Needs) -> str:
    from dataclasses import fields

    names = {field.name for field in fields(methods.get(name))}
    if "bytes_budget" in names:
        return f" --set {name}.capacity=null --set {name}.bytes_budget={room}"
    return f" --set {name}.capacity={room // needs.example_bytes}" if "capacity" in names else ""


def _measured(protocol: str, row: str | None) -> dict[str, Any] | None:
    return None if row is None else _reproduced().get((protocol, row))


@cache
def _reproduced() -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of docs/reproduced.md."""
    text = resources.files("perdure.experiments").joinpath("reproduced.json").read_text(encoding="utf-8")
    return {(row["protocol"], row["id"]): row for row in json.loads(text)["rows"]}


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
