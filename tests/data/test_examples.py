from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from perdure.data.examples import DatasetExamples, Examples, as_examples
from perdure.errors import DataError


class Pairs(Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.x[row], int(self.y[row])


def sample(rows: int = 12) -> tuple[Tensor, Tensor]:
    return torch.arange(rows * 6, dtype=torch.uint8).view(rows, 2, 3), torch.arange(rows) % 5


def everything(examples: Examples) -> tuple[Tensor, Tensor]:
    x, y = examples.gather(torch.arange(len(examples)))
    return x, y


@pytest.fixture(params=["memory", "dataset", "workers"])
def examples(request: pytest.FixtureRequest) -> Examples:
    x, y = sample()
    if request.param == "memory":
        return Examples(x, y)
    return DatasetExamples(Pairs(x, y), workers=request.param == "workers")


def negative(x: Tensor) -> Tensor:
    return 255 - x


def double(x: Tensor) -> Tensor:
    return x * 2


def test_batches_follow_the_plan_and_keep_bytes(examples: Examples) -> None:
    x, y = sample()
    plan = [torch.tensor([3, 0, 7]), torch.tensor([11])]
    state = torch.get_rng_state()
    batches = list(examples.subset(torch.arange(12).flip(0)).batches(plan))
    assert torch.equal(torch.get_rng_state(), state)
    for rows, (batch_x, batch_y, batch_rows) in zip(plan, batches, strict=True):
        assert batch_x.dtype == torch.uint8
        assert torch.equal(batch_rows, rows)
        assert torch.equal(batch_x, x[11 - rows])
        assert torch.equal(batch_y, y[11 - rows])


class Noisy(Pairs):
    """Every item is noise from the three global generators."""

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.stack([torch.rand(()), torch.tensor(np.random.rand()), torch.tensor(random.random())]), row


@pytest.mark.parametrize("workers", [0, 2])
def test_what_items_draw_at_random_belongs_to_the_stream(workers: int) -> None:
    plan = [torch.tensor([3, 0]), torch.tensor([3, 0]), torch.tensor([1])]
    examples = DatasetExamples(Noisy(*sample()), torch.zeros(12, dtype=torch.int64), workers=workers)
    alone = [x for x, _, _ in examples.batches(plan)]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    beside = []
    for x, _, _ in examples.batches(plan):
        beside.append(x)
        torch.rand(7), np.random.rand(7), random.random()
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
    assert len(torch.cat(alone).unique()) == 15, "the same rows are drawn for anew in every pass"
    resumed = [x for x, _, _ in examples.batches(plan[1:], 1)]
    assert all(torch.equal(a, b) for a, b in zip(alone[1:], resumed, strict=True))
    torch.set_rng_state(states[0])
    next(iter(examples.batches(plan)))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert states[1] != np.random.get_state()[1].tolist() or states[2] != random.getstate()


def test_ordered_covers_every_row_once_in_order(examples: Examples) -> None:
    x, y = sample()
    batches = list(examples.with_transform(negative).ordered(5))
    assert [len(rows) for _, _, rows in batches] == [5, 5, 2]
    assert torch.equal(torch.cat([batch for batch, _, _ in batches]), 255 - x)
    assert torch.equal(torch.cat([targets for _, targets, _ in batches]), y)


@given(first=st.lists(st.integers(0, 11), min_size=1), second=st.data())
def test_a_subset_of_a_subset_is_the_subset_of_the_composed_rows(first: list[int], second: st.DataObject) -> None:
    again = second.draw(st.lists(st.integers(0, len(first) - 1), min_size=1))
    examples = Examples(*sample())
    nested = examples.subset(torch.tensor(first)).subset(torch.tensor(again))
    direct = examples.subset(torch.tensor([first[row] for row in again]))
    for left, right in zip(everything(nested), everything(direct), strict=True):
        assert torch.equal(left, right)
    assert torch.equal(nested.targets, direct.targets)
    assert nested.fingerprint() == direct.fingerprint()
    assert nested.x is examples.x


@given(rows=st.lists(st.integers(0, 11), min_size=1))
def test_relabelling_and_taking_rows_commute(rows: list[int]) -> None:
    examples = Examples(*sample()).with_transform(negative)
    labels = torch.arange(12) * 3
    one = examples.with_targets(labels).subset(torch.tensor(rows))
    other = examples.subset(torch.tensor(rows)).with_targets(labels[torch.tensor(rows)])
    for left, right in zip(everything(one), everything(other), strict=True):
        assert torch.equal(left, right)


def test_transforms_run_in_the_order_in_which_they_were_added() -> None:
    x, y = sample()
    examples = Examples(x.float(), y)
    assert torch.equal(everything(examples.with_transform(double).with_transform(negative))[0], 255 - x.float() * 2)
    thrice = examples.with_transform(double).with_transform(negative).with_transform(double)
    assert torch.equal(everything(thrice)[0], (255 - x.float() * 2) * 2)


def test_trees_of_inputs_are_gathered_leaf_by_leaf() -> None:
    ids, mask = torch.arange(12).view(6, 2), torch.ones(6, 2, dtype=torch.bool)
    batch, _ = as_examples(({"ids": ids, "mask": mask}, torch.zeros(6, dtype=torch.int64))).gather(torch.tensor([5, 1]))
    assert torch.equal(batch["ids"], ids[[5, 1]])
    assert batch["mask"].shape == (2, 2)


def test_the_fingerprint_is_of_the_content() -> None:
    x, y = sample()
    base = Examples(x, y).fingerprint()
    assert Examples(x.clone(), y.clone()).fingerprint() == base
    assert Examples(x.flip(0), y.flip(0), rows=torch.arange(12).flip(0)).fingerprint() != base
    assert Examples(x.flip(0), y, rows=torch.arange(12).flip(0)).fingerprint() == base
    changed = x.clone()
    changed[7, 1, 2] += 1
    others = [
        Examples(changed, y),
        Examples(x, (y + 1) % 5),
        Examples(x.float(), y),
        Examples(x.view(12, 6), y),
        Examples(x, y).subset(torch.arange(11)),
        Examples(x, y).with_transform(negative),
    ]
    assert len({base, *(other.fingerprint() for other in others)}) == 1 + len(others)


def test_memory_is_shared_with_the_caller() -> None:
    x, y = np.zeros((4, 2), np.uint8), np.arange(4)
    x.flags.writeable = False
    assert as_examples((x, y)).x.data_ptr() == x.ctypes.data
    floats = as_examples((np.zeros((4, 2)), y))
    assert floats.x.dtype == torch.float32


def test_tensor_data_sets_stay_in_memory() -> None:
    x, y = sample()
    data = TensorDataset(x, y)
    assert as_examples(data).x.data_ptr() == x.data_ptr()
    part = as_examples(Subset(data, [4, 2]))
    assert type(part) is Examples
    assert torch.equal(everything(part)[0], x[[4, 2]])


def test_targets_of_a_data_set_come_from_its_attribute_or_its_items() -> None:
    x, y = sample()
    pairs = Pairs(x, y)
    assert torch.equal(as_examples(Subset(pairs, [3, 1])).targets, y[[3, 1]])
    pairs.targets = [4] * 12  # type: ignore[attr-defined]
    assert as_examples(pairs).targets.tolist() == [4] * 12
    pairs.target_transform = abs  # type: ignore[attr-defined]
    assert torch.equal(as_examples(pairs).targets, y)


def test_paths_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b,label\n1,2,x\n3,4,w\n")
    examples = as_examples(path)
    assert torch.equal(examples.x, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert as_examples(str(path), target="label").targets.tolist() == [1, 0]


X, Y = torch.zeros(3, 2), torch.arange(3)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ((torch.tensor([[0.0], [float("nan")], [1.0]]), Y), "the inputs have a NaN in row 1"),
        ((torch.tensor([[0.0], [1.0], [float("-inf")]]), Y), "the inputs have an infinity in row 2"),
        ((X, torch.tensor([0.5, float("nan"), 1.0])), "the targets have a NaN in row 1"),
        ((X, torch.arange(4)), "there are 3 inputs but 4 targets"),
        ((X, torch.tensor([0, -3, 1])), "the target of row 1 is -3; class labels are integers from 0"),
        ((X, ["a", "b", "c"]), "the targets cannot be made a tensor"),
        (([[1, 2], [3]], Y), "the inputs cannot be made a tensor"),
        ((X[:0], Y[:0]), "there are no examples"),
        ((torch.tensor(1.0), Y), "one row an example is needed"),
        ((X, 3), "the targets are a single number, 3"),
        (({"a": X, "b": X[:2]}, Y), "parts of different lengths, 2 and 3"),
        (TensorDataset(X), "should hold inputs and targets but holds 1 tensors"),
        (X, "a Tensor cannot be used as examples"),
        (Pairs(X[:0], Y[:0]), "there are no examples"),
    ],
)
def test_data_that_cannot_be_used_are_refused(data: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        as_examples(data)


def test_items_of_a_data_set_are_refused_where_they_do_not_fit() -> None:
    class Broken(Pairs):
        def __getitem__(self, row: int) -> Any:
            return self.x[row] if row == 2 else (torch.zeros(row + 1), 0)

    with pytest.raises(DataError, match=r"item 2 of the data set should be a pair \(input, target\) but is a Tensor"):
        as_examples(Broken(X, Y))
    with pytest.raises(DataError, match="items cannot be joined to a batch"):
        as_examples(Subset(Broken(X, Y), [0, 1])).gather(torch.tensor([0, 1]))
