"""The benchmark of detectors: what counts as found, as late and as false, and what its page makes of it."""

import pytest
from benchmarks.detection import SEEDS, Found, judged, permuted_text, shares

from perdure.detection import Boundary


def test_a_change_is_found_once_and_within_its_window_and_every_other_alarm_is_false() -> None:
    alarms = [Boundary(5, 0, 1.0), Boundary(103, 99, 1.0), Boundary(110, 110, 1.0), Boundary(250, 249, 1.0)]
    report = judged(alarms, [100, 200, 300], within=50)
    assert report == {"changes": 3, "found": 1, "delay": [3], "estimate": [-1], "false": 3}
    assert judged(alarms, [200], within=51)["delay"] == [50]
    assert judged([], [100], within=50) == {"changes": 1, "found": 0, "delay": [], "estimate": [], "false": 0}


def test_the_share_of_the_gain_is_one_with_the_given_boundaries_and_zero_with_none() -> None:
    given, plain = [0.9, 0.8, 0.85], [0.5, 0.6, 0.7]
    assert shares(given, given, plain) == [1.0] * 3
    assert shares(plain, given, plain) == [0.0] * 3


@pytest.mark.parametrize(("kept", "verdict"), [(0.82, "reached"), (0.81, "**missed**")])
def test_the_page_gives_every_detector_its_delays_false_alarms_and_verdict(kept: float, verdict: str) -> None:
    report = {"changes": 4, "found": 3, "delay": [5, 9, 7], "estimate": [0, -2, 1], "false": 1}
    one = Found("some", [report] * len(SEEDS), [kept] * len(SEEDS), [0] * (len(SEEDS) - 1) + [2])
    text = permuted_text([0.9] * len(SEEDS), [0.5] * len(SEEDS), [one], 468)
    count = len(SEEDS)
    assert f"| `some` | {3 * count} of {4 * count} | 7 (9) | 2 | {count} | 2 |" in text
    row = next(line for line in text.splitlines() if line.startswith(f"| `some` | {100 * kept:.2f}"))
    assert f"| {(kept - 0.5) / 0.4:.0%} |" in row
    assert row.endswith(f"| {verdict} |")
