"""Loss plateaus: consolidate when learning has settled, without waiting for the next task."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import fmean, pvariance
from typing import ClassVar

from perdure.detection.base import Detector, check_more_than
from perdure.registry import detectors


@detectors.register("loss_plateau")
@dataclass(kw_only=True)
class LossPlateau(Detector):
    """Alarm when the loss has become low and steady, once after every peak.

    Over the last `window` values: mean < `mean_threshold` and variance < `variance_threshold`, after a peak, which is
    a mean above the last plateau's mean + standard deviation. What it reports is not where a task begins but where
    what was learned is worth keeping: the estimated change is the next value, so the weights are taken as they are.

    R. Aljundi, K. Kelchtermans, T. Tuytelaars 2019, Task-Free Continual Learning, arXiv 1812.03596.

    Parameters
    ----------
    window
        Values of which mean and variance are taken.
    mean_threshold, variance_threshold
        In the unit of the loss (and its square): what is low and steady depends on the problem.
    standardise, cool_down
        See `Detector`; the loss is taken as it is.

    >>> detector = LossPlateau()
    >>> losses = [2.0, 1.0, 0.5] + [0.1] * 20 + [2.0, 1.0] + [0.1] * 20
    >>> [found.step for loss in losses if (found := detector.observe(loss))]
    [6, 29]
    """

    window: int = 5
    mean_threshold: float = 0.2
    variance_threshold: float = 0.1
    standardise: int = 0
    cool_down: int = 0

    summary: ClassVar[str] = "the loss is low and steady again after a peak"
    paper: ClassVar[str] = "Aljundi et al. 2019, arXiv 1812.03596"

    def __post_init__(self) -> None:
        check_more_than(self, 1, "window")
        super().__post_init__()

    def reset(self) -> None:
        self.peaked, self.level = True, 0.0
        super().reset()

    def _start(self) -> None:
        # The peak and the last plateau outlive an alarm, and so does the window, in which the peak is looked for.
        self.values: list[float] = getattr(self, "values", []) if self.steps else []

    def _test(self, value: float) -> tuple[int, float] | None:
        self.values.append(value)
        del self.values[: -self.window]
        if len(self.values) < self.window:
            return None
        mean, variance = fmean(self.values), pvariance(self.values)
        if mean > self.level:
            self.peaked = True
        if not (self.peaked and mean < self.mean_threshold and variance < self.variance_threshold):
            return None
        self.peaked, self.level = False, mean + sqrt(variance)
        return 0, mean
