"""What every detector has to satisfy: few false alarms, a short delay, one alarm a change, silence while learning."""

import json
import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from perdure import registry
from perdure.detection import ADWIN, KSWIN, Boundary, Detector, LossPlateau, PageHinkley, WindowDetector
from perdure.errors import UsageError

CHANGES: dict[str, Callable[[], Detector]] = {
    "page_hinkley": PageHinkley,
    "adwin": ADWIN,
    "kswin": KSWIN,
    "window": lambda: WindowDetector(mode="up", threshold=1.5),
}
EVERY = {**CHANGES, "loss_plateau": lambda: LossPlateau(mean_threshold=1.0, variance_threshold=2.0)}
COUNT = {"kswin": 500}  # a Kolmogorov-Smirnov test at every value takes its time
LONGEST_DELAY = {"page_hinkley": 20, "adwin": 40, "kswin": 30, "window": 60}


def noise(count: int, seed: int, sigma: float = 1.0, skewed: bool = False) -> list[float]:
    draw = random.Random(seed)
    return [draw.expovariate(1 / sigma) if skewed else draw.gauss(0, sigma) for _ in range(count)]


def alarms(detector: Detector, values: list[float]) -> list[Boundary]:
    return [found for value in values if (found := detector.observe(value))]


def test_every_registered_detector_is_tested() -> None:
    assert sorted(EVERY) == registry.detectors.names()
    assert all(make().name == name for name, make in EVERY.items())


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_stationary_noise_gives_at_most_one_false_alarm_in_a_thousand_values(name: str, skewed: bool) -> None:
    count = COUNT.get(name, 3000)
    assert len(alarms(CHANGES[name](), noise(count, 3, skewed=skewed))) <= count // 1000


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CHANGES)
def test_a_step_is_reported_once_soon_and_where_it_was(name: str, seed: int) -> None:
    values = noise(450, seed)
    values[300:] = [value + 6.0 for value in values[300:]]
    found = alarms(CHANGES[name](), values)
    assert len(found) == 1
    assert 300 <= found[0].step < 300 + LONGEST_DELAY[name]
    assert abs(found[0].change_point - 300) <= 3
    assert found[0].score > 0


@pytest.mark.parametrize("name", CHANGES)
def test_every_one_of_several_changes_is_reported_once(name: str) -> None:
    values = [value + 8.0 * (step // 250) for step, value in enumerate(noise(COUNT.get(name, 1000), 5))]
    found = alarms(CHANGES[name](), values)
    assert [round(each.change_point / 250) for each in found] == [1, 2, 3][: 1 if name == "kswin" else 3]


@pytest.mark.parametrize("standardise", [0, 200])
@pytest.mark.parametrize("name", CHANGES)
def test_a_loss_that_falls_and_then_stays_is_no_change(name: str, standardise: int) -> None:
    if name == "kswin" and not standardise:
        pytest.skip("a slow fall seen through a window of 100 is a sequence of noise samples to KSWIN")
    detector = CHANGES[name]()
    detector.standardise = standardise
    detector.reset()
    rough = noise(600, 8, sigma=0.05)
    assert alarms(detector, [0.3 + 2 * math.exp(-step / 80) + rough[step] for step in range(600)]) == []


@pytest.mark.parametrize("name", EVERY)
def test_a_detector_loaded_from_json_sounds_the_same_alarms(name: str) -> None:
    values = [value + 8.0 * (step // 120 % 2) for step, value in enumerate(noise(300, 6))]
    whole = alarms(EVERY[name](), values)
    assert whole
    for cut in (57, 130, 250):
        first, second = EVERY[name](), EVERY[name]()
        found = alarms(first, values[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        before = json.dumps(second.state_dict())
        assert found + alarms(second, values[cut:]) == whole
        assert json.dumps(first.state_dict()) == before, "the state is shared between two detectors"


@pytest.mark.parametrize("name", EVERY)
def test_reset_forgets_everything(name: str) -> None:
    values = [value + 8.0 * (step > 200) for step, value in enumerate(noise(300, 7))]
    detector = EVERY[name]()
    first = alarms(detector, values)
    detector.reset()
    assert alarms(detector, values) == first


@pytest.mark.parametrize("name", ["page_hinkley", "adwin", "kswin"])
def test_the_unit_of_the_signal_does_not_matter(name: str) -> None:
    values = noise(400, 9)
    values[300:] = [value + 6.0 for value in values[300:]]
    assert alarms(CHANGES[name](), [value / 1024 for value in values]) == alarms(CHANGES[name](), values)


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_is_reported_during_the_cool_down(name: str) -> None:
    detector = CHANGES[name]()
    detector.cool_down = 150
    detector.reset()
    values = [value + 10.0 * (step // 30 % 2) for step, value in enumerate(noise(400, 2))]
    steps = [-1] + [found.step for found in alarms(detector, values)]
    assert all(later - earlier > 150 for earlier, later in pairwise(steps))


@pytest.mark.parametrize("name", EVERY)
def test_values_that_are_not_finite_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="value 1 is nan, it must be finite"):
        alarms(EVERY[name](), [1.0, math.nan])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PageHinkley(mode="sideways"), "page_hinkley: mode is 'sideways', it must be one of up, down, both"),
        (lambda: PageHinkley(threshold=0), "page_hinkley: threshold is 0, it must be more than 0"),
        (lambda: PageHinkley(standardise=5), "standardise is 5, it must be 0 or at least 10"),
        (lambda: PageHinkley(cool_down=-1), "cool_down is -1, it must be at least 0"),
        (lambda: WindowDetector(window=1), "window: window is 1, it must be more than 1"),
        (lambda: LossPlateau(window=1), "loss_plateau: window is 1, it must be more than 1"),
        (lambda: KSWIN(alpha=2.0), "kswin: Alpha must be between 0 and 1"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(make: Callable[[], Detector], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
