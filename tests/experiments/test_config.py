from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from perdure import registry
from perdure.errors import DataError, PerdureError, StorageError, UsageError
from perdure.experiments.build import prepare
from perdure.experiments.config import Experiment, read_yaml


def make(overrides: list[str] | None = None, **mapping: Any) -> Experiment:
    return Experiment.from_mapping(mapping, overrides or [])


@pytest.mark.parametrize("name", registry.benchmarks.names())
def test_every_benchmark_has_settings_of_its_own_without_data_on_the_disk(name: str) -> None:
    experiment = make(benchmark=name)
    assert experiment.benchmark == name
    assert experiment.train.lr is not None
    assert experiment.model.name in registry.models.names()
    assert (experiment.model.name == "slim_resnet18") == ("cifar" in name)
    assert experiment.scenario in ("task", "domain", "class")


def test_the_yaml_of_an_experiment_is_complete_and_gives_it_back() -> None:
    experiment = make(
        ["lwf.temperature=3", "train.lr=1e-2", "stream.class_order=[4,3,2,1,0,5,6,7,8,9]", "model.hidden=[20]"],
        benchmark="split-digits", methods=["lwf", {"name": "replay", "capacity": 50}], seeds=[4, 7], threads=2,
    )  # fmt: skip
    again = Experiment.from_mapping(yaml.safe_load(experiment.to_yaml()))
    assert again.to_mapping() == experiment.to_mapping()
    written = yaml.safe_load(experiment.to_yaml())
    assert written["methods"][0]["temperature"] == 3
    assert written["methods"][1]["ratio"] == 1.0  # a default, written out
    assert written["train"]["lr"] == 0.01
    assert written["stream"] == {"tasks": 5, "class_order": [4, 3, 2, 1, 0, 5, 6, 7, 8, 9]}
    assert written["model"]["hidden"] == [20]
    assert written["seeds"] == [4, 7]


def test_overrides_come_after_the_file_and_the_last_one_wins() -> None:
    experiment = make(["train.epochs=3", "train.epochs=4"], train={"epochs": 2, "batch_size": 16})
    assert (experiment.train.epochs, experiment.train.batch_size) == (4, 16)


def test_hyphens_and_underscores_are_the_same() -> None:
    experiment = make(["train.batch-size=8"], benchmark="split-mnist", methods=["replay"], model="small-cnn")
    assert (experiment.benchmark, experiment.train.batch_size, experiment.model.name) == ("split_mnist", 8, "small_cnn")


def test_the_learning_rate_follows_the_optimizer_unless_it_is_given() -> None:
    assert make(["train.optimizer=adam"]).train.lr == 1e-3
    assert make(["train.optimizer=sgd"]).train.lr == 0.05
    assert make([]).train.fused is True, "the preset's own optimizer is fused"
    assert make(["train.fused=false"]).train.fused is False
    assert make(["train.optimizer=rmsprop"]).train.fused is False, "torch has no fused one"
    assert make(["train.optimizer=sgd", "train.lr=0.02"]).train.lr == 0.02


def test_another_model_does_not_inherit_the_options_of_the_presets() -> None:
    assert set(make(model="small_cnn").model.arguments) == {"width", "head"}


def test_a_section_with_nothing_in_it_is_one_with_defaults() -> None:
    assert make(train=None, stream=None, model=None, methods=None).to_mapping() == make().to_mapping()


def test_seeds_are_a_number_or_a_list() -> None:
    assert make(seeds=3).seeds == (0, 1, 2)
    assert make(seeds=[5]).seeds == (5,)


@pytest.mark.parametrize("methods", [[], None, "finetune", ["finetune"], [{"name": "finetune"}]])
def test_finetune_is_no_method(methods: Any) -> None:
    assert make(methods=methods).methods == ()
    assert make(methods=methods).label == "finetune"


def test_the_label_does_not_depend_on_the_order() -> None:
    assert make(methods=["replay", "lwf"]).label == make(methods=["lwf", "replay"]).label == "lwf+replay"


def test_perceptrons_get_one_thread_and_others_what_torch_takes() -> None:
    assert make().threads == 1
    assert make(["model.hidden=[400,400]"]).threads == 1
    assert make(model="small_cnn").threads is None
    assert make(threads=3).threads == 3


@pytest.mark.parametrize(
    ("mapping", "overrides", "sentence"),
    [
        ({"method": ["replay"]}, [], "unknown key 'method'; did you mean 'methods'?"),
        ({"methods": ["replya"]}, [], "unknown method 'replya'; did you mean 'replay'?"),
        ({"methods": [{"name": "replay", "capcity": 5}]}, [], "unknown key 'replay.capcity'; did you mean 'capacity'?"),
        ({"methods": [{"nam": "replay"}]}, [], "methods[0].name is None"),
        ({"methods": [3]}, [], "methods[0] is 3, it must be a name or a mapping"),
        ({"methods": ["replay", "replay"]}, [], "'replay' is listed twice"),
        ({"methods": ["finetune", "replay"]}, [], "'finetune' is the run without any method"),
        ({"methods": ["replay"]}, ["replay.capcity=5"], "unknown key 'replay.capcity'; did you mean 'capacity'?"),
        ({"methods": ["replay"]}, ["replay.capacity=-5"], "-5"),
        ({"methods": ["replay"]}, ["replay.capacity=lots"], "replay.capacity is 'lots', it must be a whole number"),
        ({"methods": ["lwf"]}, ["replay.capacity=5"], "'replay' is not in this run (the methods are lwf); add -m"),
        ({}, ["replay.capacity=5"], "'replay' is not in this run (there is no method)"),
        ({}, ["trian.lr=5"], "unknown section 'trian' in --set 'trian.lr=5'; did you mean 'train'?"),
        ({}, ["train.lr"], "--set 'train.lr' is not SECTION.KEY=VALUE"),
        ({}, ["lr=3"], "--set 'lr=3' is not SECTION.KEY=VALUE"),
        ({}, ["train.learning_rate=3"], "unknown key 'train.learning_rate'; did you mean 'lr'?"),
        ({}, ["train.lr=fast"], "train.lr is 'fast', it must be a number or null"),
        ({}, ["train.lr=-1"], "train.lr is -1.0, it must be at least 0"),
        ({}, ["train.lr=.nan"], "train.lr is nan, it must be at least 0"),
        ({}, ["train.epochs=0"], "train.epochs is 0, it must be at least 1"),
        ({}, ["train.epochs=1.5"], "train.epochs is 1.5, it must be a whole number"),
        ({}, ["train.fused=1"], "train.fused is 1, it must be true or false"),
        ({}, ["train.precision=float64"], "train.precision is 'float64', it must be 'float32' or"),
        ({}, ["train.optimizer=adamm"], "unknown train.optimizer 'adamm'; did you mean 'adam'?"),
        ({}, ["train.optimizer=adam", "train.momentum=0.9"], "train.momentum is 0.9, but only sgd and rmsprop"),
        ({}, ["stream.taks=3"], "unknown key 'stream.taks'; did you mean 'tasks'?"),
        ({}, ["stream.seed=3"], "unknown key 'stream.seed'"),
        ({}, ["model.hiden=3"], "unknown key 'model.hiden'; did you mean 'hidden'?"),
        ({}, ["model.name=mpl"], "unknown model 'mpl'; did you mean 'mlp'?"),
        ({"train": [1]}, [], "train is [1], it must be a mapping"),
        ({"benchmark": "split_mnits"}, [], "unknown benchmark 'split_mnits'; did you mean 'split_mnist'?"),
        ({"seeds": 0}, [], "seeds is 0, it must be at least 1"),
        ({"seeds": [1, 1]}, [], "seeds is [1, 1]"),
        ({"seeds": "all"}, [], "seeds is 'all', it must be a whole number or a list of whole numbers"),
        ({"threads": 0}, [], "threads is 0, it must be at least 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_path_value_and_what_is_allowed(
    mapping: dict[str, Any], overrides: list[str], sentence: str
) -> None:
    with pytest.raises(UsageError) as error:
        Experiment.from_mapping(mapping, overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_benchmark_that_can_only_be_a_path_is_missed_as_one() -> None:
    with pytest.raises(DataError, match="'data/mine\\.csv' does not exist"):
        make(benchmark="data/mine.csv")


def test_a_path_is_kept_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.csv").write_text("a,label\n1,x\n2,y\n")
    monkeypatch.chdir(tmp_path)
    experiment = make(["stream.target=label", "stream.tasks=2"], benchmark="mine.csv")
    assert experiment.benchmark == str(tmp_path / "mine.csv")
    assert experiment.stream["target"] == "label"
    assert experiment.model.name == "mlp"


@pytest.mark.parametrize(
    ("text", "kind", "sentence"),
    [
        ("- a\n- b\n", UsageError, "holds a list, it must be a mapping"),
        ("", UsageError, "holds nothing"),
        ("just text", UsageError, "holds a single value"),
        ("a: [1\nb: 2", UsageError, "is not valid YAML in line 2"),
        ("a: \x00", UsageError, "is not valid YAML"),
        (None, StorageError, "cannot read"),
    ],
)
def test_files_that_are_no_experiment(
    tmp_path: Path, text: str | None, kind: type[PerdureError], sentence: str
) -> None:
    path = tmp_path / "experiment.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(kind, match=sentence) as error:
        read_yaml(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_yaml(path)


def test_boundaries_are_given_hidden_or_found_by_a_detector_and_stand_in_the_file() -> None:
    assert Experiment.from_mapping({}).boundaries.name == "given"
    assert Experiment.from_mapping({"boundaries": "hidden"}).boundaries.name == "hidden"
    found = Experiment.from_mapping({"boundaries": {"name": "page-hinkley", "snapshots": 3}}, ["boundaries.delta=0.25"])
    assert found.boundaries.name == "page_hinkley"
    assert (found.boundaries.arguments["delta"], found.boundaries.arguments["snapshots"]) == (0.25, 3)
    assert Experiment.from_mapping(found.to_mapping()) == found
    prepared = prepare(
        Experiment.from_mapping({"scenario": "domain"} | {"boundaries": found.to_mapping()["boundaries"]}), 0
    )
    watching = prepared.learner.boundaries
    assert watching is not None
    assert (watching.watch.arguments()["delta"], watching.snapshots) == (0.25, 3)
    assert prepare(Experiment.from_mapping({"boundaries": "hidden"}), 0).fit_options["announce"] is False


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("page_hinkly", "unknown boundaries 'page_hinkly'; did you mean 'page_hinkley'"),
        ({"name": "hidden", "delta": 1}, "boundaries 'hidden' have no arguments, but delta is given"),
        ({"name": "page_hinkley", "detla": 1}, "unknown key 'boundaries.detla'; did you mean 'delta'"),
        ({"name": "page_hinkley", "threshold": -1}, "page_hinkley: threshold is -1.0, it must be more than 0"),
    ],
)
def test_boundaries_that_cannot_be_are_refused(written: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Experiment.from_mapping({"boundaries": written})
