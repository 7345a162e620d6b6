from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from perdure.comparison import compare
from perdure.errors import PerdureError, UsageError
from perdure.experiments.compare import ComparisonFolder, experiments_of, run_all
from perdure.experiments.folders import read_groups, read_runs
from perdure.experiments.run import run

SHORT = {"train": {"epochs": 1}, "model": {"name": "mlp", "hidden": [16]}, "seeds": 2}
SETS = [["finetune"], ["lwf", "replay"]]


def without_costs(groups: dict[str, Any]) -> dict[str, Any]:
    costs = ("seconds", "peak_memory_bytes")
    return {
        label: [{k: v for k, v in run.to_dict().items() if k not in costs} for run in runs]
        for label, runs in groups.items()
    }


def test_an_override_applies_wherever_its_method_is() -> None:
    sets = [["finetune"], ["replay"], ["lwf", "replay"]]
    experiments = experiments_of(SHORT, sets, ["replay.capacity=50", "train.epochs=3", "lwf.strength=2"])
    assert list(experiments) == ["finetune", "replay", "lwf+replay"]
    assert experiments["replay"].methods[0].arguments["capacity"] == 50
    assert [part.arguments["strength"] for part in experiments["lwf+replay"].methods if part.name == "lwf"] == [2.0]
    assert {experiment.train.epochs for experiment in experiments.values()} == {3}


def test_an_override_that_fits_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown section 'relpay' .* did you mean 'replay'\?"):
        experiments_of(SHORT, [["replay"]], ["relpay.capacity=50"])
    with pytest.raises(UsageError, match="is not SECTION"):
        experiments_of(SHORT, [["replay"]], ["capacity=50"])
    with pytest.raises(UsageError, match="'lwf\\+replay' are listed twice"):
        experiments_of(SHORT, [["replay", "lwf"], ["lwf", "replay"]], [])


def test_results_do_not_depend_on_the_number_of_processes_or_on_each_other(tmp_path: Path) -> None:
    experiments = experiments_of(SHORT, SETS, [])
    seen: list[dict[str, Any]] = []
    alone = run_all(experiments, tmp_path / "one", jobs=1, on_event=seen.append)
    spread = run_all(experiments, tmp_path / "two", jobs=2)
    assert without_costs(alone) == without_costs(spread)
    assert list(spread) == ["finetune", "lwf+replay"]
    assert [results.seed for results in spread["finetune"]] == [0, 1]
    assert without_costs({"finetune": run(experiments["finetune"])})["finetune"] == without_costs(alone)["finetune"]
    assert [event["done"] for event in seen] == [1, 2, 3, 4]
    assert seen[-1]["total"] == 4
    assert len(read_runs(tmp_path / "two" / "lwf+replay")) == 2


def test_an_error_in_a_process_is_the_error_of_the_whole(tmp_path: Path) -> None:
    experiments = experiments_of(SHORT, [["finetune"]], ["train.lr=1e30", "train.epochs=3"])
    with pytest.raises(PerdureError):
        run_all(experiments, tmp_path, jobs=2)


def test_a_comparison_appears_as_a_whole_in_place_of_an_earlier_one(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "compare"
    for names in (["finetune"], ["replay"]):
        with ComparisonFolder(place) as folder:
            groups = run_all(experiments_of(SHORT, [names], []), folder.work)
            assert list(place.glob("*")) == [] or names == ["replay"]
            folder.publish(groups, compare(groups))
        assert list(read_groups([place])[0]) == names
    assert [path.name for path in place.parent.iterdir()] == ["compare"]


def test_a_comparison_that_fails_leaves_the_earlier_one_and_no_traces(tmp_path: Path) -> None:
    place = tmp_path / "compare"
    with ComparisonFolder(place) as folder:
        groups = run_all(experiments_of(SHORT, [["finetune"]], []), folder.work)
        folder.publish(groups, compare(groups))
    with suppress(KeyboardInterrupt), ComparisonFolder(place) as folder:
        (folder.work / "half").write_text("written")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["compare"]
    assert list(read_groups([place])[0]) == ["finetune"]
    with suppress(KeyboardInterrupt), ComparisonFolder(tmp_path / "new" / "one"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["compare"]


def test_what_a_killed_comparison_left_is_removed_and_what_a_running_one_writes_is_not(tmp_path: Path) -> None:
    (tmp_path / ".compare.999999999.partial").mkdir()
    (tmp_path / f".compare.{os.getppid()}.partial").mkdir()
    with ComparisonFolder(tmp_path / "compare"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [f".compare.{os.getppid()}.partial"]


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no comparison"):
        ComparisonFolder(tmp_path)
