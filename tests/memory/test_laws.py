"""The laws of the policies, tested on thousands of small buffers (all seeds are fixed)."""

from __future__ import annotations

import itertools

import pytest
import torch

from perdure.memory import Buffer
from perdure.memory.reading import distinct


def offer(buffer: Buffer, start: int, stop: int, size: int) -> None:
    for first in range(start, stop, size):
        rows = torch.arange(first, min(first + size, stop))
        buffer.add({"x": rows, "y": rows % 2})


def chi_square(counts: torch.Tensor, expected: torch.Tensor | float, variance_factor: float = 1.0) -> float:
    """Normalised to mean 1; `variance_factor` is 1 - p for inclusion counts of sampling without replacement."""
    return float(((counts - expected) ** 2 / expected).mean() / variance_factor)


def inclusion(length: int, runs: int, make) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each stream position is in the buffer, and the sizes."""
    counts, sizes = torch.zeros(length), []
    for seed in range(runs):
        stored = make(seed).view("x")
        assert len(stored.unique()) == len(stored)
        counts[stored] += 1
        sizes.append(len(stored))
    return counts, torch.tensor(sizes)


def assert_uniform(counts: torch.Tensor, sizes: torch.Tensor, runs: int) -> None:
    length = len(counts)
    share = sizes.float().mean() / length
    value = chi_square(counts, share * runs, float(1 - share))
    # The mean of n such terms has a standard deviation of sqrt(2 / n): 4.5 of them are one false alarm in 10^5.
    assert value < 1 + 4.5 * (2 / length) ** 0.5, value
    fifths = torch.stack([part.sum() for part in counts.tensor_split(5)]) / counts.sum()
    assert (fifths - 0.2).abs().max() < 4.5 * (0.16 / (runs * float(sizes.float().mean()))) ** 0.5, fifths


def plain(size):
    def make(seed):
        buffer = Buffer(8, seed=seed)
        offer(buffer, 0, 60, size)
        return buffer

    return make


def shrunk(seed):
    buffer = Buffer(16, seed=seed)
    offer(buffer, 0, 30, 7)
    buffer.resize(8)
    offer(buffer, 30, 60, 4)
    return buffer


def grown_before_loss(seed):
    buffer = Buffer(16, seed=seed)
    offer(buffer, 0, 6, 2)
    buffer.resize(8)
    offer(buffer, 6, 60, 5)
    return buffer


def grown_and_full_again(seed):
    buffer = Buffer(4, seed=seed)
    offer(buffer, 0, 20, 7)
    buffer.resize(8)
    offer(buffer, 20, 240, 9)
    return buffer


def grown_shrunk_and_grown(seed):
    buffer = Buffer(6, seed=seed)
    offer(buffer, 0, 12, 7)
    buffer.resize(9)
    offer(buffer, 12, 40, 9)
    buffer.resize(5)
    offer(buffer, 40, 60, 9)
    buffer.resize(7)
    offer(buffer, 60, 240, 9)
    return buffer


def merged(first, second, capacity=(8, 8)):
    def make(seed):
        one, two = Buffer(capacity[0], seed=(seed, 1)), Buffer(capacity[1], seed=(seed, 2))
        offer(one, 0, first, 7)
        offer(two, first, first + second, 7)
        one.merge(two)
        return one

    return make


def merged_and_continued(seed):
    buffer = merged(30, 10)(seed)
    offer(buffer, 40, 60, 3)
    return buffer


def merged_with_a_smaller_one(seed):
    buffer = merged(20, 20, (8, 3))(seed)
    offer(buffer, 40, 240, 9)
    return buffer


@pytest.mark.parametrize(
    ("make", "length"),
    [
        (plain(1), 60),
        (plain(10), 60),
        (plain(60), 60),
        (shrunk, 60),
        (grown_before_loss, 60),
        (grown_and_full_again, 240),
        (grown_shrunk_and_grown, 240),
        (merged(30, 30), 60),
        (merged(45, 15), 60),
        (merged(5, 55), 60),
        (merged_and_continued, 60),
        (merged_with_a_smaller_one, 240),
    ],
)
def test_reservoir_is_uniform_over_the_whole_stream(make, length):
    runs = 800
    counts, sizes = inclusion(length, runs, make)
    assert sizes.max() <= 8
    assert_uniform(counts, sizes, runs)


def test_reservoir_pairs_are_as_likely_as_in_a_random_subset():
    runs, pairs = 3000, torch.zeros(12, 12)
    for seed in range(runs):
        buffer = Buffer(3, seed=(seed, "pairs"))
        offer(buffer, 0, 12, 5)
        stored = buffer.view("x")
        pairs[stored[:, None], stored] += 1
    counts = pairs[tuple(torch.triu_indices(12, 12, 1))]
    assert chi_square(counts, runs * 3 / 66) < 1 + 4.5 * (2 / 66) ** 0.5


def test_a_grown_reservoir_lets_old_and_new_rows_in_alike_while_it_fills():
    """What was dropped is gone, so a buffer grown from 4 of 40 fills at the rate of 1 in 10, not at once."""
    runs = 800

    def make(seed):
        buffer = Buffer(4, seed=seed)
        offer(buffer, 0, 40, 10)
        buffer.resize(30)
        offer(buffer, 40, 80, 10)
        return buffer

    counts, _ = inclusion(80, runs, make)
    old, new = counts[:40].mean() / runs, counts[40:].mean() / runs
    assert old == pytest.approx(0.1, abs=1e-6)
    # The threshold is the fifth smallest of 40 keys: mean 5 / 41, standard deviation 0.05.
    assert new == pytest.approx(5 / 41, abs=4.5 * 0.05 / runs**0.5 + 0.005)


def test_a_buffer_emptied_and_reopened_starts_afresh():
    def make(seed):
        buffer = Buffer(8, seed=seed)
        offer(buffer, 0, 100, 10)
        buffer.resize(0)
        offer(buffer, 100, 120, 10)
        buffer.resize(8)
        offer(buffer, 120, 180, 10)
        return buffer

    counts, sizes = inclusion(180, 600, make)
    assert counts[:120].sum() == 0
    assert_uniform(counts[120:], sizes, 600)


def test_shrinking_keeps_a_uniform_subset_of_what_was_held():
    counts = torch.zeros(10)
    for seed in range(2000):
        buffer = Buffer(10, seed=seed)
        offer(buffer, 0, 10, 10)
        buffer.resize(4)
        counts[buffer.view("x")] += 1
    assert chi_square(counts, 800.0, 0.6) < 1 + 4.5 * (2 / 10) ** 0.5


@pytest.mark.parametrize(("size", "count"), [(6, 3), (2000, 2)])
def test_draws_are_uniform_over_ordered_choices(size, count):
    generator = torch.Generator().manual_seed(size)
    runs = 6000
    drawn = torch.stack([distinct(count, size, generator) for _ in range(runs)])
    assert all(len(row.unique()) == count for row in drawn[:500])
    if size == 6:
        cells = dict.fromkeys(itertools.permutations(range(6), 3), 0)
        for row in drawn.tolist():
            cells[tuple(row)] += 1
        counts = torch.tensor(list(cells.values())).float()
    else:
        counts = torch.stack([torch.bincount(drawn[:, i] // 100, minlength=20) for i in range(2)]).flatten().float()
    assert chi_square(counts, counts.mean()) < 1 + 4.5 * (2 / len(counts)) ** 0.5


def skewed(capacity: int, sizes: dict[int, int], seed: int) -> tuple[Buffer, torch.Tensor]:
    """A class-balanced buffer after a shuffled stream with that many rows of each class."""
    y = torch.cat([torch.full((count,), label) for label, count in sizes.items()])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    buffer = Buffer(capacity, writing="class_balanced", seed=seed)
    for part in torch.arange(len(y)).split(9):
        buffer.add({"x": part, "y": y[part]})
    return buffer, y


def test_class_balanced_keeps_small_classes_whole_and_the_rest_even():
    for seed in range(20):
        buffer, y = skewed(30, {0: 400, 1: 60, 2: 3, 3: 25, 4: 5}, seed)
        counts = torch.bincount(buffer.view("y"), minlength=5)
        assert torch.equal(y[buffer.view("x")], buffer.view("y"))
        assert counts[2] == 3
        assert counts[4] == 5
        assert counts.sum() == 30
        large = counts[[0, 1, 3]]
        assert large.max() - large.min() <= 1


@pytest.mark.parametrize("order", ["shuffled", "sorted"])
def test_class_balanced_counts_differ_by_one_at_most_once_every_class_was_seen_often_enough(order):
    y = torch.arange(7).repeat_interleave(torch.tensor([200, 9, 30, 6, 80, 12, 7]))
    if order == "shuffled":
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(5))]
    buffer = Buffer(40, writing="class_balanced")
    for row in range(len(y)):
        buffer.add({"x": torch.tensor([row]), "y": y[row : row + 1]})
        seen = torch.bincount(y[: row + 1])
        if (seen[seen > 0] >= 40 / (seen > 0).sum()).all():
            counts = torch.bincount(buffer.view("y"), minlength=len(seen))[seen > 0]
            assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("change", ["nothing", "shrink", "grow", "merge"])
def test_class_balanced_is_uniform_within_a_class(change):
    runs = 800
    counts = torch.zeros(3, 60)
    for seed in range(runs):
        buffer = Buffer(12, writing="class_balanced", seed=(seed, change))
        other = Buffer(12, writing="class_balanced", seed=(seed, change, 2))
        for start in range(0, 60, 10):
            if change == "shrink" and start == 30:
                buffer.resize(9)
            if change == "grow" and start == 10:
                buffer.resize(15)
            rows = torch.arange(start, start + 10)
            target = other if change == "merge" and start >= 20 else buffer
            target.add({"x": rows.repeat(3), "y": torch.arange(3).repeat_interleave(10)})
        if change == "merge":
            buffer.merge(other)
        counts[buffer.view("y"), buffer.view("x")] += 1
    assert counts.sum(1).std() / counts.sum(1).mean() < 0.01
    for row in counts:
        share = row.sum() / runs / 60
        assert chi_square(row, row.mean(), float(1 - share)) < 1 + 4.5 * (2 / 60) ** 0.5


@pytest.mark.parametrize("column", ["class", "task"])
def test_balanced_reading_takes_groups_evenly_and_rows_of_a_group_alike(column):
    groups = torch.tensor([0] * 20 + [1] * 3 + [2] * 9)
    buffer = Buffer(50, reading=f"{column}_balanced", seed=6)
    buffer.add({"x": torch.arange(32), "y": groups, "task": groups})
    rows, last = torch.zeros(32), torch.zeros(3)
    for _ in range(2000):
        drawn = buffer.sample(7)["slot"]
        counts = torch.bincount(groups[drawn], minlength=3)
        assert sorted(counts.tolist()) == [2, 2, 3]
        assert len(drawn.unique()) == 7
        rows[drawn] += 1
        last += counts == 3
    assert chi_square(last, 2000 / 3, 2 / 3) < 1 + 4.5 * (2 / 3) ** 0.5
    for group in range(3):
        inside = rows[groups == group]
        assert chi_square(inside, inside.mean(), 1 - float(inside.mean()) / 2000) < 1 + 4.5 * (2 / len(inside)) ** 0.5
    counts = torch.bincount(groups[buffer.sample(15)["slot"]])
    assert counts.tolist() == [6, 3, 6]
    only = buffer.sample(4, where=buffer.view("y") != 0)["slot"]
    assert torch.bincount(groups[only], minlength=3).tolist() == [0, 2, 2]
    assert len(buffer.sample(100)["slot"]) == 32
