"""The buffer: what is stored is what arrived, reading changes nothing, and size and state are under control."""

from __future__ import annotations

import pytest
import torch

from perdure.errors import DataError, UnknownNameError, UsageError
from perdure.memory import Buffer
from perdure.memory.buffer import WRITING
from perdure.memory.reading import distinct
from perdure.tree import leaves


def batch(start: int, count: int) -> dict[str, torch.Tensor]:
    rows = torch.arange(start, start + count)
    images = torch.stack([rows % 256, rows // 256 % 256], 1).to(torch.uint8)
    return {"x": images, "y": rows % 7, "task": rows // 100}


def filled(capacity: int = 20, stream: int = 300, size: int = 10, **options: object) -> Buffer:
    buffer = Buffer(capacity, seed=(3, "test"), **options)  # type: ignore[arg-type]
    for start in range(0, stream, size):
        buffer.add(batch(start, size))
    return buffer


def position(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0].long() + 256 * x[:, 1].long()


def test_rows_come_back_byte_for_byte_and_belong_together():
    drawn = filled().sample(20)
    where = position(drawn["x"])
    assert drawn["x"].dtype == torch.uint8
    assert torch.equal(drawn["y"], where % 7)
    assert torch.equal(drawn["task"], where // 100)


@pytest.mark.parametrize("writing", ["reservoir", "class_balanced"])
@pytest.mark.parametrize("size", [1, 7, 32, 300])
def test_the_cut_into_batches_changes_nothing(writing, size):
    whole = filled(writing=writing, size=300)
    cut = filled(writing=writing, size=size, stream=300 - 300 % size)
    if 300 % size:
        cut.add(batch(300 - 300 % size, 300 % size))
    assert torch.equal(whole.view("x"), cut.view("x"))
    assert torch.equal(whole.view("y"), cut.view("y"))


def test_no_row_is_stored_twice():
    stored = position(filled(capacity=50).view("x"))
    assert len(stored.unique()) == 50


def test_of_two_rows_for_one_slot_the_later_one_wins():
    one = Buffer(1, seed=4)
    many = Buffer(1, seed=4)
    many.add(batch(0, 200))
    for start in range(200):
        one.add(batch(start, 1))
    assert torch.equal(one.view("x"), many.view("x"))
    assert position(one.view("x")) > 0


def test_reading_changes_neither_contents_nor_other_generators():
    buffer, twin = filled(), filled()
    rng = torch.get_rng_state()
    for _ in range(5):
        buffer.sample(7)
        buffer.sample(3, where=buffer.view("task") == 0)
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(buffer.view("x"), twin.view("x"))
    for part in (buffer, twin):
        part.add(batch(300, 100))
    assert torch.equal(buffer.view("x"), twin.view("x"))


def test_draws_made_ahead_are_those_made_one_by_one_and_do_not_move_the_saved_generator():
    buffer = filled(capacity=30)
    one_by_one = torch.Generator()
    one_by_one.set_state(buffer.state_dict()["read_generator"])
    sizes = [5] * 9 + [7] * 4 + [5] * 30 + [0, 0, 0, 5, 5, 40, 40, 40]
    for step, size in enumerate(sizes):
        assert torch.equal(buffer.sample(size)["slot"], distinct(size, len(buffer), one_by_one))
        if step % 7 == 3:
            only = torch.tensor([4, 9, 2, 15])
            assert torch.equal(buffer.sample(3, where=only)["slot"], only[distinct(3, 4, one_by_one)])
        if step in (3, 20, 21, 40):
            assert torch.equal(buffer.state_dict()["read_generator"], one_by_one.get_state())
        if step == 30:
            buffer.load_state_dict(buffer.state_dict())
        if step == 35:
            buffer.resize(20)
    assert Buffer(4).sample(3)["slot"].tolist() == Buffer(4).sample(3)["slot"].tolist() == []


@pytest.mark.parametrize("writing", list(WRITING))
def test_reading_changes_nothing_under_any_policy(writing):
    def offered(buffer: Buffer, start: int) -> None:
        rows = batch(start, 10)
        buffer.add(rows | {"loss": rows["y"] / 3})

    buffer, twin = (Buffer(25, writing=writing, seed=2) for _ in range(2))
    rng = torch.get_rng_state()
    for step in range(30):
        offered(buffer, 10 * step)
        offered(twin, 10 * step)
        buffer.sample(step % 9)
        buffer.sample(4, where=buffer.view("y") < 3)
        buffer.stats()
        assert all(torch.equal(buffer.view(name), twin.view(name)) for name in twin.columns)
    assert torch.equal(rng, torch.get_rng_state())
    assert len(position(buffer.view("x")).unique()) == len(buffer) == 25


def test_a_sample_can_be_changed_without_changing_the_buffer():
    buffer = filled()
    before = buffer.view("x").clone()
    buffer.sample(20)["x"].zero_()
    assert torch.equal(buffer.view("x"), before)


def test_sampling_is_without_replacement_and_gives_what_there_is():
    buffer = filled()
    assert buffer.sample(20)["slot"].sort().values.tolist() == list(range(20))
    assert len(buffer.sample(500)["y"]) == 20
    assert len(buffer.sample(0)["y"]) == 0
    mask = buffer.view("y") == 3
    drawn = buffer.sample(100, where=mask)
    assert sorted(drawn["slot"].tolist()) == mask.nonzero().squeeze(1).tolist()
    assert sorted(buffer.sample(9, where=torch.tensor([5, 8]))["slot"].tolist()) == [5, 8]
    with pytest.raises(UsageError, match="mask has shape"):
        buffer.sample(3, where=torch.ones(3, dtype=torch.bool))
    with pytest.raises(UsageError, match="cannot sample -1 rows"):
        buffer.sample(-1)


def test_before_the_first_row_a_sample_is_empty():
    assert Buffer(5).sample(3)["slot"].tolist() == []


@pytest.mark.parametrize("writing", ["reservoir", "class_balanced"])
def test_capacity_zero_never_stores(writing):
    buffer = filled(capacity=0, writing=writing, reading="class_balanced")
    assert len(buffer) == 0
    assert buffer.seen == 300
    assert buffer.bytes() == 0
    assert buffer.sample(4)["x"].shape == (0, 2)


@pytest.mark.parametrize("writing", ["reservoir", "class_balanced"])
@pytest.mark.parametrize("resized", [None, 12, 40])
def test_a_restored_buffer_continues_identically(writing, resized):
    buffer = filled(writing=writing, stream=250)
    if resized is not None:
        buffer.resize(resized)
        buffer.add(batch(250, 13))
    state = buffer.state_dict()
    other = Buffer(3, seed=99, writing=writing)
    other.load_state_dict(state)
    for part in (buffer, other):
        part.add(batch(263, 800))
    assert torch.equal(buffer.view("x"), other.view("x"))
    for _ in range(3):
        one, two = buffer.sample(5), other.sample(5)
        assert torch.equal(one["slot"], two["slot"])
        assert torch.equal(one["x"], two["x"])
    assert buffer.stats() == other.stats()


def test_saved_state_is_a_copy_of_the_filled_rows():
    buffer = Buffer(100)
    buffer.add(batch(0, 8))
    state = buffer.state_dict()
    assert state["columns"]["x"].shape == (8, 2)
    buffer.update(torch.arange(8), {"y": torch.full((8,), 6)})
    assert not torch.equal(state["columns"]["y"], buffer.view("y"))
    with pytest.raises(UsageError, match="written by 'reservoir'"):
        Buffer(3, writing="class_balanced").load_state_dict(state)


def test_update_overwrites_only_the_named_columns_and_slots():
    buffer = filled()
    before = {name: buffer.view(name).clone() for name in ("x", "y")}
    slots = torch.tensor([4, 17])
    buffer.update(slots, {"y": torch.tensor([100, 200])})
    assert buffer.view("y")[slots].tolist() == [100, 200]
    rest = torch.ones(20, dtype=torch.bool)
    rest[slots] = False
    assert torch.equal(buffer.view("y")[rest], before["y"][rest])
    assert torch.equal(buffer.view("x"), before["x"])
    with pytest.raises(UsageError, match="0 to 19"):
        buffer.update(torch.tensor([20]), {"y": torch.tensor([1])})
    with pytest.raises(UsageError, match="no column 'z'"):
        buffer.update(slots, {"z": torch.tensor([1, 2])})


def test_trees_are_stored_leaf_by_leaf():
    buffer = Buffer(4, seed=1)
    tokens = torch.arange(60).view(20, 3)
    buffer.add({"x": {"ids": tokens, "mask": (tokens % 2, [tokens > 5])}, "y": torch.arange(20)})
    drawn = buffer.sample(3)
    rows = tokens[drawn["y"]]
    expected = [rows, rows % 2, rows > 5]
    assert all(torch.equal(a, b) for a, b in zip(leaves(drawn["x"]), expected, strict=True))
    with pytest.raises(DataError, match="another structure"):
        buffer.add({"x": {"ids": tokens}, "y": torch.arange(20)})


def test_logits_widen_when_a_head_grows_and_remember_how_many_columns_were_valid():
    buffer = Buffer(10)
    buffer.add({"y": torch.zeros(4), "logits": torch.full((4, 2), 5.0)})
    buffer.add({"y": torch.zeros(3), "logits": torch.full((3, 5), 6.0)})
    buffer.add({"y": torch.zeros(1), "logits": torch.full((1, 3), 7.0)})
    assert buffer.view("valid").tolist() == [2] * 4 + [5] * 3 + [3]
    expected = torch.tensor([[5.0] * 2 + [0] * 3] * 4 + [[6.0] * 5] * 3 + [[7.0] * 3 + [0] * 2])
    assert torch.equal(buffer.view("logits"), expected)
    buffer.update(torch.tensor([0]), {"logits": torch.full((1, 4), 8.0)})
    assert buffer.view("valid")[0] == 4
    assert buffer.view("logits")[0].tolist() == [8, 8, 8, 8, 0]
    drawn = buffer.sample(8)
    assert torch.equal(drawn["valid"], buffer.view("valid")[drawn["slot"]])


def test_how_many_columns_are_valid_is_read_only_where_rows_differ_in_it():
    buffer, narrow = Buffer(10), Buffer(10)
    for each, width in ((buffer, 3), (narrow, 2)):
        each.add({"y": torch.zeros(4), "logits": torch.zeros(4, width)})
    assert "valid" not in buffer.sample(2)
    saved = Buffer(10)
    buffer.merge(narrow)
    assert "valid" in buffer.sample(2)
    saved.load_state_dict(buffer.state_dict())
    assert "valid" in saved.sample(2)


def test_a_plain_int_is_the_value_of_every_row():
    one, other = Buffer(5, seed=3), Buffer(5, seed=3)
    for start in range(0, 40, 8):
        x = torch.arange(start, start + 8)
        one.add({"x": x, "task": start})
        other.add({"x": x, "task": torch.full((8,), start)})
    assert torch.equal(one.view("x"), other.view("x"))
    assert torch.equal(one.view("task"), other.view("task"))
    assert torch.equal(one.view("task"), one.view("x") // 8 * 8)


def test_no_graph_is_kept():
    buffer = Buffer(10)
    z = torch.ones(3, 2, requires_grad=True) * 2
    buffer.add({"y": torch.zeros(3), "logits": z})
    assert not buffer.view("logits").requires_grad
    assert not buffer.sample(2)["logits"].requires_grad


def test_columns_are_checked_at_the_door():
    buffer = filled()
    with pytest.raises(UsageError, match="do not fit a buffer of task, x, y"):
        buffer.add({"x": torch.zeros(2, 2), "y": torch.zeros(2)})
    fill = Buffer(50)
    fill.add(batch(0, 5))
    with pytest.raises(DataError, match=r"buffer stores torch\.uint8"):
        fill.add(batch(0, 5) | {"x": torch.zeros(5, 2)})
    with pytest.raises(DataError, match=r"buffer stores torch\.uint8 \[2\]"):
        fill.add(batch(0, 5) | {"x": torch.zeros(5, 3, dtype=torch.uint8)})
    with pytest.raises(DataError, match="'y' has 4 rows, the batch has 5"):
        fill.add(batch(0, 5) | {"y": torch.zeros(4, dtype=torch.int64)})
    with pytest.raises(UsageError, match="buffer's own column"):
        Buffer(2).add({"slot": torch.zeros(1)})


def test_arguments_are_checked():
    with pytest.raises(UsageError, match="capacity is -1"):
        Buffer(-1)
    with pytest.raises(UsageError, match="give one of them"):
        Buffer(None)
    with pytest.raises(UnknownNameError, match="did you mean 'reservoir'"):
        Buffer(3, writing="reservoire")
    with pytest.raises(UnknownNameError, match="reading policy 'fifo'"):
        Buffer(3, reading="fifo")
    with pytest.raises(UsageError, match="integer class labels"):
        Buffer(3, writing="class_balanced").add({"x": torch.zeros(2, 2)})
    with pytest.raises(UsageError, match="capacity is -2"):
        Buffer(3).resize(-2)


def test_a_budget_in_bytes_decides_the_capacity():
    row = 2 + 8 + 8
    buffer = Buffer(None, bytes_budget=10 * row + 3)
    assert buffer.capacity is None
    buffer.add(batch(0, 50))
    assert buffer.capacity == len(buffer) == 10
    assert buffer.bytes() == 10 * row
    limited = Buffer(4, bytes_budget=10 * row)
    limited.add(batch(0, 50))
    assert len(limited) == 4
    with pytest.raises(UsageError, match="one row takes 18 bytes"):
        Buffer(None, bytes_budget=17).add(batch(0, 1))


def test_a_budget_holds_when_logits_widen():
    buffer = Buffer(None, bytes_budget=8 * (8 + 2 * 4 + 8))
    rows = torch.arange(30)
    buffer.add({"y": rows, "logits": rows[:, None].repeat(1, 2).float()})
    assert len(buffer) == 8
    kept = buffer.view("y").tolist()
    buffer.add({"y": rows[:0], "logits": torch.zeros(0, 6)})
    assert buffer.bytes() <= buffer.bytes_budget
    assert len(buffer) == 8 * 24 // 40
    assert set(buffer.view("y").tolist()) <= set(kept)
    assert torch.equal(buffer.view("logits")[:, 1], buffer.view("y").float())


def test_bytes_counts_what_is_reserved():
    buffer = Buffer(10)
    buffer.add({"x": torch.zeros(1, 3), "y": torch.zeros(1, dtype=torch.int64), "logits": torch.zeros(1, 5)})
    assert buffer.bytes() == 10 * (12 + 8 + 20 + 8)


def test_resizing_before_the_first_row():
    buffer = Buffer(3)
    buffer.resize(6)
    buffer.add(batch(0, 50))
    assert len(buffer) == 6


def test_merging_keeps_every_column_and_leaves_the_other_alone():
    one, two = Buffer(6, seed=1), Buffer(6, seed=2)
    for part, width, offset in ((one, 2, 0), (two, 4, 100)):
        rows = torch.arange(offset, offset + 50)
        part.add({"x": rows, "y": rows % 3, "logits": rows[:, None].repeat(1, width).float()})
    before = two.state_dict()
    one.merge(two)
    assert one.seen == 100
    assert len(one) == 6
    x = one.view("x")
    assert torch.equal(one.view("y"), x % 3)
    assert torch.equal(one.view("valid"), torch.where(x < 100, 2, 4))
    expected = x[:, None].float() * (torch.arange(4) < one.view("valid")[:, None])
    assert torch.equal(one.view("logits"), expected)
    assert torch.equal(two.view("x"), before["columns"]["x"])
    assert two.seen == 50
    empty = Buffer(6, seed=3)
    empty.merge(two)
    assert sorted(empty.view("x").tolist()) == sorted(two.view("x").tolist())
    with pytest.raises(UsageError, match="use two reservoirs"):
        one.merge(_class_balanced_twin(two))


def _class_balanced_twin(buffer: Buffer) -> Buffer:
    twin = Buffer(6, writing="class_balanced")
    twin.add({name: buffer.view(name) for name in ("x", "y", "logits")})
    return twin
