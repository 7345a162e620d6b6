"""perdure's methods inside other libraries' training loops; each module needs the library it is named after.

`perdure.integrations.lightning.Continual` is a callback for Lightning's `Trainer`,
`perdure.integrations.transformers.Continual` one for Hugging Face's.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["lightning", "transformers"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"perdure.integrations.{name}")
    raise AttributeError(f"module 'perdure.integrations' has no attribute '{name}'")


def __dir__() -> list[str]:
    return list(__all__)
