"""Loss-aware writing: rows enter as in a reservoir, and the one that goes is drawn by its loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from perdure.errors import UsageError
from perdure.memory import Buffer
from perdure.memory.loss_aware import chosen


def offered(buffer: Buffer, loss: torch.Tensor, size: int, start: int = 0) -> Buffer:
    for part in torch.arange(start, len(loss)).split(size):
        buffer.add({"x": part, "loss": loss[part]})
    return buffer


def test_the_row_that_goes_is_drawn_in_proportion_to_what_its_loss_lacks_to_the_largest():
    losses = torch.tensor([0.5, 2.0, 1.0, 0.0, 1.5])
    expected = (2.0 - losses) / (2.0 - losses).sum()
    gone, accepted = torch.zeros(5), 0
    for seed in range(4000):
        buffer = offered(Buffer(5, writing="loss_aware", seed=seed), torch.cat([losses, torch.ones(1)]), 6)
        missing = set(range(5)) - set(buffer.view("x").tolist())
        accepted += len(missing)
        for row in missing:
            gone[row] += 1
    assert gone[1] == 0  # nobody has a larger loss
    # The sixth row enters with probability 5/6: standard deviation 0.0059.
    assert accepted / 4000 == pytest.approx(5 / 6, abs=4.5 * 0.0059)
    rest = expected > 0
    statistic = float(((gone - accepted * expected)[rest] ** 2 / (accepted * expected)[rest]).sum())
    assert statistic < 3 + 4.5 * 6**0.5, gone / accepted


def test_equal_losses_make_it_a_reservoir():
    runs, length = 900, 40
    counts = torch.zeros(length)
    for seed in range(runs):
        buffer = offered(Buffer(8, writing="loss_aware", seed=seed), torch.full((length,), 0.7), 7)
        assert len(buffer.view("x").unique()) == 8
        counts[buffer.view("x")] += 1
    expected = runs * 8 / length
    assert float(((counts - expected) ** 2 / expected).mean() / 0.8) < 1 + 4.5 * (2 / length) ** 0.5


def test_what_is_learned_goes_first_and_an_updated_loss_counts():
    loss = torch.zeros(400)
    kept = torch.zeros(2)
    for seed in range(60):
        buffer = offered(Buffer(20, writing="loss_aware", seed=seed), loss[:20], 20)
        buffer.update(torch.arange(10), {"loss": torch.full((10,), 5.0)})
        for start in range(20, 400, 10):
            buffer.add({"x": torch.arange(start, start + 10), "loss": torch.full((10,), 1.0)})
        rows = buffer.view("x")
        kept += torch.tensor([(rows < 10).sum(), ((rows >= 10) & (rows < 20)).sum()])
    assert kept[0] == 600
    assert kept[1] < 60


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_cut_into_batches_changes_nothing(size):
    loss = torch.rand(300, generator=torch.Generator().manual_seed(2))
    one, other = (offered(Buffer(25, writing="loss_aware", seed=4), loss, cut) for cut in (300, size))
    assert torch.equal(one.view("x"), other.view("x"))
    assert torch.equal(one.view("loss"), loss[one.view("x")])


def test_a_restored_buffer_continues_identically_and_a_smaller_one_keeps_what_is_hard():
    loss = torch.rand(300, generator=torch.Generator().manual_seed(2))
    buffer = offered(Buffer(25, writing="loss_aware", seed=4), loss[:111], 8)
    other = Buffer(2, writing="loss_aware", seed=9)
    other.load_state_dict(buffer.state_dict())
    for each in (buffer, other):
        offered(each, loss, 8, start=111)
    assert torch.equal(buffer.view("x"), other.view("x"))
    before = set(buffer.view("x").tolist())
    buffer.resize(5)
    rows = buffer.view("x")
    assert set(rows.tolist()) <= before
    assert int(max(before, key=lambda row: float(loss[row]))) in rows.tolist()
    assert torch.equal(buffer.view("loss"), loss[rows])


def test_losses_that_are_not_finite_are_kept_and_alone_are_all_alike():
    losses = np.array([np.nan, 1.0, np.inf, 2.0])
    assert {chosen(losses, u) for u in np.linspace(0, 1, 50, endpoint=False)} == {1}
    assert {chosen(np.full(4, np.nan), u) for u in np.linspace(0, 1, 50, endpoint=False)} == {0, 1, 2, 3}
    assert chosen(np.array([1.0, 2.0, 2.0]), np.nextafter(1, 0)) == 0


def test_losses_have_to_be_given_and_buffers_are_not_merged():
    with pytest.raises(UsageError, match="needs the loss of every row"):
        Buffer(3, writing="loss_aware").add({"x": torch.zeros(2)})
    one = offered(Buffer(3, writing="loss_aware"), torch.ones(5), 5)
    with pytest.raises(UsageError, match="cannot be merged; merge reservoirs"):
        one.merge(offered(Buffer(3, writing="loss_aware"), torch.ones(5), 5))


def test_a_batch_is_read_once_however_many_of_its_rows_enter():
    class Counted(torch.Tensor):
        reads = 0

        def __float__(self):
            raise AssertionError("every number would be waited for")

        def tolist(self):
            Counted.reads += 1
            return super().tolist()

    loss = torch.rand(300, generator=torch.Generator().manual_seed(2))
    plain, counted = (offered(Buffer(25, writing="loss_aware", seed=4), loss[:25], 25) for _ in range(2))
    offered(plain, loss, 275, start=25)
    counted.add({"x": torch.arange(25, 300), "loss": loss[25:].as_subclass(Counted)})
    assert Counted.reads == 1
    assert torch.equal(plain.view("x"), counted.view("x"))
    assert (plain.view("x") >= 25).sum() > 5
