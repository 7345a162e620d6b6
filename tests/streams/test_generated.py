from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import perdure
from perdure.data.generated import GeneratedExamples
from perdure.errors import UsageError
from perdure.seeding import normals, uniforms
from perdure.streams import generated
from perdure.streams.transforms import Permute
from perdure.tree import leaves


def make(numbers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    x = uniforms(numbers, 3, seed)
    return torch.cat([numbers.unsqueeze(1).double(), x.double()], 1), (x[:, 0] * 4).long()


def numbers_of(examples: Any) -> list[int]:
    return [int(row) for x, _, _ in examples.ordered(7) for row in x[:, 0]]


def test_uniforms_are_the_published_splitmix64() -> None:
    """Against the reference recurrence in whole numbers: state += gamma, then the finaliser."""
    mask, state, expected = 2**64 - 1, perdure.seeding.derive(5, "x"), []
    for _ in range(12):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        expected.append(((z ^ (z >> 31)) >> 40) / 2**24)
    assert uniforms(torch.arange(4), 3, 5, "x").flatten().tolist() == expected


@given(rows=st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_a_row_is_the_same_alone_and_in_any_batch(rows: list[int]) -> None:
    index = torch.tensor(rows)
    for draw in (uniforms, normals):
        together = draw(index, 5, 1, "a")
        assert torch.equal(together, torch.cat([draw(index[k : k + 1], 5, 1, "a") for k in range(len(rows))]))
        assert not torch.equal(together, draw(index, 5, 2, "a"))


def test_the_numbers_have_the_moments_they_should() -> None:
    u, z = uniforms(torch.arange(50_000), 4, 0), normals(torch.arange(50_000), 4, 0)
    assert bool(((u >= 0) & (u < 1)).all())
    assert bool(z.isfinite().all())
    assert abs(float(u.mean()) - 0.5) < 0.003
    assert abs(float(u.var()) - 1 / 12) < 0.001
    assert abs(float(z.mean())) < 0.01
    assert abs(float(z.var()) - 1) < 0.01
    both = torch.cat([u, u.roll(1, 0)], 1)
    assert float((torch.corrcoef(both.T) - torch.eye(8)).abs().max()) < 0.02


@pytest.mark.parametrize(("rows", "parts", "test_rows"), [(100, 4, 5), (97, 3, 7), (50, 1, 0), (30, 3, 10)])
def test_training_rows_and_held_out_rows_are_disjoint_and_together_all_numbers(
    rows: int, parts: int, test_rows: int
) -> None:
    stream = generated(make, rows=rows, classes=4, parts=parts, test_rows=test_rows, seed=2)
    trained = [numbers_of(task.train) for task in stream]
    held = [[] if task.test is None else numbers_of(task.test) for task in stream]
    assert sum(map(len, trained)) == rows
    assert [len(part) for part in held] == [test_rows] * parts
    every = [number for own in (*trained, *held) for number in own]
    assert sorted(every) == list(range(rows + parts * test_rows))
    flat = [number for part in trained for number in part]
    assert flat == sorted(flat), "rows arrive in the order of their numbers"
    for part, tests in zip(trained, held, strict=True):
        assert all(min(part + tests) <= test <= max(part + tests) for test in tests), "tests come from their own part"
    batches = [rows for task in stream for rows in stream.plan(task, batch_size=8)]
    assert sum(map(len, batches)) == rows
    x, y, _ = next(stream[0].train.batches(stream.plan(stream[0], batch_size=8)))
    assert torch.equal(y, make(x[:, 0].long(), 2)[1])


def test_a_plan_in_order_makes_each_batch_when_it_is_needed() -> None:
    stream = generated(make, rows=10**13, classes=4, parts=2)
    plan = stream.plan(stream[1], batch_size=64)
    first = list(islice(plan, 3))
    assert [batch.tolist() for batch in first] == [list(range(k, k + 64)) for k in (0, 64, 128)]
    x, _ = stream[1].train.gather(first[2])
    assert torch.equal(x[:, 0].diff(), torch.ones(63).double())


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in leaves(out) if isinstance(leaf, Tensor))])
        return out


def test_no_tensor_of_a_run_grows_with_the_stream() -> None:
    def narrow(numbers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        x = uniforms(numbers, 3, seed)
        return x, (x[:, 0] * 4).long()

    def largest(rows: int) -> int:
        stream = generated(narrow, rows=rows, classes=4, parts=2, test_rows=20)
        replay = perdure.methods.Replay(capacity=50)
        learner = perdure.Learner(perdure.models.MLP(3, [8], 4, seed=0), methods=[replay])
        with Largest() as found:
            learner.fit(stream, batch_size=64)
        return found.elements

    assert largest(16_000) == largest(8_000) < 4_000, "the part itself has 4,000 rows"


def test_generated_examples_are_examples() -> None:
    examples = GeneratedExamples(partial(make, seed=0), 40)
    rows = torch.tensor([5, 3, 30])
    some = examples.subset(rows)
    assert numbers_of(some) == [5, 3, 30]
    assert torch.equal(some.targets, make(rows, 0)[1])
    assert torch.equal(examples.targets, make(torch.arange(40), 0)[1])
    relabelled = some.with_targets(torch.tensor([9, 8, 7]))
    assert relabelled.gather(torch.tensor([2, 0]))[1].tolist() == [7, 9]
    assert relabelled.subset(torch.tensor([1])).targets.tolist() == [8]
    turned = some.with_transform(Permute(torch.tensor([1, 0, 2, 3]))).with_transform(
        Permute(torch.tensor([1, 0, 2, 3]))
    )
    assert torch.equal(turned.gather(torch.arange(3))[0], some.gather(torch.arange(3))[0])
    prints = {e.fingerprint() for e in (examples, some, relabelled, GeneratedExamples(partial(make, seed=1), 40))}
    assert len(prints) == 4
    assert examples.fingerprint() == GeneratedExamples(partial(make, seed=0), 40).fingerprint()


def test_what_cannot_be_generated_is_refused() -> None:
    with pytest.raises(UsageError, match="every part needs a row"):
        generated(make, rows=3, classes=4, parts=4)
    with pytest.raises(UsageError, match="columns of 1 parts, and there are parts=2"):
        generated(make, rows=100, classes=[[0]], parts=2)
    with pytest.raises(UsageError, match="500 test rows of a part that has 10"):
        generated(make, rows=100, classes=4)
