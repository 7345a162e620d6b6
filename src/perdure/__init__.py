"""perdure: train a PyTorch model on a stream of tasks, and keep updating it, without losing what it knew."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perdure import (
        continual,
        data,
        detection,
        errors,
        integrations,
        memory,
        methods,
        metrics,
        models,
        report,
        streams,
    )
    from perdure.attachment import attach
    from perdure.learner import Learner
    from perdure.methods.base import Method
    from perdure.registry import register
    from perdure.results import Results
    from perdure.streams import benchmarks
    from perdure.streams.task import Stream, Task

_HOMES = {
    "attach": "perdure.attachment",
    "Learner": "perdure.learner",
    "Method": "perdure.methods.base",
    "Results": "perdure.results",
    "Stream": "perdure.streams.task",
    "Task": "perdure.streams.task",
    "register": "perdure.registry",
}
_MODULES = {
    "benchmarks": "perdure.streams.benchmarks",
    **{
        name: f"perdure.{name}"
        for name in (
            "continual",
            "data",
            "detection",
            "errors",
            "integrations",
            "memory",
            "methods",
            "metrics",
            "models",
            "report",
            "streams",
        )
    },
}

__all__ = [
    "Learner",
    "Method",
    "Results",
    "Stream",
    "Task",
    "attach",
    "benchmarks",
    "continual",
    "data",
    "detection",
    "errors",
    "integrations",
    "memory",
    "methods",
    "metrics",
    "models",
    "register",
    "report",
    "streams",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name == "__version__":
        from perdure.version import perdure_version

        return perdure_version()
    raise AttributeError(f"module 'perdure' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
