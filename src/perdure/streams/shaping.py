"""What can be done to any stream by a keyword: rare classes, another order, tasks that come back, no boundaries.

    split_mnist(scenario="blurry", share=0.3)
    split_cifar10(scenario="online", transition=1.0, imbalance=50)
    perdure run -b split-mnist --scenario online --order hard_to_easy --set stream.repeats=3

The same functions on a stream that one has: `perdure.streams.imbalanced`, `Stream.reordered`, `repeated`, `online` and
`blurry`, in the order in which the keywords are applied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, TypeVar, cast

from perdure.errors import UsageError
from perdure.streams.imbalance import imbalanced
from perdure.streams.online import blurry, online
from perdure.streams.repetition import repeated
from perdure.streams.task import ANNOUNCED, Stream, check_scenario

Builder = TypeVar("Builder", bound=Callable[..., Stream])

NOTES = {
    "task": "new classes with every task, which is known in training and when predicting",
    "domain": "the same labels with new inputs in every task; nobody tells the task when predicting",
    "class": "new classes with every task and one output for all; nobody tells the task when predicting",
    "online": "one pass, no boundaries and no task announced; transition=1 changes from task to task gradually",
    "blurry": "phases of which a share is rows of the other tasks, without boundaries",
}
"""Every scenario in one clause."""

OWN_KEYWORDS = {"online": ("base", "transition"), "blurry": ("base", "share")}
"""The keywords that mean something in one scenario alone; the others are for all."""


def shape(
    *,
    base: Literal["task", "domain", "class"] | None = None,
    imbalance: float | None = None,
    imbalance_order: Literal["ordered", "shuffled"] = "ordered",
    class_sizes: Sequence[int] | None = None,
    order: str | Sequence[int] | None = None,
    repeats: int = 1,
    visits: Literal["cycle", "shuffled"] = "cycle",
    share: float | None = None,
    transition: float | None = None,
) -> dict[str, Any]:
    """The keywords that `shapable` adds to a builder of streams, with their defaults.

    Parameters
    ----------
    base
        What an online or blurry stream is made of: the benchmark's own scenario if left out, "class" where that is
        "task".
    imbalance, imbalance_order, class_sizes
        See `perdure.streams.imbalanced`.
    order
        See `Stream.reordered`.
    repeats, visits
        See `perdure.streams.repeated`.
    share
        For scenario "blurry" alone; 0.1 if left out. See `perdure.streams.blurry`.
    transition
        For scenario "online" alone; 0 if left out. See `perdure.streams.online`.
    """
    return dict(locals())


def shapable(builder: Builder) -> Builder:
    """A builder of announced streams that also takes the scenarios "online" and "blurry" and the keywords of `shape`.

    A keyword that the builder has itself stays its own; without a `scenario` that has a default it stays as it is.
    """
    own = inspect.signature(builder)
    if getattr(builder, "shapable", False) or "scenario" not in own.parameters:
        return builder
    extra = inspect.signature(shape, eval_str=True).parameters
    added = {name: parameter for name, parameter in extra.items() if name not in own.parameters}
    default = str(own.parameters["scenario"].default)

    @wraps(builder)
    def build(*args: Any, scenario: str = default, **arguments: Any) -> Stream:
        given = shape(**{name: arguments.pop(name) for name in added if name in arguments})
        return _shaped(lambda base: builder(*args, scenario=base, **arguments), scenario, default, **given)

    parameters = list(own.parameters.values())
    end = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    build.__signature__ = own.replace(parameters=[*parameters[:end], *added.values(), *parameters[end:]])  # type: ignore[attr-defined]
    build.shapable = True  # type: ignore[attr-defined]
    return cast(Builder, build)


def _shaped(build: Callable[[str], Stream], scenario: str, default: str, **given: Any) -> Stream:
    check_scenario(scenario)
    base = given["base"]
    if scenario in ANNOUNCED and base not in (None, scenario):
        raise UsageError(
            f"base='{base}' says what an online or blurry stream is made of; here scenario is '{scenario}'"
        )
    for name, where in (("share", "blurry"), ("transition", "online")):
        if given[name] is not None and scenario != where:
            raise UsageError(f"{name}={given[name]} is for scenario '{where}', and this is '{scenario}'; leave it out")
    if base is not None:
        check_scenario(base, ANNOUNCED)
    if scenario in ANNOUNCED:
        stream = build(scenario)
    else:
        stream = build(base or ("class" if default == "task" else default))
    if given["imbalance"] is not None or given["class_sizes"] is not None:
        factor = 1.0 if given["imbalance"] is None else given["imbalance"]
        stream = imbalanced(
            stream, imbalance=factor, imbalance_order=given["imbalance_order"], class_sizes=given["class_sizes"]
        )
    if given["order"] is not None:
        stream = stream.reordered(given["order"])
    stream = repeated(stream, repeats=given["repeats"], visits=given["visits"])
    if scenario == "online":
        stream = online(stream, transition=given["transition"] or 0.0)
    elif scenario == "blurry":
        stream = blurry(stream, share=0.1 if given["share"] is None else given["share"])
    usual = shape()
    said = {name: _plain(value) for name, value in given.items() if value != usual[name]}
    return stream.replace(stream.tasks, options={**stream.options, "scenario": scenario, **said})


def _plain(value: Any) -> Any:
    return [int(item) for item in value] if isinstance(value, (list, tuple)) else value
