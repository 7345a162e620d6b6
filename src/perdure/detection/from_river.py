"""ADWIN and KSWIN as the river package has them, behind the interface of all detectors."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from perdure.detection.base import Detector, check_mode
from perdure.detection.scale import best_split
from perdure.errors import MissingExtraError, UsageError
from perdure.registry import detectors

LONGEST = 10_000
"""Values after which the oldest half is forgotten, so that neither memory nor a checkpoint grows for ever."""

NOISE, FAR = 1.0, 5.0
"""Sigmas that a one-sided signal ignores, and where it ends: many middling values are a change, a few huge ones not."""


def in_unit_range(value: float, mode: str) -> float:
    """A standardised value in [0, 1], as ADWIN's bound wants it, without the side that `mode` ignores.

    Were the other side only left to the comparison of means, the end of a fall would be a rise: so a loss that has
    stopped falling would sound the alarm.

    >>> [in_unit_range(value, "up") for value in (-3.0, 0.5, 3.0, 9.0)]
    [0.0, 0.0, 0.5, 1.0]
    """
    if mode == "both":
        return min(max(value / (2 * FAR) + 0.5, 0.0), 1.0)
    found = ((value if mode == "up" else -value) - NOISE) / (FAR - NOISE)
    found = min(max(found, 0.0), 1.0)
    return found if mode == "up" else 1.0 - found


def _drift() -> Any:
    try:
        from river import drift
    except ImportError as error:
        raise MissingExtraError(
            "adwin and kswin need river; pip install 'perdure[detection]' installs it, and page_hinkley needs nothing"
        ) from error
    return drift


@dataclass(kw_only=True)
class _FromRiver(Detector):
    """A detector of river's. It cannot be read out, so it is built again from the values fed since the last alarm."""

    mode: str = "up"

    def __post_init__(self) -> None:
        check_mode(self, self.mode)
        try:
            super().__post_init__()
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{self.name}: {error}") from error

    def _build(self) -> Any:
        raise NotImplementedError

    def _recent(self) -> int:
        """How many of the values fed river thinks are from after the change, once it has sounded an alarm."""
        raise NotImplementedError

    def _start(self) -> None:
        self.fed: list[float] = []
        self._feed([])

    def _feed(self, values: list[float]) -> bool:
        """Begin anew with these values; whether there was an alarm among them."""
        self._river = self._build()
        alarm = False
        for value in values:
            self._river.update(value)
            alarm = alarm or bool(self._river.drift_detected)
        return alarm

    def _test(self, value: float) -> tuple[int, float] | None:
        value = in_unit_range(value, self.mode) if self.standardise else value
        self.fed.append(value)
        self._river.update(value)
        alarm = self._river.drift_detected
        if len(self.fed) >= LONGEST:
            del self.fed[: LONGEST // 2]
            alarm = self._feed(self.fed) or alarm
        if not alarm:
            return None
        split = best_split(self.fed)
        rise = fmean(self.fed[split:]) - fmean(self.fed[:split])
        if (self.mode == "up" and rise <= 0) or (self.mode == "down" and rise >= 0):
            del self.fed[: -self._recent()]
            self._feed(self.fed)
            return None
        return len(self.fed) - split, abs(rise)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._feed(self.fed)


@detectors.register("adwin")
@dataclass(kw_only=True)
class ADWIN(_FromRiver):
    """Alarm when the window of all values since the last change has two parts of different mean.

    The parts W0 | W1 differ if |mean0 - mean1| > sqrt(2/m var ln(2/d)) + 2/(3m) ln(2/d), with m the harmonic sum of
    their lengths and d = delta / ln n. Needs the package river (extra `detection`).

    A. Bifet, R. Gavalda 2007, Learning from Time-Changing Data with Adaptive Windowing, SIAM SDM, 443-448.

    Parameters
    ----------
    delta
        Significance.
    clock
        Values between two tests: the alarm is up to so many values late.
    max_buckets, min_window_length, grace_period
        As in river.
    mode
        "up" for a loss, "down" for an accuracy, "both".
    standardise, cool_down
        See `Detector`. Values that are not standardised should lie between 0 and 1.
    """

    delta: float = 0.002
    clock: int = 32
    max_buckets: int = 5
    min_window_length: int = 5
    grace_period: int = 10

    summary: ClassVar[str] = "the window of values since the last change has two parts of different mean (river)"
    paper: ClassVar[str] = "Bifet and Gavalda 2007, SIAM SDM, 443-448"

    def _build(self) -> Any:
        return _drift().ADWIN(
            delta=self.delta,
            clock=self.clock,
            max_buckets=self.max_buckets,
            min_window_length=self.min_window_length,
            grace_period=self.grace_period,
        )

    def _recent(self) -> int:
        return int(self._river.width)


@detectors.register("kswin")
@dataclass(kw_only=True)
class KSWIN(_FromRiver):
    """Alarm when the newest values and a sample of the older ones of a window are not of one distribution.

    A Kolmogorov-Smirnov test at every value. Needs the package river (extra `detection`).

    C. Raab, M. Heusinger, F.-M. Schleif 2020, Reactive Soft Prototype Computing for Concept Drift Streams,
    Neurocomputing, arXiv 2007.05432.

    Parameters
    ----------
    alpha
        Significance of one test. There is one at every value, so small values are needed against false alarms.
    window_size, stat_size
        Values in the window, and how many newest ones are compared with as many of the rest.
    seed
        Of the sample.
    mode
        "up" for a loss, "down" for an accuracy, "both".
    standardise, cool_down
        See `Detector`.
    """

    alpha: float = 0.005
    window_size: int = 100
    stat_size: int = 30
    seed: int = 0

    summary: ClassVar[str] = "the newest values have another distribution than the older ones of a window (river)"
    paper: ClassVar[str] = "Raab et al. 2020, arXiv 2007.05432"

    def _build(self) -> Any:
        return _drift().KSWIN(alpha=self.alpha, window_size=self.window_size, stat_size=self.stat_size, seed=self.seed)

    def _recent(self) -> int:
        return self.stat_size
