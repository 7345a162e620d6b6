"""Two halves of a window: the simplest detector."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from perdure.detection.base import Detector, check_mode, check_more_than
from perdure.detection.scale import best_split
from perdure.registry import detectors


@detectors.register("window")
@dataclass(kw_only=True)
class WindowDetector(Detector):
    """Alarm when the mean of the last window's older half exceeds that of its newer half by more than `threshold`.

    The detector of the Neurenix continual-learning document, for accuracies. There the window is never cleared and the
    alarm repeats at every batch; here it is cleared and there is a cool-down. The change is estimated where the window
    splits best into two levels, since the alarm may come half a window late.

    Parameters
    ----------
    window
        Values compared, half with half.
    threshold
        Difference of the two means that is a change.
    mode
        "down" for an accuracy, "up" for a loss, "both".
    standardise, cool_down
        See `Detector`; accuracies are taken as they are.

    >>> detector = WindowDetector(window=10, cool_down=0)
    >>> accuracies = [0.9] * 20 + [0.5] * 20
    >>> [(found.step, found.change_point) for value in accuracies if (found := detector.observe(value))]
    [(21, 20)]
    """

    window: int = 100
    threshold: float = 0.1
    mode: str = "down"
    standardise: int = 0
    cool_down: int = 100

    summary: ClassVar[str] = "the means of a window's two halves differ by more than a threshold"
    paper: ClassVar[str] = "no single source; the detector of the Neurenix continual-learning document"
    signal: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        check_mode(self, self.mode)
        check_more_than(self, 0, "threshold")
        check_more_than(self, 1, "window")
        super().__post_init__()

    def _start(self) -> None:
        self.values: list[float] = []

    def _test(self, value: float) -> tuple[int, float] | None:
        self.values.append(value)
        del self.values[: -self.window]
        if len(self.values) < self.window:
            return None
        half = self.window // 2
        drop = fmean(self.values[:half]) - fmean(self.values[half:])
        score = {"down": drop, "up": -drop, "both": abs(drop)}[self.mode]
        return (self.window - best_split(self.values), score) if score > self.threshold else None
