"""The grid search of the Neurenix document: its example, and what it shows to which combination."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Linear, ReLU, Sequential

from perdure.continual import (
    EWC,
    ExperienceReplay,
    GridSearch,
    KnowledgeDistillation,
    L2Regularization,
    SynapticIntelligence,
)
from perdure.data.store import load
from perdure.errors import DataError, PerdureWarning, UsageError

FAST = partial(torch.optim.Adam, lr=0.01)


def data(rows: int = 96) -> tuple[Tensor, Tensor]:
    """Four classes that can be told apart, in inputs of the document's size."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(rows) % 4
    x = 0.3 * torch.rand(rows, 784, generator=draw)
    x[torch.arange(rows), y] += 3.0
    return x, y


def test_the_example_of_the_document() -> None:
    X, y = data()

    def create_ewc_model(importance: float = 1000.0, fisher_sample_size: int = 1000) -> EWC:
        model = Sequential(Linear(784, 256), ReLU(), Linear(256, 10))
        return EWC(model, importance=importance, fisher_sample_size=fisher_sample_size)

    param_space = {"importance": [100.0, 1000.0, 10000.0], "fisher_sample_size": [100, 500, 1000]}
    grid_search = GridSearch(model_fn=create_ewc_model, param_space=param_space, scoring="accuracy", cv=3)
    grid_search.fit(X, y)
    best_params = grid_search.best_params()
    assert set(best_params) == {"importance", "fisher_sample_size"}
    results = grid_search.results()
    tried = [(result["params"]["importance"], result["params"]["fisher_sample_size"]) for result in results]
    assert tried == [(i, n) for i in param_space["importance"] for n in param_space["fisher_sample_size"]]
    first_best = next(result for result in results if result["score"] == max(r["score"] for r in results))
    assert best_params == first_best["params"]
    assert grid_search.best_score() == first_best["score"]


class Recorder:
    """A wrapper that learns nothing and writes down what it is shown."""

    def __init__(self, book: list[Any], value: float) -> None:
        self.book, self.model = book, nn.Linear(784, 4)
        self.book.append(("new", value, self.model.weight.detach().clone()))

    def train_step(self, optimizer: Any, loss_fn: Any, inputs: Tensor, targets: Tensor, task_id: int) -> None:
        assert self.model.training
        self.book.append((task_id, inputs.clone(), targets.clone()))


def test_every_combination_sees_the_same_and_every_row_is_left_out_once() -> None:
    X, y = data(48)
    book: list[Any] = []
    left_out: list[Tensor] = []

    def score(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
        assert not model.training
        left_out.append(inputs)
        return float(len(targets))

    search = GridSearch(lambda value: Recorder(book, value), {"value": [1.0, 2.0]}, score, cv=3, batch_size=5, epochs=2)
    search.fit(X, y)
    starts = [i for i, entry in enumerate(book) if entry[0] == "new"]
    runs = [book[a:b] for a, b in zip(starts, [*starts[1:], len(book)], strict=True)]
    assert [run[0][1] for run in runs] == [1.0] * 3 + [2.0] * 3
    for one, two in zip(runs[:3], runs[3:], strict=True):
        assert torch.equal(one[0][2], two[0][2]), "the weights at the beginning differ"
        assert all(torch.equal(a[1], b[1]) for a, b in zip(one[1:], two[1:], strict=True))
    for number, run in enumerate(runs[:3]):
        tasks = [entry[0] for entry in run[1:]]
        assert tasks == sorted(tasks)
        assert {label for task, _, labels in run[1:] if task == 0 for label in labels.tolist()} == {0, 1}
        trained = torch.cat([entry[1] for entry in run[1:]])
        held = torch.cat(left_out[2 * number : 2 * number + 2])
        distance = torch.cdist(held, trained)
        assert distance.min() > 0.1, "a row was trained on and tested"
        assert (len(trained), len(held)) == (2 * 32, 16)
    every = torch.cat(left_out[:6])
    assert (torch.cdist(X, every).min(dim=1).values < 0.1).all()


def digits(rows: int = 600) -> tuple[Tensor, Tensor]:
    arrays = load("digits")
    return arrays.x[:rows].flatten(1).float() / 16, arrays.y[:rows].long()


def test_it_finds_the_penalty_that_keeps_old_tasks_and_finds_it_again() -> None:
    X, y = digits()

    def create(importance: float) -> EWC:
        return EWC(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)), importance=importance)

    before = torch.get_rng_state()
    space = {"importance": [0.0, 10.0, 10000.0]}
    search = GridSearch(create, space, cv=2, epochs=5, optimizer=FAST).fit(X, y % 2, task_ids=y // 2)
    assert torch.equal(torch.get_rng_state(), before)
    none, some, too_much = (result["score"] for result in search.results())
    assert some > none + 0.02 > too_much
    assert search.best_params() == {"importance": 10.0}
    again = GridSearch(create, space, cv=2, epochs=5, optimizer=FAST)
    again.fit(np.asarray(X), np.asarray(y % 2), task_ids=np.asarray(y // 2))
    assert [result["score"] for result in again.results()] == [none, some, too_much]


@pytest.mark.parametrize(
    "create",
    [
        lambda value: ExperienceReplay(nn.Linear(784, 4), memory_size=value),
        lambda value: KnowledgeDistillation(nn.Linear(784, 4), temperature=value),
        lambda value: L2Regularization(nn.Linear(784, 4), importance=value),
        lambda value: SynapticIntelligence(nn.Linear(784, 4), importance=value),
    ],
    ids=["replay", "distillation", "l2", "si"],
)
def test_it_takes_every_wrapper(create: Any) -> None:
    X, y = data()
    search = GridSearch(create, {"value": [1, 50]}, cv=2, epochs=6, batch_size=8, optimizer=FAST).fit(X, y)
    assert search.best_score() >= 0.5, "chance is a quarter, and the last task alone gives a half"


def test_a_memory_that_holds_something_is_chosen_over_one_that_does_not() -> None:
    X, y = digits()
    search = GridSearch(
        lambda memory_size: ExperienceReplay(nn.Linear(64, 10), memory_size=memory_size),
        {"memory_size": [1, 200]},
        cv=2,
        epochs=5,
        optimizer=FAST,
    )
    assert search.fit(X, y).best_params() == {"memory_size": 200}
    assert search.best_score() > 0.6


def create(importance: float = 1.0) -> EWC:
    return EWC(nn.Linear(784, 4), importance=importance)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"param_space": {}}, "must map arguments"),
        ({"param_space": {"importnce": [1.0]}}, "did you mean 'importance'"),
        ({"param_space": {"importance": []}}, "empty list"),
        ({"scoring": "f1"}, "scoring is 'f1'"),
        ({"cv": 1}, "cv is 1"),
        ({"tasks": 0}, "tasks is 0"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        GridSearch(**{"model_fn": create, "param_space": {"importance": [1.0]}} | arguments)


def test_wrong_data_are_one_sentence() -> None:
    X, y = data(8)
    search = GridSearch(create, {"importance": [1.0]}, cv=5)
    with pytest.raises(UsageError, match="call fit"):
        search.best_params()
    with pytest.raises(DataError, match="too few for cv=5"):
        search.fit(X, y)
    with pytest.raises(DataError, match="8 inputs but 7 targets"):
        search.fit(X, y[:7])
    with pytest.raises(UsageError, match="it must return a wrapper"):
        GridSearch(lambda importance: nn.Linear(784, 4), {"importance": [1.0]}, cv=2).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PerdureWarning)
        with pytest.raises(PerdureWarning, match="nothing can be forgotten"):
            GridSearch(create, {"importance": [1.0]}, cv=2).fit(X, y % 2)
