"""Names for methods, benchmarks, models, data sets and detectors.

A registry maps a name to the module that defines it and imports that module on first use, so that listing names costs
nothing. Other packages add theirs with `@register("my_method")` or with an entry point in the group `perdure.methods`
(`perdure.benchmarks`, `perdure.models`, `perdure.datasets`, `perdure.detectors`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from perdure.errors import UnknownNameError, UsageError

T = TypeVar("T")


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return `"; did you mean 'ewc'?"` if some allowed word is close to `word`, else an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _home(entry: Any) -> tuple[str, str]:
    """Where an entry is defined; a module that is imported twice files the same entry again."""
    kind = entry if hasattr(entry, "__qualname__") else type(entry)
    return kind.__module__, kind.__qualname__


class Registry:
    """The named things of one kind.

    Parameters
    ----------
    kind
        What an entry is, in the singular: "method", "benchmark", ...
    modules
        Built-in names and the modules that register them when imported.
    """

    def __init__(self, kind: str, modules: dict[str, str]) -> None:
        self.kind = kind
        self._modules = dict(modules)
        self._entries: dict[str, Any] = {}
        self._entry_points: dict[str, Any] | None = None

    def register(self, name: str) -> Callable[[T], T]:
        """Class or function decorator that files its object under `name`."""

        def file(entry: T) -> T:
            known = self._entries.get(name)
            if known is not None and _home(known) != _home(entry):
                raise UsageError(f"the {self.kind} name '{name}' is taken by {'.'.join(_home(known))}")
            self._entries[name] = entry
            if isinstance(entry, type):
                entry.name = name  # type: ignore[attr-defined]
            return entry

        return file

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self._modules, *self._entries, *self._installed()})

    def get(self, name: str) -> Any:
        """Return what is filed under `name`; hyphens count as underscores.

        Raises
        ------
        UnknownNameError
            If nothing has that name.

        >>> methods.get("derp")
        Traceback (most recent call last):
        perdure.errors.UnknownNameError: unknown method 'derp'; did you mean 'derpp'? 'perdure list methods' shows all
        """
        key = name.replace("-", "_")
        if key not in self._entries:
            if key in self._modules:
                import_module(self._modules[key])
            elif key in self._installed():
                self._entries[key] = self._installed()[key].load()
            else:
                raise UnknownNameError(
                    f"unknown {self.kind} '{name}'{nearest(key, self.names()) or ';'} "
                    f"'perdure list {self.kind.replace(' ', '')}s' shows all"
                )
        return self._entries[key]

    def additions(self) -> list[Any]:
        """Entries that neither come with the library nor are installed."""
        known = {*self._modules, *self._installed()}
        return [entry for name, entry in self._entries.items() if name not in known]

    def _installed(self) -> dict[str, Any]:
        if self._entry_points is None:
            group = f"perdure.{self.kind.replace(' ', '')}s"
            self._entry_points = {point.name: point for point in entry_points(group=group)}
        return self._entry_points


methods = Registry(
    "method",
    {
        "joint": "perdure.methods.joint",
        "l2": "perdure.methods.l2",
        "ewc": "perdure.methods.ewc",
        "mas": "perdure.methods.mas",
        "si": "perdure.methods.si",
        "lwf": "perdure.methods.lwf",
        "kd": "perdure.methods.kd",
        "momentum_kd": "perdure.methods.momentum_kd",
        "vcl": "perdure.methods.vcl",
        "spg": "perdure.methods.spg",
        "hat": "perdure.methods.hat",
        "packnet": "perdure.methods.packnet",
        "replay": "perdure.methods.replay",
        "der": "perdure.methods.der",
        "derpp": "perdure.methods.derpp",
        "er_ace": "perdure.methods.er_ace",
        "mir": "perdure.methods.mir",
        "gdumb": "perdure.methods.gdumb",
        "icarl": "perdure.methods.icarl",
        "wa": "perdure.methods.wa",
        "bic": "perdure.methods.bic",
        "gem": "perdure.methods.gem",
        "agem": "perdure.methods.agem",
        "mer": "perdure.methods.mer",
        "la_maml": "perdure.methods.la_maml",
        "look_ahead": "perdure.methods.look_ahead",
        "generative_replay": "perdure.methods.generative_replay",
    },
)

benchmarks = Registry(
    "benchmark",
    dict.fromkeys(
        (
            "split_digits",
            "split_mnist",
            "permuted_mnist",
            "rotated_mnist",
            "split_fashion_mnist",
            "split_cifar10",
            "split_cifar100",
            "coarse_cifar100",
        ),
        "perdure.streams.benchmarks",
    ),
)

models = Registry(
    "model",
    {
        "mlp": "perdure.models.mlp",
        "bayesian_mlp": "perdure.models.bayesian",
        "small_cnn": "perdure.models.small_cnn",
        "slim_resnet18": "perdure.models.slim_resnet",
        "vae": "perdure.models.vae",
    },
)

datasets = Registry(
    "data set",
    dict.fromkeys(("digits", "mnist", "fashion_mnist", "cifar10", "cifar100"), "perdure.data.catalog"),
)

detectors = Registry(
    "detector",
    {
        "page_hinkley": "perdure.detection.page_hinkley",
        "adwin": "perdure.detection.from_river",
        "kswin": "perdure.detection.from_river",
        "window": "perdure.detection.window",
        "loss_plateau": "perdure.detection.plateau",
    },
)


def homes_of_additions() -> set[str]:
    """Modules that registered names by hand: a process that has not imported them does not know those names."""
    return {
        _home(entry)[0] for each in (methods, benchmarks, models, datasets, detectors) for entry in each.additions()
    }


register = methods.register
"""`@register("l2")` on a method class; everything else uses the decorator of its own registry."""
