from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "data"))

import synthetic_data as synthetic

from perdure.data.store import load
from perdure.errors import DataError, UsageError
from perdure.registry import benchmarks
from perdure.seeding import generator
from perdure.streams.benchmarks import (
    coarse_cifar100,
    permuted_mnist,
    rotated_mnist,
    split_cifar100,
    split_digits,
    split_mnist,
)
from perdure.streams.transforms import Prepare

DATA_SETS = {
    "split_digits": "digits",
    "split_mnist": "mnist",
    "permuted_mnist": "mnist",
    "rotated_mnist": "mnist",
    "split_fashion_mnist": "fashion_mnist",
    "split_cifar10": "cifar10",
    "split_cifar100": "cifar100",
    "coarse_cifar100": "cifar100",
}
PLACES = [
    (name, place)
    for name, data_set in DATA_SETS.items()
    for place in ("synthetic", "published")
    if place == "synthetic" or data_set in synthetic.published()
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_all(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_every_benchmark_shows_its_data_set_in_every_scenario(name: str, place: str, root: Path) -> None:
    where = root if place == "synthetic" else None
    arrays = load(DATA_SETS[name], where)
    assert arrays.x_test is not None
    copies = len(benchmarks.get(name)(root=where)) if name in ("permuted_mnist", "rotated_mnist") else 1
    for scenario in ("class", "task", "domain") if place == "synthetic" else ("class",):
        stream = benchmarks.get(name)(scenario=scenario, root=where)
        assert (stream.name, stream.scenario, stream.seed) == (name, scenario, 0)
        assert sum(len(task.train) for task in stream) == copies * len(arrays.x)
        assert sum(len(task.test) for task in stream if task.test is not None) == copies * len(arrays.x_test)
        assert stream.columns == len(stream.class_names) == 1 + max(stream[-1].classes)
        x, y, _ = next(stream[1].train.batches(stream.plan(stream[1], batch_size=16)))
        assert x.dtype == torch.uint8
        assert set(y.tolist()) <= set(stream[1].classes)
        prepared = stream.prepare(x)
        assert prepared.dtype == torch.float32
        assert tuple(prepared.shape[1:]) == stream.input_shape
        assert 0 <= float(prepared.min()) <= float(prepared.max()) <= 1
        json.dumps(stream.options)
        if place == "synthetic":
            rebuilt = benchmarks.get(name)(**stream.options)
            assert rebuilt.fingerprint() == stream.fingerprint()
    with pytest.raises(UsageError, match="unknown scenario 'tusk'; did you mean 'task'"):
        benchmarks.get(name)(scenario="tusk", root=where)


def test_every_registered_benchmark_is_tested_and_described() -> None:
    assert set(benchmarks.names()) >= set(DATA_SETS)
    assert all(benchmarks.get(name).__doc__ for name in DATA_SETS)


def test_split_digits_needs_no_data_and_divides_by_16() -> None:
    stream = split_digits(root="/nowhere")
    assert stream.prepare == Prepare(16.0)
    assert float(stream.prepare(stream[0].train.x).max()) == 1.0
    assert [len(task.test) for task in stream if task.test is not None] == [100] * 5


def test_split_mnist_keeps_the_published_order_within_a_task(root: Path) -> None:
    arrays = load("mnist", root)
    stream = split_mnist(root=root, class_order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0], tasks=[4, 6])
    for task, labels in zip(stream, ([9, 8, 7, 6], [5, 4, 3, 2, 1, 0]), strict=True):
        rows = torch.isin(arrays.y, torch.tensor(labels))
        x, y = task.train.gather(torch.arange(len(task.train)))
        assert torch.equal(x, arrays.x[rows])
        assert [stream.class_order[column] for column in y.tolist()] == arrays.y[rows].tolist()


def test_coarse_cifar100_has_a_superclass_a_task(root: Path) -> None:
    arrays = load("cifar100", root)
    stream = coarse_cifar100(root=root)
    assert stream.scenario == "task"
    assert tuple(task.name for task in stream) == arrays.group_names
    for task in stream:
        labels = [stream.class_order[column] for column in task.classes]
        assert len(labels) == 5
        assert {arrays.groups[label] for label in labels} == {task.index}


def test_permutations_depend_on_the_seed_and_the_task_alone(root: Path) -> None:
    arrays = load("mnist", root)
    stream, longer = permuted_mnist(root=root, tasks=3, seed=5), permuted_mnist(root=root, tasks=4, seed=5)
    rows = torch.arange(8)
    for task in range(3):
        permutation = torch.randperm(784, generator=generator(5, "permutation", task))
        shown = stream[task].train.gather(rows)[0]
        assert torch.equal(shown.view(8, -1), arrays.x[:8].view(8, -1)[:, permutation])
        assert torch.equal(shown, longer[task].train.gather(rows)[0])
        assert stream[task].train.x.data_ptr() == stream[0].train.x.data_ptr()
    assert not torch.equal(stream[0].train.gather(rows)[0], arrays.x[:8])
    unpermuted = permuted_mnist(root=root, tasks=3, seed=5, permute_first=False)
    assert torch.equal(unpermuted[0].train.gather(rows)[0], arrays.x[:8])
    assert torch.equal(unpermuted[1].train.gather(rows)[0], stream[1].train.gather(rows)[0])


def test_rotations_turn_the_images(root: Path) -> None:
    arrays = load("mnist", root)
    stream = rotated_mnist(root=root, tasks=3, angles=[0, 90, 180])
    rows = torch.arange(8)
    for task in range(3):
        assert torch.equal(stream[task].train.gather(rows)[0], torch.rot90(arrays.x[:8], task, (1, 2)))
    assert [task.name for task in rotated_mnist(root=root)] == [f"{angle} degrees" for angle in (0, 10, 20, 30, 40)]
    with pytest.raises(UsageError, match=r"angles=\[1.0\] are 1 but tasks=2"):
        rotated_mnist(root=root, tasks=2, angles=[1])


def test_the_seed_moves_what_it_should_and_nothing_else(root: Path) -> None:
    def order(**arguments: Any) -> tuple[int, ...]:
        return split_cifar100(root=root, **arguments).class_order

    assert order(seed=0) == order(seed=1) == tuple(range(100))
    assert order(seed=0, class_order="shuffled") == order(seed=0, class_order="shuffled", tasks=20)
    assert order(seed=0, class_order="shuffled") != order(seed=1, class_order="shuffled")


def test_missing_data_and_wrong_splits_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run 'perdure data get mnist' or pass --data-root / set PERDURE_DATA"):
        split_mnist(root=tmp_path)
    with pytest.raises(UsageError, match="10 classes cannot be split evenly into 3 tasks; use one of 1, 2, 5, 10"):
        split_mnist(root=root, tasks=3)
    with pytest.raises(UsageError, match="tasks=0 should be at least 1"):
        permuted_mnist(root=root, tasks=0)
