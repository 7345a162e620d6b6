"""The shipped protocols say what the literature says, and verdicts follow the rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perdure.errors import UnknownNameError, UsageError
from perdure.experiments import protocol as module
from perdure.experiments.protocol import Protocol, band, choose_rows, numpy_class_order, protocol_names, protocol_of

# Row, and the band of a mean of three seeds and of one seed, as they were written down before any run of perdure.
BANDS = {
    "der-split-mnist": """
        sgd 18.6 20.6 18.6 20.6
        er-200 77.3 83.5 75.5 85.4
        er-500 83.0 89.2 81.2 91.1
        er-5120 91.3 95.5 90.0 96.8
        gem-200 77.6 82.6 76.1 84.1
        gem-500 83.8 88.2 82.5 89.5
        gem-5120 93.7 96.5 92.8 97.4
        agem-200 38.7 52.7 34.6 56.9
        agem-500 37.0 56.3 31.3 62.0
        agem-5120 43.6 64.9 37.2 71.3
        der-200 81.9 87.2 80.2 88.9
        der-500 88.6 92.5 87.4 93.6
        der-5120 93.9 95.9 93.4 96.4
        derpp-200 83.3 87.9 81.9 89.3
        derpp-500 88.5 93.5 87.1 94.9
        derpp-5120 93.3 97.3 92.2 98.4
        icarl-200 70.0 73.5 70.0 73.5
        icarl-500 72.5 76.5 72.5 76.5
        icarl-5120 79.5 83.5 79.5 83.5
        icarl-black-200 69.0 72.0 69.0 72.0
        icarl-black-500 68.6 71.6 68.6 71.6
        icarl-black-5120 69.1 72.1 69.1 72.1
        sgd-task 91.4 98.5 89.2 100.0
        er-200-task 96.9 98.9 96.9 98.9
        er-500-task 98.0 100.0 98.0 100.0
        er-5120-task 98.3 100.0 98.3 100.0
        gem-200-task 96.8 98.8 96.8 98.8
        gem-500-task 97.7 99.7 97.7 99.7
        gem-5120-task 98.4 100.0 98.4 100.0
        agem-200-task 97.6 99.6 97.6 99.6
        agem-500-task 97.9 99.9 97.9 99.9
        agem-5120-task 97.9 99.9 97.9 99.9
        der-200-task 97.8 99.8 97.8 99.8
        der-500-task 97.8 99.8 97.8 99.8
        der-5120-task 98.3 100.0 98.3 100.0
        derpp-200-task 97.8 99.8 97.8 99.8
        derpp-500-task 97.9 99.9 97.9 99.9
        derpp-5120-task 98.5 100.0 98.5 100.0
        icarl-black-200-task 97.3 99.3 97.3 99.3
        icarl-black-500-task 97.3 99.3 97.3 99.3
        icarl-black-5120-task 97.3 99.3 97.3 99.3
    """,
    "der-permuted-mnist": """
        sgd 36.9 44.5 34.6 46.8
        er-200 70.9 73.8 70.1 74.7
        er-500 79.2 82.0 78.3 82.9
        er-5120 88.9 90.9 88.9 90.9
        gem-200 64.9 69.0 63.7 70.2
        gem-500 75.9 77.9 75.5 78.2
        gem-5120 85.9 89.0 84.9 89.9
        agem-200 59.8 73.0 55.9 76.9
        agem-500 65.5 69.7 64.2 70.9
        agem-5120 71.5 75.2 70.4 76.3
        der-200 80.0 83.5 78.9 84.5
        der-500 86.3 88.3 86.1 88.5
        der-5120 90.7 92.7 90.7 92.7
        derpp-200 82.6 84.6 82.0 85.1
        derpp-500 87.2 89.2 87.2 89.2
        derpp-5120 91.3 93.3 91.3 93.3
    """,
    "vandeven-split-mnist": """
        task-none 77.5 91.2 73.0 95.7
        task-joint 98.2 100.0 98.2 100.0
        task-ewc 97.6 100.0 97.3 100.0
        task-si 97.7 100.0 97.7 100.0
        task-lwf 98.1 100.0 98.1 100.0
        task-er 97.5 100.0 97.5 100.0
        task-dgr 98.0 100.0 98.0 100.0
        task-agem 97.1 100.0 97.1 100.0
        class-none 18.4 21.4 18.4 21.4
        class-joint 96.7 99.7 96.7 99.7
        class-ewc 17.0 24.2 14.7 26.6
        class-si 17.3 25.1 14.7 27.7
        class-lwf 19.7 24.1 18.2 25.6
        class-icarl 91.0 94.0 91.0 94.0
        class-icarl-herding 91.0 94.0 91.0 94.0
        class-er 87.3 90.3 86.5 91.1
        class-dgr 88.7 92.0 87.6 93.1
        class-agem 39.9 90.3 23.4 100.0
    """,
}


@pytest.mark.parametrize("name", BANDS)
def test_the_bands_are_those_that_were_fixed_beforehand(name: str) -> None:
    protocol = protocol_of(name)
    lines = [line.split() for line in BANDS[name].strip().splitlines()]
    assert sorted(line[0] for line in lines) == sorted(protocol.rows)
    for row, *bounds in lines:
        for count, (low, high) in ((3, bounds[:2]), (1, bounds[2:])):
            verdict = protocol.judge(protocol.rows[row], dict.fromkeys(range(count), 50.0))
            # The last digit of a written bound may be rounded from a rounded standard deviation.
            assert verdict.low == pytest.approx(float(low), abs=0.11), row
            assert verdict.high == pytest.approx(float(high), abs=0.11), row


def test_there_are_three_protocols_and_no_other_test_forgets_one() -> None:
    assert protocol_names() == sorted(BANDS)


@pytest.mark.parametrize("name", BANDS)
def test_every_run_is_a_complete_experiment_and_every_run_has_a_row(name: str) -> None:
    protocol = protocol_of(name)
    assert {row.run for row in protocol.rows.values()} == set(protocol.runs)
    for run in protocol.runs:
        experiment = protocol.experiment_of(run, protocol.first_seed)
        assert experiment.seeds == (protocol.first_seed,)
        assert (experiment.device, experiment.threads) == ("cpu", 1)
        assert experiment.train.eval_future is False
        assert experiment.train.active_classes == "all"
        assert [part.name for part in experiment.methods] == [entry["name"] for entry in protocol.runs[run]["methods"]]
    for check in protocol.checks:
        assert {check.better, check.than} <= set(protocol.rows)


def test_the_quirks_of_the_three_scenarios_code_are_on_by_name_and_off_by_default() -> None:
    protocol = protocol_of("vandeven-split-mnist")
    si = protocol.experiment_of("task-si", 2).methods[0].arguments
    assert (si["strength"], si["gradient"], si["clamp"]) == (20.0, "total", False)
    lwf = protocol.experiment_of("task-lwf", 2).methods[0].arguments
    assert (lwf["strength"], lwf["temperature"], lwf["rescale"], lwf["reduce"]) == (1.0, 2.0, False, "sum")
    assert protocol.experiment_of("class-lwf", 2).methods[0].arguments["columns"] == "all"
    ewc = protocol.experiment_of("class-ewc", 2).methods[0].arguments
    assert (ewc["strength"], ewc["fisher"], ewc["n_samples"]) == (1e9, "exact", None)
    er = protocol.experiment_of("class-er", 2).methods[0].arguments
    assert (er["capacity"], er["per_class"], er["weighting"]) == (None, 100, "1/t")
    icarl = protocol.experiment_of("class-icarl", 2).methods[0].arguments
    assert (icarl["per_class"], icarl["temperature"], icarl["reduce"]) == (100, 2.0, "sum")
    assert icarl["selection"] == "random"
    black = protocol_of("der-split-mnist").experiment_of("icarl-black-500", 0).methods[0].arguments
    assert (black["cast_exemplars"], black["normalise"]) == (True, False)
    from perdure.methods import AGEM, SI, ICaRL, LwF, Replay

    assert (ICaRL().cast_exemplars, ICaRL().normalise, ICaRL().temperature) == (False, True, 1.0)
    assert ICaRL().selection == "herding"

    assert (SI().gradient, SI().clamp, LwF().rescale, LwF().columns) == ("loss", True, True, "old")
    assert (Replay().per_class, Replay().weighting, AGEM().eps, AGEM().per_class) == (None, "pooled", 0.0, None)


@pytest.mark.parametrize("seed", [2, 3, 11])
def test_the_class_of_a_digit_is_numpys_permutation(seed: int) -> None:
    order = protocol_of("vandeven-split-mnist").experiment_of("task-none", seed).stream["class_order"]
    state = np.random.get_state()
    np.random.seed(seed)
    permutation = np.random.permutation(10)
    np.random.set_state(state)
    assert [order[permutation[digit]] for digit in range(10)] == list(range(10))


def test_seed_zero_has_the_natural_order_and_seed_three_the_one_written_down() -> None:
    assert numpy_class_order(0, 10) == list(range(10))
    assert numpy_class_order(3, 10) == [7, 2, 3, 8, 1, 0, 5, 6, 9, 4]


def test_a_band_has_two_sides_and_a_floor() -> None:
    assert band(50, 2.0, published_runs=10, seeds=3, floor=1.0) == pytest.approx((46.7085, 53.2915), abs=1e-3)
    assert band(50, 0.1, published_runs=10, seeds=3, floor=1.0) == (49.0, 51.0)
    assert band(99.5, 0.1, published_runs=10, seeds=3, floor=1.0) == (98.5, 100.0)
    protocol = protocol_of("der-split-mnist")
    row = protocol.rows["agem-200"]
    assert protocol.judge(row, {0: 48.8, 1: 52.7, 2: 44.5}).inside is True
    assert protocol.judge(row, {0: 68.2, 1: 68.2, 2: 68.2}).inside is False, "better than published is wrong too"
    assert protocol.judge(row, {0: 19.8, 1: 19.8, 2: 19.8}).inside is False


def test_five_seeds_with_a_heavy_tail_need_the_mean_of_three_and_a_median() -> None:
    protocol = protocol_of("vandeven-split-mnist")
    row = protocol.rows["task-ewc"]
    assert protocol.seeds_of(row) == [2, 3, 4, 5, 6]
    assert protocol.seeds_of(row, 3) == [2, 3, 4, 5, 6]
    assert (protocol.seeds_of(row, 1), protocol.seeds_of(row, 6)) == ([2], [2, 3, 4, 5, 6, 7])
    found = protocol.judge(row, dict(zip(range(2, 7), (99.6, 96.0, 99.1, 99.6, 99.8), strict=True)))
    assert found.inside is True
    assert (round(found.low, 1), found.high) == (97.6, 100.0)
    flat = protocol.judge(row, dict.fromkeys(range(2, 7), 98.0))
    assert flat.low < flat.ours < flat.high
    assert flat.inside is False, "the median is below 98.5"
    assert protocol.more_seeds(row, flat) == []


def test_three_seeds_that_miss_are_followed_by_three_more() -> None:
    protocol = protocol_of("der-permuted-mnist")
    row = protocol.rows["er-200"]
    three = protocol.judge(row, {0: 72.2, 1: 73.2, 2: 77.6})
    assert three.inside is False
    assert protocol.more_seeds(row, three) == [3, 4, 5]
    six = protocol.judge(row, {**three.values, 3: 72.0, 4: 72.0, 5: 72.0})
    assert (round(six.low, 1), round(six.high, 1)) == (70.3, 74.4)
    assert six.inside is True
    assert protocol.more_seeds(row, six) == []
    assert protocol.more_seeds(row, protocol.judge(row, {0: 72.2, 1: 73.2, 2: 72.6})) == []
    for other, bounds in (("gem-200", (61.8, 72.1)), ("agem-500", (64.2, 70.9))):
        found = protocol.judge(protocol.rows[other], dict.fromkeys(range(6), 67.0))
        assert (round(found.low, 1), round(found.high, 1)) == bounds


def test_rows_without_a_verdict() -> None:
    protocol = protocol_of("der-permuted-mnist")
    assert protocol.judge(protocol.rows["sgd"], {0: 90.0, 1: 90.0, 2: 90.0}).inside is None
    assert protocol.judge(protocol.rows["er-200"], {0: 90.0}).inside is None
    assert protocol.judge(protocol.rows["er-500"], {0: 90.0}).inside is False


def test_rows_by_name_and_pattern() -> None:
    protocols = [protocol_of("der-split-mnist"), protocol_of("vandeven-split-mnist")]
    assert choose_rows(protocols, ["er-200", "task-*"])["der-split-mnist"] == ["er-200"]
    assert len(choose_rows(protocols, ["task-*"])["vandeven-split-mnist"]) == 8
    assert len(choose_rows(protocols, [])["der-split-mnist"]) == 41
    with pytest.raises(UnknownNameError, match=r"unknown row 'derp-200'; did you mean 'derpp-200'\?"):
        choose_rows(protocols, ["derp-200"])
    with pytest.raises(UnknownNameError, match=r"unknown protocol 'der-split'; did you mean 'der-split-mnist'\?"):
        protocol_of("der-split")


def test_a_protocol_with_a_mistake_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (module.FOLDER / "der_split_mnist.yaml").read_text()
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    for name, old, new, sentence in (
        ("a", "published_runs: 10", "published_run: 10", "unknown key 'a.published_run'; did you mean"),
        (
            "b",
            "sgd: {published: 19.60, sd: 0.04,",
            "sgd: {published: 19.60,",
            "rows.sgd must have one of sd, sem and accept",
        ),
        ("c", "{run: sgd, metric", "{run: sgdd, metric", "rows.sgd-task.run is 'sgdd'"),
        ("d", "19.60, sd: 0.04, grade: B", "19.60, sd: 0.04, grade: D", "rows.sgd.grade is 'D'"),
    ):
        assert old in text
        (tmp_path / f"{name}.yaml").write_text(text.replace(old, new))
        with pytest.raises(UsageError, match=sentence):
            protocol_of(name)


def test_seeds_of_a_protocol_are_consecutive() -> None:
    protocol: Protocol = replace(protocol_of("der-split-mnist"), first_seed=4)
    row = protocol.rows["sgd"]
    assert (protocol.seeds_of(row), protocol.seeds_of(row, 1), protocol.seeds_of(row, 4)) == (
        [4, 5, 6],
        [4],
        [4, 5, 6, 7],
    )
