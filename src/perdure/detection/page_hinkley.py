"""The Page-Hinkley test: how far has the sum of deviations from the mean risen above its lowest point?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from perdure.detection.base import Detector, check_mode, check_more_than
from perdure.registry import detectors


@detectors.register("page_hinkley")
@dataclass(kw_only=True)
class PageHinkley(Detector):
    """Alarm when values stay above (or below) their mean so far by more than `delta`, summed up to `threshold`.

    S <- alpha S + (x - m - delta), alarm if S - min S > threshold; downwards with + delta, from max S. The change is
    estimated where S was lowest (highest). With `standardise=0`, `delta=0.005` and `mode="both"` it is the test as
    river 0.26 has it; delta is larger here because in sigmas 0.005 sounds an alarm every few hundred values.

    E. S. Page 1954, Biometrika 41, 100-115; D. V. Hinkley 1971, Biometrika 58, 509-523.

    Parameters
    ----------
    threshold
        The sum of deviations that is a change: in sigmas, if the signal is standardised.
    delta
        Deviation that counts as no change; half of the smallest change worth an alarm.
    alpha
        Forgetting factor of the sum, 0 to 1.
    min_instances
        Values before the first alarm.
    mode
        "up" for a loss, "down" for an accuracy, "both"; with "both", learning itself is a change.
    standardise, cool_down
        See `Detector`.

    >>> detector = PageHinkley(cool_down=0)
    >>> losses = [1.0, 1.2, 0.8, 1.1, 0.9] * 20 + [3.0] * 20
    >>> [found for loss in losses if (found := detector.observe(loss))]
    [Boundary(step=105, change_point=100, score=54.52032868858507)]
    """

    threshold: float = 50.0
    delta: float = 0.5
    alpha: float = 0.9999
    min_instances: int = 30
    mode: str = "up"

    summary: ClassVar[str] = "the sum of deviations from the mean so far rises too far above its lowest point"
    paper: ClassVar[str] = "Page 1954, Biometrika 41, 100-115"

    def __post_init__(self) -> None:
        check_mode(self, self.mode)
        check_more_than(self, 0, "threshold", "alpha")
        super().__post_init__()

    def _start(self) -> None:
        self.count, self.mean = 0, 0.0
        self.rise, self.lowest, self.since_lowest = 0.0, 0.0, 0
        self.fall, self.highest, self.since_highest = 0.0, 0.0, 0

    def _test(self, value: float) -> tuple[int, float] | None:
        self.count += 1
        self.mean += (value - self.mean) / self.count
        low = high = self.mean
        if self.standardise:
            # A running median is the level already; the mean adds the skewness, not the memory of a loss that fell.
            low, high = max(low, 0.0), min(high, 0.0)
        self.rise = self.alpha * self.rise + value - low - self.delta
        self.fall = self.alpha * self.fall + value - high + self.delta
        self.since_lowest += 1
        self.since_highest += 1
        if self.count == 1 or self.rise < self.lowest:
            self.lowest, self.since_lowest = self.rise, 0
        if self.count == 1 or self.fall > self.highest:
            self.highest, self.since_highest = self.fall, 0
        if self.count < self.min_instances:
            return None
        up, down = self.rise - self.lowest, self.highest - self.fall
        if self.mode != "down" and up > self.threshold:
            return self.since_lowest, up
        if self.mode != "up" and down > self.threshold:
            return self.since_highest, down
        return None
