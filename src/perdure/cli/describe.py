"""What `list` and `explain` say of a method: where it works, what it needs to be told, what it costs, its paper."""

from __future__ import annotations

from typing import Any

SCENARIOS = ("task", "domain", "class", "online", "blurry")
NEEDS = {
    "needs_boundaries": "task boundaries",
    "needs_train_task_id": "the task of every training example",
    "needs_test_task_id": "the task of every test example",
    "needs_task_data": "a task's data once more when it begins or ends",
    "stores_examples": "to keep raw examples",
}
LETTERS = (
    "Memory counts values of 4 bytes: P weights, G weights of a generator, k tasks done, T tasks, U gated units; and "
    "bytes: M remembered examples of D bytes each, C classes. Time is per step beside the step itself."
)
FINETUNE: dict[str, Any] = {
    "name": "finetune",
    "description": "no method at all: train on each task in turn, the lower reference",
    "paper": "classical baseline; no single source",
    "use_when": "as the lower reference of every comparison",
    "cost": "nothing",
    "time": "nothing",
    "memory": "nothing",
    "scenarios": list(SCENARIOS),
    "regulariser": False,
    **dict.fromkeys(NEEDS, False),
}


def described_method(method: Any) -> dict[str, Any]:
    """A method class's declarations, as plain values."""
    cost = getattr(method, "cost", "")
    time, _, memory = cost.partition("; memory: ")
    return {
        "paper": getattr(method, "paper", ""),
        "use_when": getattr(method, "use_when", ""),
        "cost": cost,
        "time": time.removeprefix("time: "),
        "memory": memory,
        "scenarios": [name for name in SCENARIOS if name in method.scenarios],
        "regulariser": method.regulariser,
        **{flag: getattr(method, flag) for flag in NEEDS},
    }


def streams(entry: dict[str, Any]) -> str:
    """Where a described method works, in words."""
    after = {"class": " (beside replay)" if entry["regulariser"] else ""}
    if entry["needs_boundaries"] and not entry["needs_train_task_id"]:
        after |= dict.fromkeys(("online", "blurry"), " (with a detector)")
    return ", ".join(name + after.get(name, "") for name in entry["scenarios"])


def needs(entry: dict[str, Any]) -> str:
    """What a described method needs, in words."""
    return ", ".join(text for flag, text in NEEDS.items() if entry[flag]) or "nothing"
