"""What may be chosen: a list of values or a range for each setting, read from YAML."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from perdure.errors import UsageError
from perdure.experiments.typed import into
from perdure.registry import nearest

ALIASES = {
    "batch": "train.batch_size",
    "batch_size": "train.batch_size",
    "epochs": "train.epochs",
    "lr": "train.lr",
    "l2_reg": "train.weight_decay",
    "dropout": "model.dropout",
}
"""The Model Zoo's names for settings, beside perdure's own."""

_CALL = re.compile(r"(uniform|loguniform)\(([^,()]+),([^,()]+)\)")


@dataclass(frozen=True)
class Choices:
    """One of several values, in the order given."""

    values: tuple[Any, ...]

    def grid(self) -> tuple[Any, ...]:
        """The values of a grid."""
        return self.values

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that must work for all to work."""
        return self.values

    def to_plain(self) -> Any:
        """As it stands in a file."""
        return list(self.values)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between two ends, both included; uniform, or uniform in the logarithm.

    `step` is the distance of neighbours, `points` the number of values in a grid, `whole` that only whole numbers fit.

    >>> Range(low=1.0, high=1000.0, log=True, points=4).grid()
    (1.0, 10.0, 100.0, 1000.0)
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    points: int | None = None
    whole: bool = False

    def grid(self) -> tuple[Any, ...]:
        """The values of a grid: `points` of them from end to end, or all that `step` allows."""
        if self.points is not None:
            values = [self._between(i / (self.points - 1)) for i in range(self.points)]
        elif self.step is not None:
            count = math.floor((self.high - self.low) / self.step + 1e-9)
            values = [self.low + i * self.step for i in range(count + 1)]
        else:
            values = list(range(round(self.low), round(self.high) + 1))
        rounded = (round(v) if self.whole else float(f"{v:.12g}") for v in values)
        return tuple(dict.fromkeys(min(max(value, self.low), self.high) for value in rounded))

    @property
    def has_grid(self) -> bool:
        """Whether it says which of its values a grid takes."""
        return self.points is not None or self.step is not None or (self.whole and not self.log)

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that must work for all to work."""
        return (self.low, self.high)

    def to_plain(self) -> Any:
        """As it stands in a file."""
        plain: dict[str, Any] = {"low": self.low, "high": self.high}
        return plain | {key: value for key in ("log", "step", "points") if (value := getattr(self, key))}

    def _between(self, share: float) -> float:
        if self.log:
            return float(self.low * (self.high / self.low) ** share)
        return self.low + (self.high - self.low) * share


Space = dict[str, Choices | Range]


@dataclass(frozen=True, kw_only=True)
class _Written:
    low: float
    high: float
    log: bool = False
    step: float | None = None
    points: int | None = None


def space_of(written: Any) -> Space:
    """A space from the mapping in a file; the keys are `SECTION.KEY`, or the Model Zoo's `batch`, `lr` and so on.

    A value is a list to choose from, `{low: 1, high: 1000, log: true}` with `step` or `points` if a grid needs them, or
    the text `uniform(0.1, 0.5)` or `loguniform(1e-4, 1e-1)`.

    Raises
    ------
    UsageError
        If there is nothing to choose, or a key or a value is none of these.

    >>> space_of({"ewc.strength": "loguniform(1, 1e4)", "batch": [8, 16]})["train.batch_size"]
    Choices(values=(8, 16))
    """
    if not isinstance(written, Mapping) or not written:
        raise UsageError(
            f"space is {written!r}, it must be a mapping of settings to values, such as train.lr: [0.01, 0.1]"
        )
    space: Space = {}
    for name, value in written.items():
        key = _key(str(name))
        if key in space:
            raise UsageError(f"the space names {key} twice; name it once")
        space[key] = entry_of(key, value)
    return space


def grid_of(space: Space) -> Iterator[dict[str, Any]]:
    """Every combination, the last setting changing fastest.

    Raises
    ------
    UsageError
        If a range does not say which of its values to take.
    """
    for key, entry in space.items():
        if isinstance(entry, Range) and not entry.has_grid:
            raise UsageError(
                f"a grid needs values of {key}, and the space gives a range; list them, or add points: 5, or choose "
                "the sampler random or tpe"
            )
    for values in product(*(entry.grid() for entry in space.values())):
        yield dict(zip(space, values, strict=True))


def _key(name: str) -> str:
    key = ALIASES.get(name, name.replace("-", "_"))
    section, dot, rest = key.partition(".")
    if not (section and dot and rest):
        raise UsageError(
            f"the space's '{name}' is not SECTION.KEY, such as train.lr or ewc.strength{nearest(name, ALIASES)}"
        )
    return key


def entry_of(key: str, value: Any) -> Choices | Range:
    """One entry of a space; see `space_of`."""
    if isinstance(value, (list, tuple)):
        values = tuple(value)
        if not values:
            raise UsageError(f"space.{key} is an empty list; give the values to choose from")
        if any(a == b and type(a) is type(b) for i, a in enumerate(values) for b in values[:i]):
            raise UsageError(f"space.{key} is {list(values)}, which names a value twice; name it once")
        return Choices(values)
    if isinstance(value, str) and (call := _CALL.fullmatch(value.replace(" ", ""))):
        value = {"low": call[2], "high": call[3], "log": call[1] == "loguniform"}
    if not isinstance(value, Mapping):
        raise UsageError(
            f"space.{key} is {value!r}, it must be a list of values, a mapping with low and high, or uniform(LOW, HIGH)"
        )
    return _checked(key, into(_Written, value, f"space.{key}"))


def _checked(key: str, found: _Written) -> Range:
    low, high = found.low, found.high
    if not (math.isfinite(low) and math.isfinite(high)) or low >= high:
        raise UsageError(f"space.{key} goes from {low:g} to {high:g}; low must be below high")
    if found.log and low <= 0:
        raise UsageError(f"space.{key} is logarithmic and begins at {low:g}, it must begin above 0")
    if found.log and found.step is not None:
        raise UsageError(f"space.{key} is logarithmic and has step: {found.step:g}; use points instead")
    if found.step is not None and not 0 < found.step <= high - low:
        raise UsageError(f"space.{key} has step: {found.step:g}, it must be above 0 and at most {high - low:g}")
    if found.points is not None and found.points < 2:
        raise UsageError(f"space.{key} has points: {found.points}, it must be at least 2")
    return Range(low=low, high=high, log=found.log, step=found.step, points=found.points)
