"""What a detector is: one number in at a time, and now and then a boundary out."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from perdure.detection.scale import RunningScale
from perdure.errors import UsageError

MODES = ("up", "down", "both")


@dataclass(frozen=True)
class Boundary:
    """An alarm.

    Attributes
    ----------
    step
        The number of the value at which it sounded, from 0.
    change_point
        The estimated number of the first value after the change, at most `step + 1`.
    score
        The test statistic, in the detector's own unit.
    """

    step: int
    change_point: int
    score: float


@dataclass(kw_only=True)
class Detector:
    """Base of all detectors; a subclass implements `_start` and `_test`.

    After an alarm everything is forgotten and the next `cool_down` values only set the scale, so a change is reported
    once. The same holds for the first values of all: no task is shorter than `cool_down`.

    Parameters
    ----------
    standardise
        Measure values in sigmas: by the median and MAD of the last so many. 0 takes values as they are.
    cool_down
        Values after an alarm, and at the start, that are not tested.
    """

    standardise: int = 200
    cool_down: int = 50

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    signal: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        if self.standardise and self.standardise < 10:
            raise UsageError(f"{self.name}: standardise is {self.standardise}, it must be 0 or at least 10")
        if self.cool_down < 0:
            raise UsageError(f"{self.name}: cool_down is {self.cool_down}, it must be at least 0")
        self.steps = 0
        self._begun: int = 0
        self._scale = RunningScale(self.standardise)
        self.reset()

    # -- for subclasses -------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Begin with no value seen: set every attribute that `_test` changes."""
        raise NotImplementedError

    def _test(self, value: float) -> tuple[int, float] | None:
        """Take in a value; on an alarm, how many values ago the change was (0: it begins with the next) and a score."""
        raise NotImplementedError

    # -- use ------------------------------------------------------------------------------------------------------

    def observe(self, value: float) -> Boundary | None:
        """Take in the next value of the signal.

        Raises
        ------
        UsageError
            If the value is not finite.
        """
        value = float(value)
        if not math.isfinite(value):
            raise UsageError(f"{self.name}: value {self.steps} is {value}, it must be finite; did training diverge?")
        step = self.steps
        self.steps += 1
        scaled = self._scale(value) if self.standardise else value
        if scaled is None or step - self._begun < self.cool_down:
            return None
        found = self._test(scaled)
        if found is None:
            return None
        self._restart()
        return Boundary(step, step + 1 - found[0], found[1])

    def reset(self) -> None:
        """Forget everything, the number of values seen included."""
        self.steps = 0
        self._restart()

    def _restart(self) -> None:
        self._begun = self.steps
        self._scale = RunningScale(self.standardise)
        self._start()

    # -- state ----------------------------------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """The constructor arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.init}

    def state_dict(self) -> dict[str, Any]:
        """What was seen, as plain numbers, lists and dictionaries."""
        own = {key: value for key, value in vars(self).items() if key not in self.arguments() and key[0] != "_"}
        return {**deepcopy(own), "begun": self._begun, "scale": list(self._scale.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, in a detector with the same arguments."""
        own = deepcopy(state)
        self._begun, self._scale.values = own.pop("begun"), own.pop("scale")
        vars(self).update(own)


def check_mode(detector: Detector, mode: str) -> None:
    """Raise UsageError unless `mode` is up, down or both."""
    if mode not in MODES:
        raise UsageError(f"{detector.name}: mode is {mode!r}, it must be one of {', '.join(MODES)}")


def check_more_than(detector: Detector, low: float, *names: str) -> None:
    """Raise UsageError unless the arguments `names` are more than `low`."""
    for name in names:
        if not getattr(detector, name) > low:
            raise UsageError(f"{detector.name}: {name} is {getattr(detector, name)!r}, it must be more than {low:g}")
