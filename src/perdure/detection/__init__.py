"""Task-boundary and drift detectors: `observe(value)` takes a loss or an accuracy and now and then returns a boundary.

They depend on no other part of the package and are useful alone; `perdure.Learner(..., boundaries=PageHinkley())` lets
one of them open and close the tasks of a stream that announces none.
"""

from perdure.detection.base import Boundary, Detector
from perdure.detection.from_river import ADWIN, KSWIN
from perdure.detection.page_hinkley import PageHinkley
from perdure.detection.plateau import LossPlateau
from perdure.detection.scale import RunningScale
from perdure.detection.window import WindowDetector

__all__ = [
    "ADWIN",
    "KSWIN",
    "Boundary",
    "Detector",
    "LossPlateau",
    "PageHinkley",
    "RunningScale",
    "WindowDetector",
]
