"""Evaluation goes through the model in batches that fit a cache, and nobody can tell from the answers."""

from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import perdure
from perdure.classes import among
from perdure.evaluation import evaluate
from perdure.parameters import unwrap


class Counting(nn.Module):
    """A linear model that writes down how many rows it was given."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        out: Tensor = self.layers(x)
        return out


@pytest.mark.parametrize(("hidden", "expected"), [(8, 256), (2**11, 128), (2**12, 64), (2**14, 32)])
def test_a_batch_holds_as_many_rows_as_leave_the_largest_activation_a_mebibyte(hidden: int, expected: int) -> None:
    stream = perdure.benchmarks.split_digits(seed=0)
    learner = perdure.Learner(Counting(hidden))
    learner.adopt(stream)
    evaluate(learner, stream)
    assert learner.model.rows[0] == 2, "two rows are asked for their activations"
    sizes = [len(task.test) for task in stream]
    batches = [min(expected, size - start) for size in sizes for start in range(0, size, expected)]
    assert learner.model.rows[1:] == batches
    assert learner.passes["forward_rows"] == sum(sizes)


def test_the_size_of_a_batch_changes_no_prediction() -> None:
    stream = perdure.benchmarks.split_digits(seed=0)
    learner = perdure.Learner(Counting(64))
    learner.fit(stream, batch_size=64)
    x = torch.cat([task.test.gather(torch.arange(len(task.test)))[0] for task in stream])
    one_by_one = torch.cat([learner.predict(x[i : i + 1]) for i in range(len(x))])
    assert torch.equal(learner.predict(x), one_by_one)
    assert torch.equal(learner.classes.argmax(learner.outputs(x, batch_size=7)), one_by_one)
    found = evaluate(learner, stream)
    assert [int(p) for each in found.predictions["class_incremental"] for p in each] == one_by_one.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("columns", [(), (2, 3, 4), (1, 3, 4)])
def test_the_largest_column_is_torchs(dtype: torch.dtype, columns: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randint(-3, 3, (200, 6), generator=draw).to(dtype)
    outputs[5, 3] = outputs[6, 2] = float("-inf")
    allowed = columns or range(6)
    expected = [max(allowed, key=lambda c: (float(row[c]), -c)) for row in outputs]
    assert among(outputs, columns).tolist() == expected


def test_a_wrapped_model_is_asked_for_its_activations_unwrapped() -> None:
    inner = Counting(8)
    wrapped = nn.DataParallel(inner)
    learner = perdure.Learner(wrapped, device="cpu")
    calls = []
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    assert learner.forward.batch_size(torch.rand(2, 64)) == 256
    assert unwrap(wrapped) is inner
    assert not calls, "a compiled wrapper would be compiled anew for the two rows"


def coming_back() -> Any:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(48, 6, generator=draw), torch.arange(48) % 4
    return perdure.streams.repeated(perdure.streams.task_incremental((x, y), tasks=2), repeats=2)


@pytest.mark.parametrize(
    ("head", "methods"),
    [
        ("multi", []),
        ("multi", [perdure.methods.GDumb(20, epochs=2)]),
        ("wide", [perdure.methods.GDumb(20, epochs=2)]),
        ("wide", [perdure.methods.ICaRL(20)]),
    ],
)
def test_a_task_that_comes_back_is_asked_for_from_its_own_beginning_on(head: str, methods: list[Any]) -> None:
    """Its classes are known before that, but there is no head of its index and no method has heard of it."""
    model = perdure.models.MLP(6, [8], 4 if head == "wide" else 0, head=head, seed=0)
    learner = perdure.Learner(model, partial(torch.optim.SGD, lr=0.05), [deepcopy(method) for method in methods])
    results = learner.fit(coming_back(), batch_size=12)
    assert np.isnan(results.untrained).all()
    asked = [[index <= after for index in range(4)] for after in range(4)]
    assert (~np.isnan(results.matrix)).tolist() == asked


def test_a_shared_head_is_scored_on_tasks_that_have_not_come_back_yet() -> None:
    learner = perdure.Learner(perdure.models.MLP(6, [8], 4, seed=0), partial(torch.optim.SGD, lr=0.05))
    results = learner.fit(coming_back(), batch_size=12)
    assert not np.isnan(results.matrix).any()
    assert results.class_incremental is not None
    assert not np.isnan(results.class_incremental["matrix"][1]).any(), "all classes have come with the second task"
