from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import perdure
from perdure.errors import DataError, PerdureWarning, StorageError, UsageError
from perdure.experiments.build import prepare
from perdure.experiments.config import Experiment
from perdure.experiments.folders import read_groups, read_runs
from perdure.experiments.run import resume, run
from perdure.results import Results

SHORT = {
    "methods": [{"name": "replay", "capacity": 60}],
    "train": {"epochs": 1},
    "model": {"name": "mlp", "hidden": [16]},
}


def make(**changes: Any) -> Experiment:
    return Experiment.from_mapping(SHORT | changes)


def without_costs(results: Results) -> dict[str, Any]:
    costs = ("seconds", "peak_memory_bytes")
    return {key: value for key, value in results.to_dict().items() if key not in costs}


def stop_at(task: int, step: int = 0) -> Any:
    """A listener that is interrupted like a person's Ctrl-C."""

    def listen(event: dict[str, Any]) -> None:
        if event.get("task", -1) == task and (event["event"] == "task_begin" or event.get("step", -1) >= step > 0):
            raise KeyboardInterrupt

    return listen


def test_a_run_is_the_few_lines_of_python_that_it_stands_for() -> None:
    torch.manual_seed(5)  # a run does not depend on it
    (ours,) = run(make(seeds=[3], train={"epochs": 2, "optimizer": "sgd", "lr": 0.1, "batch_size": 16}))
    learner = perdure.Learner(
        perdure.models.MLP(64, [16], 10, seed=3),
        partial(torch.optim.SGD, lr=0.1, weight_decay=0.0),
        [perdure.methods.Replay(capacity=60)],
        seed=3,
    )
    theirs = learner.fit(perdure.benchmarks.split_digits(seed=3), epochs=2, batch_size=16)
    assert ours.to_dict()["matrix"] == theirs.to_dict()["matrix"]
    assert ours.seed == 3


def test_the_train_section_reaches_optimizer_and_learner() -> None:
    train = {
        "optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "lr": 0.5, "clip_norm": 2.0, "clip_value": 0.5,
        "micro_batches": 2, "active_classes": "seen", "steps": 7, "evaluate_every": 3, "drop_last": True,
        "reset_optimizer": True,
    }  # fmt: skip
    ready = prepare(make(train=train), 0)
    group = next(iter(ready.learner.optimizers.groups()))
    assert (group["momentum"], group["weight_decay"], group["lr"]) == (0.9, 0.01, 0.5)
    assert (ready.learner.clip_norm, ready.learner.clip_value, ready.learner.micro_batches) == (2.0, 0.5, 2)
    assert ready.learner.classes.active == "seen"
    assert ready.fit_options == {
        "epochs": 20, "steps": 7, "batch_size": 32, "drop_last": True, "evaluate_every": 3, "checkpoint_every": None,
        "eval_future": True, "reset_optimizer": True, "prequential": None,
    }  # fmt: skip


def test_every_optimizer_is_one_of_torch_that_trains() -> None:
    from perdure.experiments.presets import DEFAULT_RATES

    for name in DEFAULT_RATES:
        ready = prepare(make(train={"optimizer": name, "steps": 1}), 0)
        before = ready.learner.parameters.theta.clone()
        ready.learner.fit_task(ready.stream[0], steps=1)
        assert not torch.equal(before, ready.learner.parameters.theta)


def test_the_folder_of_one_seed_is_complete_and_runs_again_to_the_same_result(tmp_path: Path) -> None:
    (first,) = run(make(), tmp_path / "a")
    found = {path.name for path in (tmp_path / "a").iterdir()}
    assert found == {"config.yaml", "results.json", "log.jsonl", "checkpoint"}
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert (config["device"], config["threads"]) == ("cuda" if torch.cuda.is_available() else "cpu", 1)
    (second,) = run(Experiment.from_mapping(config), tmp_path / "b")
    assert without_costs(first) == without_costs(second)
    assert without_costs(Results.load(tmp_path / "a")) == without_costs(first)


def test_several_seeds_have_a_folder_each_and_a_summary(tmp_path: Path) -> None:
    runs = run(make(seeds=2), tmp_path / "a")
    (alone,) = run(make(seeds=[1]))
    assert without_costs(runs[1]) == without_costs(alone)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"config.yaml", "results.json", "seed-0", "seed-1"}
    assert yaml.safe_load((tmp_path / "a" / "seed-1" / "config.yaml").read_text())["seeds"] == [1]
    summary = json.loads((tmp_path / "a" / "results.json").read_text())
    values = [results.metrics()["final_average_accuracy"] for results in runs]
    assert None not in values
    assert summary["mean"]["final_average_accuracy"] == pytest.approx(sum(v for v in values if v is not None) / 2)
    assert [entry["seed"] for entry in summary["runs"]] == [0, 1]
    assert summary["mean"].keys() == summary["std"].keys() == summary["ci95"].keys() == runs[0].metrics().keys()


def files_without_costs(folder: Path) -> dict[str, Any]:
    """Every configuration and result of one seed, by its place; checkpoints and logs by their names."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        place = str(path.relative_to(folder))
        if path.name == "config.yaml":
            found[place] = path.read_text()
        elif path.name == "results.json" and path.parent != folder:
            found[place] = without_costs(Results.load(path.parent))
        else:
            found[place] = None
    return found


def test_seeds_in_processes_are_the_seeds_one_after_the_other(tmp_path: Path) -> None:
    experiment = make(seeds=3)
    events: list[dict[str, Any]] = []
    alone = run(experiment, tmp_path / "one")
    spread = run(experiment, tmp_path / "two", jobs=2, on_event=events.append)
    assert [without_costs(r) for r in spread] == [without_costs(r) for r in alone]
    assert [without_costs(r) for r in run(experiment, jobs=2)] == [without_costs(r) for r in alone]
    assert files_without_costs(tmp_path / "two") == files_without_costs(tmp_path / "one")
    assert sorted(event["seed"] for event in events) == [0, 1, 2]
    assert [event["done"] for event in events] == [1, 2, 3]

    shutil.rmtree(tmp_path / "two" / "seed-1")
    for file in ("results.json", "seed-2/results.json"):  # its checkpoint is still there
        (tmp_path / "two" / file).unlink()
    events.clear()
    resumed = resume(tmp_path / "two", jobs=2, on_event=events.append)
    assert [without_costs(r) for r in resumed] == [without_costs(r) for r in alone]
    assert sorted(event["seed"] for event in events) == [1, 2], "the finished seed is read, not run"
    assert files_without_costs(tmp_path / "two") == files_without_costs(tmp_path / "one")


def test_what_training_in_a_process_warns_of_is_heard() -> None:
    stiff = make(
        seeds=2,
        scenario="domain",
        methods=[{"name": "ewc", "strength": 1e4}],
        train={"optimizer": "sgd", "lr": 0.1, "steps": 2},
    )
    with pytest.warns(PerdureWarning, match="gradient steps on the penalty diverge"):
        alone = run(stiff)
    with pytest.warns(PerdureWarning, match="gradient steps on the penalty diverge"):
        spread = run(stiff, jobs=2)
    assert [without_costs(r) for r in spread] == [without_costs(r) for r in alone]


@pytest.mark.filterwarnings("ignore:.*stopped before its first checkpoint; starting over")
@pytest.mark.parametrize(("task", "step"), [(0, 0), (2, 0), (1, 3), (4, 0)])
def test_a_run_that_was_stopped_goes_on_to_the_same_result(tmp_path: Path, task: int, step: int) -> None:
    experiment = make(seeds=2, train={"epochs": 1, "checkpoint_every": 2})
    whole = run(experiment)
    stop = stop_at(task, step)

    def second_seed(event: dict[str, Any]) -> None:
        if event["seed"] == 1:
            stop(event)

    if step:  # events of single steps come a few a second; stop where one is certain to come
        import perdure.fitting

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(perdure.fitting, "_PROGRESS_SECONDS", -1.0)
            with pytest.raises(KeyboardInterrupt):
                run(experiment, tmp_path / "a", on_event=second_seed)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(experiment, tmp_path / "a", on_event=second_seed)
    assert not (tmp_path / "a" / "results.json").exists()
    seeds_run: list[int] = []
    resumed = resume(tmp_path / "a", on_event=lambda event: seeds_run.append(event["seed"]))
    assert [without_costs(results) for results in resumed] == [without_costs(results) for results in whole]
    assert set(seeds_run) == {1}  # the finished seed is read, not run
    assert len(read_runs(tmp_path / "a")) == 2


def test_resuming_a_finished_run_reads_it(tmp_path: Path) -> None:
    runs = run(make(), tmp_path / "a")
    before = (tmp_path / "a" / "results.json").read_bytes()
    assert [without_costs(r) for r in resume(tmp_path / "a")] == [without_costs(r) for r in runs]
    assert (tmp_path / "a" / "results.json").read_bytes() == before


def test_what_is_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no run: it has no config\.yaml"):
        resume(tmp_path)
    with pytest.raises(UsageError, match="holds no run"):
        resume(tmp_path / "missing")


def test_an_error_before_the_first_checkpoint_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(event: dict[str, Any]) -> None:
        raise DataError("bad row")

    with pytest.raises(DataError, match="bad row"):
        run(make(seeds=2), tmp_path / "new" / "a", on_event=fail)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    with pytest.raises(DataError, match="bad row"):
        run(make(), tmp_path / "old", on_event=fail)
    assert list((tmp_path / "old").iterdir()) == []


def test_an_error_after_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    def fail(event: dict[str, Any]) -> None:
        if event.get("task") == 1:
            raise StorageError("disk full")

    with pytest.raises(StorageError, match="disk full"):
        run(make(), tmp_path / "a", on_event=fail)
    assert [without_costs(r) for r in resume(tmp_path / "a")] == [without_costs(r) for r in run(make())]


def test_nothing_is_written_for_what_cannot_work(tmp_path: Path) -> None:
    for wrong in (
        make(scenario="clas"),
        make(stream={"tasks": 7}),
        make(model="small_cnn", stream={"tasks": 5}, methods=["gem", "agem"]),
        make(device="abacus"),
    ):
        with pytest.raises(UsageError):
            run(wrong, tmp_path / "a")
    with pytest.raises(DataError, match="perdure data get mnist"):
        run(make(benchmark="split_mnist", data_root=str(tmp_path / "none")), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        run(make(), tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        run(make(), tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_overwriting_replaces_the_run_and_nothing_else(tmp_path: Path) -> None:
    run(make(seeds=2), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"--resume .* --overwrite"):
        run(make(), tmp_path)
    run(make(seeds=[7]), tmp_path, overwrite=True)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"config.yaml", "results.json", "log.jsonl", "checkpoint", "notes.txt"}
    assert read_runs(tmp_path)[0].seed == 7


def test_a_run_leaves_the_random_state_and_the_threads_of_the_process_alone() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    run(make(threads=2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_runs_are_grouped_by_method_and_told_apart_by_folder(tmp_path: Path) -> None:
    run(make(seeds=[0]), tmp_path / "a")
    run(make(seeds=[1]), tmp_path / "b")
    run(make(seeds=[1], methods=[{"name": "replay", "capacity": 10}]), tmp_path / "small")
    run(make(seeds=[1], methods=[]), tmp_path / "none")
    groups, folders = read_groups([tmp_path / name for name in ("a", "b", "small", "none")])
    assert folders == {"replay": tmp_path / "a", "replay (small)": tmp_path / "small", "finetune": tmp_path / "none"}
    assert {label: [r.seed for r in runs] for label, runs in groups.items()} == {
        "replay": [0, 1], "replay (small)": [1], "finetune": [1]
    }  # fmt: skip


def test_an_unfinished_run_has_no_results_to_read(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(make(), tmp_path / "a", on_event=stop_at(1))
    with pytest.raises(UsageError, match="has not finished; continue it with 'perdure run --resume"):
        read_runs(tmp_path / "a")
    with pytest.raises(UsageError, match="is no folder"):
        read_runs(tmp_path / "missing")
