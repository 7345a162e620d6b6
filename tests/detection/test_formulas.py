"""Each detector against its own formula: written out again here, or as the river package has it."""

import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import pytest
from river import drift

from perdure.detection import ADWIN, KSWIN, Detector, LossPlateau, PageHinkley, RunningScale, WindowDetector, from_river
from perdure.detection.scale import best_split
from perdure.errors import MissingExtraError

RAW: dict[str, Any] = {"standardise": 0, "cool_down": 0, "mode": "both"}


def walk(count: int = 3000, seed: int = 0) -> list[float]:
    """Values in [0, 1] around a level that jumps now and then."""
    draw = np.random.default_rng(seed)
    level = np.repeat(draw.uniform(0.2, 0.8, count // 250), 250)
    return [float(value) for value in np.clip(level + draw.normal(0, 0.1, len(level)), 0, 1)]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: PageHinkley(**RAW, delta=0.005, threshold=5.0), lambda: drift.PageHinkley(threshold=5.0)),
        (
            lambda: PageHinkley(**{**RAW, "mode": "down"}, delta=0.01, threshold=3.0, alpha=0.99, min_instances=7),
            lambda: drift.PageHinkley(threshold=3.0, delta=0.01, alpha=0.99, min_instances=7, mode="down"),
        ),
        (lambda: ADWIN(**RAW), drift.ADWIN),
        (lambda: ADWIN(**RAW, delta=0.05, clock=8), lambda: drift.ADWIN(delta=0.05, clock=8)),
        (lambda: KSWIN(**RAW, seed=4), lambda: drift.KSWIN(seed=4)),
    ],
)
def test_on_raw_values_the_alarms_are_rivers(ours: Callable[[], Detector], theirs: Callable[[], Any]) -> None:
    values = walk(1000)
    own, other = ours(), theirs()
    found, expected = [], []
    for step, value in enumerate(values):
        if own.observe(value):
            found.append(step)
        other.update(value)
        if other.drift_detected:
            expected.append(step)
    assert found == expected
    assert len(found) >= 2


def test_page_hinkley_estimates_the_change_at_the_lowest_sum() -> None:
    values = [0.0, 0.3, -0.2, 0.1] * 10 + [1.0, 0.2, 1.5, 0.9, 1.3, 1.1]
    detector = PageHinkley(standardise=0, cool_down=0, delta=0.1, threshold=4.0, alpha=1.0)
    found = next(found for value in values if (found := detector.observe(value)))
    means = np.cumsum(values) / np.arange(1, len(values) + 1)
    sums = np.cumsum(np.array(values) - means - 0.1)[: found.step + 1]
    assert found.change_point == int(sums.argmin()) + 1 == 40
    assert found.score == pytest.approx(sums[-1] - sums.min())


def test_standardised_page_hinkley_takes_no_flattening_for_a_rise() -> None:
    """The running mean remembers a steep fall; measured from it, values at the median would be a rise."""
    detector = PageHinkley(standardise=0, cool_down=0, min_instances=1, threshold=20.0)
    assert any(detector.observe(value) for value in [-5.0] * 20 + [0.0] * 40)
    detector.standardise = 200  # as the sums see it once the scale is known
    detector.reset()
    assert not any(detector._test(value) for value in [-5.0] * 20 + [0.0] * 400)


def test_running_scale_is_median_and_mad_of_the_values_before() -> None:
    values = walk(500)
    scale = RunningScale(50)
    for step, value in enumerate(values):
        found = scale(value)
        before = np.array(values[max(0, step - 50) : step])
        if step < 20:
            assert found is None
        else:
            mad = 1.4826 * np.median(np.abs(before - np.median(before)))
            assert found == pytest.approx(np.clip((value - median(before)) / mad, -10, 10))


def test_running_scale_of_mostly_equal_values() -> None:
    scale = RunningScale(20)
    for value in [1.0] * 18 + [0.0] * 2:
        scale(value)
    assert scale(0.0) == pytest.approx(-1 / (1.2533 * 0.1))
    constant = RunningScale(20)
    assert [constant(value) for value in [1.0] * 21 + [1.5, 0.5]][-3:] == [0.0, 10.0, -10.0]


def test_best_split_is_the_least_squares_split() -> None:
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=30).round(2)
        errors = [values[:k].var() * k + values[k:].var() * (30 - k) for k in range(1, 30)]
        assert best_split(list(values)) == 1 + int(np.argmin(errors))


def test_window_detector_is_the_documents_rule_until_it_alarms() -> None:
    values = walk(2000, seed=3)
    detector = WindowDetector(window=60, threshold=0.1, cool_down=0)
    first = next(found.step for value in values if (found := detector.observe(value)))
    for step in range(59, first + 1):
        window = values[step - 59 : step + 1]
        drop = np.mean(window[:30]) - np.mean(window[30:])
        assert (drop > 0.1) == (step == first)


def test_window_detector_is_cleared_so_it_does_not_repeat_the_alarm() -> None:
    detector = WindowDetector(window=20, cool_down=0)
    found = [step for step, value in enumerate([1.0] * 40 + [0.0] * 100) if detector.observe(value)]
    assert len(found) == 1


def test_loss_plateau_is_the_papers_rule() -> None:
    draw = np.random.default_rng(1)
    losses = np.concatenate([np.linspace(2, 0.05, 40), np.full(30, 0.05), np.linspace(1.5, 0.1, 40), np.full(30, 0.1)])
    losses = np.abs(losses + draw.normal(0, 0.03, len(losses)))
    expected, peak, level = [], True, 0.0
    for step in range(4, len(losses)):
        window = losses[step - 4 : step + 1]
        peak = peak or window.mean() > level
        if window.mean() < 0.2 and window.var() < 0.1 and peak:
            expected.append(step)
            peak, level = False, window.mean() + window.std()
    detector = LossPlateau()
    found = [boundary for loss in losses if (boundary := detector.observe(loss))]
    assert [boundary.step for boundary in found] == expected
    assert all(boundary.change_point == boundary.step + 1 for boundary in found), "the weights are good as they are"
    assert len(expected) >= 2


def test_one_sided_adwin_ignores_a_fall_and_goes_on_with_what_came_after_it() -> None:
    values = [0.8] * 200 + [0.2] * 200
    assert not any(ADWIN(**{**RAW, "mode": "up"}).observe(value) for value in values)
    detector = ADWIN(**{**RAW, "mode": "up"})
    found = [boundary for value in [*values, *[0.6] * 100] if (boundary := detector.observe(value))]
    assert [boundary.change_point for boundary in found] == [400]


def test_what_adwin_was_fed_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_river, "LONGEST", 300)
    detector, other = ADWIN(**RAW), ADWIN(**RAW)
    draw = np.random.default_rng(2)
    values = [float(value) for value in draw.uniform(0.4, 0.6, 730)] + [1.0] * 150
    assert not any(detector.observe(value) for value in values[:690])
    assert len(detector.state_dict()["fed"]) < 300
    other.load_state_dict(detector.state_dict())
    found = [detector.observe(value) for value in values[690:]]
    assert found == [other.observe(value) for value in values[690:]]
    assert any(found)


def test_without_river_the_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "river", None)
    for kind in (ADWIN, KSWIN):
        with pytest.raises(MissingExtraError, match=r"pip install 'perdure\[detection\]'"):
            kind()
    assert PageHinkley().observe(1.0) is None
