"""Combinations that cannot work are refused, doubtful ones are warned about, before any training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from perdure.errors import IncompatibleError, PerdureWarning, UsageError
from perdure.registry import nearest

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from perdure.methods.base import Method
    from perdure.streams.task import Task

SCENARIOS = ("task", "domain", "class", "online", "blurry")
_MASKS = ("hat", "packnet", "spg")
_MANY_PASSES = 20
_PENALTIES = ("ewc", "si", "mas", "l2")


def check_methods(methods: Sequence[Method]) -> None:
    """Raise IncompatibleError for methods that exclude each other, whatever the stream.

    Raises
    ------
    UsageError
        If something in the list is not a method, or is listed twice.
    """
    from perdure.methods.base import HOOKS, Method

    if isinstance(methods, Method):
        raise UsageError(
            f"methods is one {type(methods).__name__}; pass a list: methods=[{type(methods).__name__}(...)]"
        )
    for method in methods:
        if not isinstance(method, Method):
            raise UsageError(
                f"methods holds {method!r}, which is not a method; write for example perdure.methods.EWC()"
            )
        kind = type(method)
        if not method.name:
            raise UsageError(f"{kind.__name__} has no name; write name = '{kind.__name__.lower()}' in the class")
        if not any(getattr(kind, hook) is not getattr(Method, hook) for hook in HOOKS):
            own = [name for name, value in vars(kind).items() if callable(value) and not name.startswith("_")]
            hint = next((h for name in own if (h := nearest(name, HOOKS))), "")
            raise UsageError(
                f"'{method.name}' overrides no hook, so it would do nothing{hint or ';'} see perdure.Method"
            )
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"the method '{name}' is listed twice; list it once")
    for part in ("step", "criterion", "predict", "training_data"):
        owners = [m.name for m in methods if part in m.owns and (m.has(part) or not m.acts)]
        if len(owners) > 1:
            raise IncompatibleError(f"'{owners[0]}' and '{owners[1]}' both own {part}; use one of them")
        stepping = {"on_batch", "loss", "criterion", "add_gradient", "project_gradient", "on_update"}
        if part == "step" and owners:
            for method in methods:
                if method.name not in owners and any(method.has(hook) for hook in stepping):
                    raise IncompatibleError(
                        f"'{owners[0]}' replaces the whole step, so '{method.name}' would do nothing; use one of them"
                    )
    for method in methods:
        if method.acts and method.sample_passes > _MANY_PASSES:
            _warn(f"'{method.name}' passes every example {method.sample_passes} times; expect steps to take that long")
    if {"gem", "agem"} <= set(names):
        raise IncompatibleError("'gem' and 'agem' both project the gradient; use one of them")
    masks = sorted(set(names) & set(_MASKS))
    if len(masks) > 1:
        raise IncompatibleError(f"'{masks[0]}' and '{masks[1]}' both mask the same weights; use one of them")
    plain = next((name for name in masks if name != "spg"), None)
    if plain is not None and "vcl" in names:
        does = {"hat": "gates", "packnet": "shares out the weights of"}[plain]
        raise IncompatibleError(f"'{plain}' {does} plain layers, and 'vcl' trains mean-field ones; use one of them")
    if "icarl" in names and masks:
        raise IncompatibleError(
            f"'icarl' compares all classes at once, and '{masks[0]}' has other outputs for every task; use one of them"
        )
    penalties = sorted(set(names) & set(_PENALTIES))
    if "vcl" in names and penalties:
        raise IncompatibleError(
            f"'vcl' and '{penalties[0]}' both pull the same weights to where the last task left them; use one of them"
        )
    if len(penalties) > 1:
        _warn(f"{' and '.join(penalties)} each pull the same weights back, so old tasks count twice; one is usual")
    if "joint" in names and len(names) > 1:
        _warn("'joint' trains on all data so far, so another method beside it only stands in its way")
    others = [m.name for m in methods if m.name != "packnet" and (m.regulariser or m.stores_examples)]
    if "packnet" in names and others:
        _warn(f"'packnet' keeps old tasks as they are, so '{others[0]}' beside it can only hold the new one back")
    distilling = ("lwf", "kd", "momentum_kd", "der", "derpp", "wa", "bic")
    distillers = [m.name for m in methods if m.name in distilling or (m.name == "icarl" and m.has("criterion"))]
    if len(distillers) > 1 and not set(distillers) <= {"der", "derpp"}:
        _warn(f"'{distillers[0]}' and '{distillers[1]}' both distil old outputs; one of them is usual")
    if {"gem", "agem"} & set(names) and any(getattr(method, "solver", "") == "prox" for method in methods):
        _warn("a proximal penalty moves weights after the projection, which GEM and A-GEM then cannot guarantee")


def check_scenario(methods: Sequence[Method], scenario: str, finds_tasks: bool = False) -> None:
    """Raise IncompatibleError if a method is not defined for a scenario; warn if it is known to fail there.

    `finds_tasks` says that a detector opens and closes the tasks of a stream that announces none.
    """
    if scenario not in SCENARIOS:
        hint = nearest(str(scenario), SCENARIOS) or ";"
        raise UsageError(f"unknown scenario '{scenario}'{hint} there are {', '.join(SCENARIOS)}")
    if finds_tasks and scenario == "task":
        raise IncompatibleError(
            "the task-incremental scenario tells the task of every example, and boundaries= is for streams that tell "
            "none; use scenario='domain' or 'class', or leave boundaries out"
        )
    for method in methods:
        if scenario not in method.scenarios:
            fitting = ", ".join(s for s in SCENARIOS if s in method.scenarios)
            raise IncompatibleError(f"'{method.name}' is not defined on {_stream_of(scenario)}; it is on: {fitting}")
        if method.needs_test_task_id and scenario != "task":
            raise IncompatibleError(
                f"'{method.name}' needs the task of every test example, which {_stream_of(scenario)} hides; "
                "use scenario='task' or another method"
            )
        if method.needs_boundaries and scenario in ("online", "blurry") and not finds_tasks:
            raise IncompatibleError(
                f"'{method.name}' needs task boundaries, which {_stream_of(scenario)} does not announce; "
                "use a replay method, or a detector: Learner(..., boundaries='page_hinkley'), and on the command line "
                "--set boundaries.name=page_hinkley"
            )
    remembers = any(not method.regulariser for method in methods)
    if scenario == "class" and methods and not remembers:
        names = " and ".join(method.name for method in methods)
        _warn(f"{names} alone on a class-incremental stream: known to forget everything here; add replay")


def check_task_parts(heads: Sequence[object], scenario: str) -> None:
    """Raise IncompatibleError for a model with parts of each task's own where nobody tells the task of a row."""
    if heads:
        raise IncompatibleError(
            f"the model has a part for every task ({type(heads[0]).__name__}), and {_stream_of(scenario)} tells none; "
            "use a head that is 'wide' or 'growing'"
        )


def _stream_of(scenario: str) -> str:
    """A stream of that scenario, in words."""
    return {"online": "an online stream", "blurry": "a blurry stream"}.get(scenario, f"a {scenario}-incremental stream")


def check_found_tasks(methods: Sequence[Method]) -> None:
    """Raise IncompatibleError for methods that must know a task before its first example: no detector can tell them."""
    for method in methods:
        if method.needs_train_task_id or "training_data" in method.owns:
            needs = "the task of every example" if method.needs_train_task_id else "a task's data before it begins"
            raise IncompatibleError(
                f"'{method.name}' needs {needs}, and a detector finds a task only when it has begun; announce the "
                "tasks, or use another method"
            )


def check_optimizers(methods: Sequence[Method], optimizers: Sequence[Optimizer]) -> None:
    """Warn where a guarantee about the gradient does not carry over to the step."""
    for optimizer in optimizers:
        kind, groups = type(optimizer).__name__, optimizer.param_groups
        if kind == "SGD" and not any(group["momentum"] or group["weight_decay"] for group in groups):
            continue
        for method in methods:
            if method.name in ("gem", "agem"):
                _warn(
                    f"'{method.name}' constrains the gradient, and {kind} steps along another direction; "
                    "plain SGD without momentum and weight decay keeps the guarantee"
                )
            if method.name == "mer" and method.acts:
                _warn(
                    f"'{method.name}' takes back a part of its steps, which {kind}'s moments know nothing of; "
                    "plain SGD without momentum and weight decay is what it is made for"
                )


def check_task(methods: Sequence[Method], task: Task, scenario: str | None) -> None:
    """Raise UsageError if a task lacks what a method or the scenario needs: its data, its classes."""
    if scenario == "task" and not task.classes:
        raise UsageError(
            f"the task-incremental scenario needs the class columns of task '{task.name}'; give begin_task() classes="
        )
    if task.train is None:
        for method in methods:
            if method.needs_task_data:
                raise UsageError(
                    f"'{method.name}' reads the task's data when it ends; pass it: begin_task('{task.name}', loader)"
                )


def _warn(message: str) -> None:
    warnings.warn(message, PerdureWarning, stacklevel=4)
