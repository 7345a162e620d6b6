"""Numbers in sigmas, whatever their unit, and the place where a series of numbers splits best in two."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean, median

CLIP = 10.0
"""The largest standardised value, in sigmas: one outlier must not sound an alarm."""

_LEAST = 20
_MAD_TO_SIGMA = 1.4826  # of normally distributed values
_MEAN_DEVIATION_TO_SIGMA = 1.2533


class RunningScale:
    """Standardises every value by the median and the median absolute deviation (MAD) of the last `window` before it.

    Both ignore up to half of the values, so the first values after a change are measured by what was before it.

    >>> scale = RunningScale(40)
    >>> found = [scale(value) for value in [1.0, 2.0, 3.0] * 10 + [20.0]]
    >>> found[0] is None, found[20], found[-1]
    (True, 0.6744907594765952, 10.0)
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.values: list[float] = []

    def __call__(self, value: float) -> float | None:
        """`value` in sigmas from the median, clipped; None until there are enough values to tell."""
        found = self._standardised(value) if len(self.values) >= min(_LEAST, self.window) else None
        self.values.append(value)
        del self.values[: -self.window]
        return found

    def _standardised(self, value: float) -> float:
        center = median(self.values)
        deviations = [abs(each - center) for each in self.values]
        # Where more than half of the values are equal, as accuracies may be, the MAD is zero.
        sigma = _MAD_TO_SIGMA * median(deviations) or _MEAN_DEVIATION_TO_SIGMA * fmean(deviations)
        distance = value - center
        if abs(distance) >= CLIP * sigma:
            return 0.0 if distance == 0 else CLIP if distance > 0 else -CLIP
        return distance / sigma


def best_split(values: Sequence[float]) -> int:
    """The k for which `values[:k]` and `values[k:]` differ most: the least squares estimate of a step's place.

    It is where n0 n1 / n (mean0 - mean1)^2 is largest; at least two values are needed.

    >>> best_split([0.1, 0.0, 0.2, 5.0, 5.1])
    3
    """
    n, total = len(values), sum(values)
    gains = [(part - total * k / n) ** 2 / (k * (n - k)) for k, part in enumerate(accumulate(values[:-1]), start=1)]
    return 1 + max(range(n - 1), key=gains.__getitem__)
