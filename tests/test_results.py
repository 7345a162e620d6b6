"""Results on disk and in print, and what several of them together allow to conclude."""

from __future__ import annotations

import itertools
import json
import math
import sys
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure import metrics
from perdure.comparison import human_bytes, human_seconds, sign_flip_test, t_quantile
from perdure.errors import CheckpointError, MissingExtraError, StorageError, UsageError
from perdure.files import write_atomically
from perdure.results import Results, compare, summarise

NAN = math.nan
OWN = np.array([[0.9, NAN, NAN], [0.5, 0.8, NAN], [0.6, 0.85, 0.7]])
RESTRICTED = np.array([[0.9, 0.5, 0.5], [0.8, 0.9, 0.5], [0.9, 0.9, 0.9]])


def class_incremental(seed: int = 0, shift: float = 0.0, **changes: object) -> Results:
    own = OWN + shift
    fields: dict[str, object] = {
        "scenario": "class",
        "task_names": ["0/1", "2/3", "4/5"],
        "matrix": own,
        "untrained": np.full(3, NAN),
        "benchmark": "split_digits",
        "methods": ["ewc", "replay"],
        "seed": seed,
        "test_sizes": np.array([100, 300, 600]),
        "class_incremental": {"matrix": own, "untrained": np.full(3, NAN)},
        "task_restricted": {"matrix": RESTRICTED, "untrained": np.full(3, 0.5)},
        "seconds": {"train": 1.5, "evaluate": 0.25, "total": 1.75},
        "state_bytes": {"replay": 14_400, "ewc": 717_000},
        "peak_memory_bytes": 231_000_000,
        "passes": {"steps": 10, "forward_rows": 320, "backward_rows": 320},
        "history": [
            {"task": 1, "step": 5, "accuracies": [0.3, 0.4, NAN]},
            {"task": 2, "step": 5, "accuracies": [0.4, 0.4, 0.4]},
        ],
        "versions": {"perdure": "0.1.0", "torch": "2.5.0"},
    }
    return Results(**{**fields, **changes})  # type: ignore[arg-type]


def test_metrics_are_those_of_the_scenarios_own_view():
    values = class_incremental().metrics()
    assert values["final_average_accuracy"] == metrics.average_accuracy(OWN)
    by_sample = metrics.average_incremental_accuracy(OWN, test_sizes=[100, 300, 600])
    assert values["average_incremental_accuracy"] == by_sample
    assert values["forgetting"] == metrics.forgetting(OWN)
    assert values["task_restricted_accuracy"] == pytest.approx(0.9)
    assert values["task_inference_accuracy"] == pytest.approx(2.15 / 3 / 0.9)
    assert values["minimum_accuracy"] == pytest.approx((0.3 + 0.4) / 2)
    assert values["stability_plasticity"] == metrics.harmonic_mean(metrics.stability(OWN), metrics.plasticity(OWN))
    per_task = class_incremental(scenario="task").metrics()["average_incremental_accuracy"]
    assert per_task == metrics.average_incremental_accuracy(OWN)


def test_forward_transfer_does_not_exist_class_incrementally_even_if_numbers_stand_there():
    full = class_incremental(matrix=RESTRICTED, untrained=np.zeros(3))
    assert full.metrics()["forward_transfer"] is None
    assert full.reasons()["forward_transfer"] == (
        "forward transfer needs an accuracy before training; class-incremental columns do not exist then"
    )
    with_tasks = class_incremental(scenario="task", matrix=RESTRICTED, untrained=np.zeros(3))
    assert with_tasks.metrics()["forward_transfer"] == 0.5


@pytest.mark.parametrize("changes", [{}, {"matrix": np.full((3, 3), NAN)}, {"history": []}, {"task_restricted": None}])
def test_each_metric_has_a_number_or_a_reason(changes):
    results = class_incremental(**changes)
    values, reasons = results.metrics(), results.reasons()
    assert set(values) == set(metrics.DESCRIPTIONS)
    assert {name for name, value in values.items() if value is None} == set(reasons)
    assert not any(isinstance(value, float) and math.isnan(value) for value in values.values())
    assert all(len(why.split()) > 4 and "\n" not in why for why in reasons.values())


def test_a_hole_in_the_matrix_is_named_and_never_averaged_over():
    holed = OWN.copy()
    holed[2, 0] = NAN
    results = class_incremental(matrix=holed)
    assert results.metrics()["final_average_accuracy"] is None
    assert "task 0 after task 2" in results.reasons()["final_average_accuracy"]
    assert results.metrics()["learning_accuracy"] == metrics.learning_accuracy(OWN)


def test_a_single_task():
    one = Results("task", ["a"], np.array([[0.5]]), np.array([0.25]))
    assert one.metrics()["forgetting"] == one.metrics()["backward_transfer"] == 0.0
    assert one.reasons()["forward_transfer"] == "forward transfer needs a second task"


def test_shared_classes_have_no_task_to_infer():
    shared = class_incremental(scenario="domain")
    assert shared.metrics()["task_inference_accuracy"] is None
    assert "share" in shared.reasons()["task_inference_accuracy"]


def test_measured_extras_join_the_metrics():
    results = class_incremental(extra={"calibration_error": 0.125, "old_to_new_bias": NAN})
    assert results.metrics()["calibration_error"] == 0.125
    assert results.metrics()["old_to_new_bias"] is None
    assert "not measured" in results.reasons()["old_to_new_bias"]
    assert "calibration error" in str(results)


@given(st.lists(st.floats(0, 1) | st.just(NAN), min_size=12, max_size=12), st.integers(0, 2**63))
def test_saved_results_come_back_bit_for_bit(numbers, seed):
    matrix, untrained = np.array(numbers[:9]).reshape(3, 3), np.array(numbers[9:])
    results = class_incremental(matrix=matrix, untrained=untrained, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        loaded = Results.load(results.save(folder).parent)
    assert loaded.matrix.tobytes() == results.matrix.tobytes()
    assert loaded.untrained.tobytes() == results.untrained.tobytes()
    assert loaded == results
    assert loaded.metrics() == results.metrics()


def test_the_file_is_plain_json_with_null_for_what_is_missing(tmp_path):
    path = class_incremental().save(tmp_path / "new" / "folder")
    assert path.name == "results.json"
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert data["matrix"][0] == [0.9, None, None]
    assert data["untrained"] == [None] * 3
    assert data["metrics"]["forward_transfer"] is None
    assert data["reasons"]["forward_transfer"]
    assert data["task_restricted"]["matrix"] == RESTRICTED.tolist()
    assert data["class_incremental"]["matrix"][1] == [0.5, 0.8, None]
    assert data["history"][0]["accuracies"] == [0.3, 0.4, None]
    wanted = ("format", "seconds", "state_bytes", "seed", "versions")
    assert [data[key] for key in wanted] == [
        1,
        {"train": 1.5, "evaluate": 0.25, "total": 1.75},
        {"replay": 14_400, "ewc": 717_000},
        0,
        {"perdure": "0.1.0", "torch": "2.5.0"},
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not valid JSON"),
        ('{"format": 1, "seed": NaN}', "not valid JSON"),
        ("\udcff", "not valid JSON"),
        ("[]", "format None"),
        ('{"format": 2}', "format 2, but this version of perdure reads 1"),
        ('{"format": 1}', "damaged"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_in_one_sentence(tmp_path, content, sentence):
    file = tmp_path / "results.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=sentence) as caught:
        Results.load(tmp_path)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_whose_parts_do_not_fit_is_damaged(tmp_path):
    data = class_incremental().to_dict()
    data["untrained"] = [0.5]
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="untrained"):
        Results.load(tmp_path)


def test_no_file_is_another_error(tmp_path):
    with pytest.raises(StorageError, match="No such file") as caught:
        Results.load(tmp_path / "results.json")
    assert not isinstance(caught.value, CheckpointError)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.txt", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_atomically(tmp_path / "a.txt", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.txt", b"old")]


@pytest.mark.parametrize(
    "changes",
    [
        {"scenario": "klass"},
        {"matrix": np.zeros((2, 2))},
        {"untrained": np.zeros(2)},
        {"matrix": np.full((3, 3), np.inf)},
        {"history": [{"task": 0, "step": 1, "accuracies": [0.5]}]},
    ],
)
def test_results_that_cannot_be_are_refused(changes):
    with pytest.raises(UsageError):
        class_incremental(**changes)


def test_the_print_shows_every_number_under_its_name():
    results = class_incremental()
    lines = str(results).splitlines()
    for name, value in results.metrics().items():
        (line,) = [line for line in lines if line.startswith(metrics.DESCRIPTIONS[name].label + "  ")]
        assert (f" {100 * value:.2f} %" if value is not None else results.reasons()[name]) in line
    rows = {line.split("  ")[0]: line.split()[2:] for line in lines if line.startswith("after ")}
    assert rows["after 2/3"] == ["50.00", "80.00", "-"]
    assert not any("nan" in line for line in lines)
    assert "buffer" not in str(results)
    assert "731 kB" in str(results)


def test_a_data_frame_has_a_row_for_each_accuracy():
    frame = class_incremental().to_pandas()
    assert len(frame) == 4 * 3
    cell = frame[(frame.after == 2) & (frame.task == 1)].iloc[0]
    assert (cell.accuracy, cell.class_incremental, cell.task_restricted) == (0.85, 0.85, 0.9)
    assert cell.method == "ewc+replay"
    assert frame[frame.after == -1].task_restricted.tolist() == [0.5] * 3


def test_a_missing_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"perdure\[pandas\]"):
        class_incremental().to_pandas()


# Standard tables of Student's t: the two-sided 95 % and 99 % points.
@pytest.mark.parametrize(
    ("degrees", "t95", "t99"),
    [
        (1, 12.706, 63.657),
        (2, 4.303, 9.925),
        (3, 3.182, 5.841),
        (4, 2.776, 4.604),
        (5, 2.571, 4.032),
        (9, 2.262, 3.250),
        (10, 2.228, 3.169),
        (29, 2.045, 2.756),
        (30, 2.042, 2.750),
        (120, 1.980, 2.617),
    ],
)
def test_t_quantiles_are_those_of_the_published_tables(degrees, t95, t99):
    assert t_quantile(0.975, degrees) == pytest.approx(t95, abs=6e-4)
    assert t_quantile(0.995, degrees) == pytest.approx(t99, abs=6e-4)
    assert t_quantile(0.025, degrees) == -t_quantile(0.975, degrees)
    assert t_quantile(0.5, degrees) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 0.999])
def test_t_quantiles_with_a_closed_form(p):
    assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-12)
    assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-12)


def test_a_summary_is_mean_sample_deviation_and_students_interval():
    runs = [class_incremental(seed, shift) for seed, shift in enumerate([0.0, 0.01, 0.05])]
    found = [run.metrics()["final_average_accuracy"] for run in runs]
    summary = summarise(runs)
    assert set(summary) == {"mean", "std", "ci95"}
    assert all(list(part) == list(runs[0].metrics()) for part in summary.values())
    std = math.sqrt(sum((x - sum(found) / 3) ** 2 for x in found) / 2)
    assert summary["mean"]["final_average_accuracy"] == pytest.approx(sum(found) / 3)
    assert summary["std"]["final_average_accuracy"] == pytest.approx(std)
    assert summary["ci95"]["final_average_accuracy"] == pytest.approx(4.302653 * std / math.sqrt(3), rel=1e-6)


def test_one_seed_has_no_spread_and_a_gap_in_one_seed_is_a_gap():
    one = summarise([class_incremental()])
    assert one["mean"]["forgetting"] == class_incremental().metrics()["forgetting"]
    assert set(one["std"].values()) == set(one["ci95"].values()) == {None}
    gap = summarise([class_incremental(0), class_incremental(1, history=[])])
    assert gap["mean"]["minimum_accuracy"] is gap["std"]["minimum_accuracy"] is None
    assert gap["mean"]["forgetting"] is not None


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9))
def test_the_permutation_test_counts_every_signing(differences):
    scaled = [d / 10 for d in differences]
    signings = list(itertools.product([1, -1], repeat=len(differences)))
    extreme = sum(
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= abs(sum(differences)) for signs in signings
    )
    assert sign_flip_test(scaled) == extreme / len(signings)


def test_the_permutation_test_of_many_seeds_samples_and_repeats_itself():
    d = np.random.default_rng(1).normal(0.3, 1.0, size=24)
    exact = np.mean(np.abs(_all_sums(d)) >= abs(d.sum()) - 1e-9)
    assert sign_flip_test(d, draws=20_000) == pytest.approx(exact, abs=0.015)
    assert sign_flip_test(d, draws=500) == sign_flip_test(d, draws=500)
    assert sign_flip_test(np.ones(40), draws=500) == 1 / 501


def _all_sums(d: np.ndarray) -> np.ndarray:
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def seeds(count: int, lift: float) -> list[Results]:
    rng = np.random.default_rng(round(1000 * lift))
    return [class_incremental(seed, lift + 0.01 * rng.random()) for seed in range(count)]


@pytest.mark.parametrize(("count", "smallest"), [(1, "1"), (2, "0.5"), (3, "0.25"), (5, "0.0625")])
def test_too_few_seeds_are_said_to_be_too_few(count, smallest):
    comparison = compare({"ewc": seeds(count, 0.0), "replay": seeds(count, 0.2), "derpp": seeds(count, 0.1)})
    (note,) = comparison.notes
    assert f"is {smallest}, so no difference can reach p < .05" in note
    assert all(d.p == float(smallest) for d in comparison.differences)


def test_enough_seeds_are_tested_in_pairs_and_corrected_for_their_number():
    comparison = compare({"ewc": seeds(8, 0.0), "replay": seeds(8, 0.2), "same": seeds(8, 0.2)})
    by_pair = {(d.first, d.second): d for d in comparison.differences}
    assert by_pair["ewc", "replay"].p == 2 / 2**8
    assert by_pair["ewc", "replay"].adjusted == 3 * 2 / 2**8
    assert by_pair["ewc", "replay"].mean == pytest.approx(-0.2, abs=0.01)
    assert by_pair["replay", "same"].p == by_pair["replay", "same"].adjusted == 1.0
    assert [", significant" in note for note in comparison.notes] == [True, True, False]


def test_runs_are_paired_by_seed_whatever_their_order():
    a, b = seeds(7, 0.0), seeds(7, 0.2)
    straight, mixed = compare({"a": a, "b": b}), compare({"a": a[::-1], "b": b[3:] + b[:3]})
    assert mixed.differences[0].mean == pytest.approx(straight.differences[0].mean)
    assert mixed.differences[0].p == straight.differences[0].p
    assert compare({"a": a[:4], "b": b[2:]}).differences[0].seeds == 2


def test_the_comparison_prints_mean_and_deviation_of_every_column():
    groups = {"ewc": seeds(3, 0.0), "replay": seeds(3, 0.2)}
    comparison = compare(groups)
    text = str(comparison)
    for label, runs in groups.items():
        (row,) = [line for line in text.splitlines() if line.startswith(label)]
        summary = summarise(runs)
        for name in comparison.columns:
            shown = f"{100 * summary['mean'][name]:.1f} ± {100 * summary['std'][name]:.1f}"
            assert shown.replace("-0.0 ", "0.0 ") in row
        assert "1.50 s" in row
        assert "731 kB" in row
    assert "forward_transfer" not in comparison.columns
    assert "columns do not exist then" in text
    assert json.loads(json.dumps(comparison.to_dict()))["differences"][0]["p"] == 0.25


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ({}, "at least one run"),
        ({"ewc": []}, "ewc has none"),
        ({"a": [class_incremental()], "b": [class_incremental(benchmark="other")]}, "different benchmarks"),
        ({"a": [class_incremental()], "b": [class_incremental(scenario="task")]}, "different scenarios"),
        ({"a": [class_incremental(), class_incremental()]}, "same seed"),
    ],
)
def test_what_does_not_belong_together_is_not_compared(groups, sentence):
    with pytest.raises(UsageError, match=sentence):
        compare(groups)
    with pytest.raises(UsageError, match="unknown metric"):
        compare({"a": [class_incremental()]}, metric="accuracy")


def test_costs_in_words():
    assert [human_bytes(n) for n in (None, 0, 999, 1000, 14_400, 99_960, 2_500_000_000)] == [
        "-", "0 B", "999 B", "1.0 kB", "14.4 kB", "100 kB", "2.5 GB"
    ]  # fmt: skip
    assert [human_seconds(s) for s in (None, 0.5, 12.34, 59.99, 3599.7, 7_800)] == [
        "-", "0.50 s", "12.3 s", "1 min 00 s", "1 h 00 min", "2 h 10 min"
    ]  # fmt: skip
