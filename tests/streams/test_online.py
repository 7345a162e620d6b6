"""Online, gradual and blurry streams: every row arrives once, and as much of each task as the definition says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numbered_streams import arrived, numbered

from perdure.data.examples import DatasetExamples, Examples
from perdure.data.joined import JoinedExamples, pooled
from perdure.errors import UsageError
from perdure.streams import blurry, online
from perdure.streams.task import Stream, Task
from perdure.streams.transforms import Permute

SIZES = st.lists(st.integers(2, 40), min_size=2, max_size=5)


@given(sizes=SIZES, transition=st.sampled_from([0.0, 0.3, 1.0]), classes=st.integers(1, 2))
def test_every_row_arrives_once_and_every_part_keeps_its_size(
    sizes: list[int], transition: float, classes: int
) -> None:
    base = numbered(sizes, classes)
    stream = online(base, transition=transition)
    assert stream.scenario == "online"
    assert not stream.announced
    rows = arrived(stream)
    assert [len(part) for part in rows] == sizes
    assert sorted(row for part in rows for row in part) == list(range(sum(sizes)))
    targets = torch.cat([task.train.targets for task in base])
    for task in stream:
        x, y, _ = next(task.train.ordered(1000))
        assert torch.equal(y, targets[x[:, 0].long()])
        assert task.test is base[task.index].test
        assert task.classes == base[task.index].classes


@pytest.mark.parametrize("sizes", [[400, 400, 400], [200, 600, 400]])
@pytest.mark.parametrize("transition", [0.5, 1.0])
def test_the_share_of_the_next_task_rises_linearly_around_a_boundary(sizes: list[int], transition: float) -> None:
    """Counts up to any moment are within two rows of the integral of the density, which is worked out here."""
    stream = online(numbered(sizes), transition=transition)
    order = torch.tensor([row for part in arrived(stream) for row in part])
    ends = torch.tensor(sizes).cumsum(0)
    owner = torch.bucketize(order, ends, right=True)
    time = torch.arange(1, len(order) + 1, dtype=torch.float64)
    later = torch.zeros(len(order))
    for boundary in range(len(sizes) - 1, 0, -1):
        half = transition / 2 * min(sizes[boundary - 1], sizes[boundary])
        into = (time - ends[boundary - 1]).clamp(-half, half) + half
        # Rows of the tasks from here on: the integral of the ramp, and then every row.
        expected = into**2 / (4 * half) + (time - ends[boundary - 1] - half).clamp_min(0)
        later = (owner >= boundary).cumsum(0)
        assert float((later - expected).abs().max()) <= 2.0
    middle = order[int(ends[0] - 10) : int(ends[0] + 10)]
    assert 6 <= int((middle >= ends[0]).sum()) <= 14, "at the boundary itself the two tasks are half and half"


def test_without_a_transition_the_order_is_the_one_of_the_announced_stream() -> None:
    base = numbered([9, 7])
    assert arrived(online(base)) == arrived(base)


def test_a_gradual_order_is_drawn_from_the_seed_and_passes_alike_again() -> None:
    base = numbered([30, 30])
    first = online(base, transition=1.0)
    assert arrived(first) == arrived(online(base, transition=1.0))
    other = base.replace(base.tasks, seed=4)
    assert arrived(first) != arrived(online(other, transition=1.0))
    twice = arrived(first, epochs=2)
    assert twice == [part * 2 for part in arrived(first)], "the order is the stream's own, not a shuffle of each pass"


@given(sizes=SIZES, share=st.sampled_from([0.0, 0.1, 0.5, 0.9]), classes=st.integers(1, 3))
def test_a_blurry_phase_holds_its_share_of_other_tasks(sizes: list[int], share: float, classes: int) -> None:
    base = numbered(sizes, classes)
    phases = blurry(base, share=share)
    rows = arrived(phases)
    assert sorted(row for part in rows for row in part) == list(range(sum(sizes)))
    ends = torch.tensor(sizes).cumsum(0)
    owners = [torch.bucketize(torch.tensor(part), ends, right=True) for part in rows]
    for index, task in enumerate(base):
        counts = torch.unique(task.train.targets, return_counts=True)[1]
        away = sum(round(share * int(count)) for count in counts)
        elsewhere = [int((owners[phase] == index).sum()) for phase in range(len(sizes)) if phase != index]
        assert sum(elsewhere) == away
        assert max(elsewhere) - min(elsewhere) <= 1, "what leaves a task is dealt out evenly"
    for task in phases:
        x, y, _ = next(task.train.ordered(1000))
        assert torch.equal(y, torch.cat([t.train.targets for t in base])[x[:, 0].long()])


def test_blurry_phases_of_equal_tasks_are_foreign_by_the_share() -> None:
    phases = blurry(numbered([200, 200, 200]), share=0.3)
    assert phases.scenario == "blurry"
    for phase in phases:
        foreign = phase.train.targets // 2 != phase.index
        assert abs(float(foreign.double().mean()) - 0.3) < 0.01


def test_a_part_of_a_stream_is_blurred_by_its_own_tasks() -> None:
    base = numbered([40, 40, 40])
    part = base.replace(base[1:])
    phases = blurry(part, share=0.25)
    assert [phase.index for phase in phases] == [1, 2]
    assert sorted(row for rows in arrived(phases) for row in rows) == list(range(40, 120))
    assert [
        sum(row // 40 == phase.index for row in rows) for phase, rows in zip(phases, arrived(phases), strict=True)
    ] == [
        30,
        30,
    ]


def test_a_phase_of_domains_is_blurred_by_rows_of_the_others() -> None:
    phases = blurry(numbered([100, 100], scenario="domain"), share=0.2)
    assert phases.shares_classes
    assert [sum(row >= 100 for row in part) for part in arrived(phases)] == [20, 80]


@pytest.mark.parametrize("shape", [lambda s: online(s, transition=0.5), blurry])
def test_what_is_transformed_or_read_from_a_data_set_stays_where_it_is(shape: Any) -> None:
    x, y = torch.rand(12, 3), torch.arange(12) % 2
    plain = Examples(x, y)
    turned = plain.with_transform(Permute(torch.tensor([2, 0, 1])))
    read = DatasetExamples(torch.utils.data.TensorDataset(x[:, [1, 2, 0]], y))
    stream = shape(
        Stream([Task(0, "a", turned, None, (0, 1)), Task(1, "b", read, None, (0, 1))], scenario="domain", seed=0)
    )
    assert all(isinstance(task.train, JoinedExamples) for task in stream)
    found = [x for task in stream for x, _, _ in task.train.ordered(5)]
    expected = torch.cat([turned.gather(torch.arange(12))[0], x[:, [1, 2, 0]]])
    assert torch.equal(torch.cat(found).sort(0).values, expected.sort(0).values)


def test_pooled_rows_are_those_of_the_parts_and_are_laid_out_only_where_that_is_cheap() -> None:
    a, b = Examples(torch.rand(4, 2), torch.arange(4)), Examples(torch.rand(3, 2), torch.arange(3) + 4)
    rows = torch.tensor([6, 0, 3, 4])
    plain, lazy = pooled([a, b], rows), JoinedExamples([a, b]).subset(rows)
    assert type(plain) is Examples
    assert torch.equal(plain.x, torch.cat([a.x, b.x])[rows])
    assert torch.equal(plain.targets, rows)
    assert torch.equal(lazy.gather(torch.arange(4))[0], plain.x)


def test_joined_examples_in_another_order_have_another_fingerprint() -> None:
    joined = JoinedExamples([Examples(torch.rand(4, 2), torch.zeros(4)), Examples(torch.rand(3, 2), torch.zeros(3))])
    prints = {joined.subset(rows).fingerprint() for rows in (torch.arange(7), torch.arange(7).flip(0), torch.arange(6))}
    assert len(prints) == 3
    assert joined.subset(torch.arange(7)).fingerprint() == joined.fingerprint()


def test_fingerprints_tell_every_form_apart() -> None:
    base = numbered([30, 30, 30])
    forms = [
        base, online(base), online(base, transition=0.5), online(base, transition=1.0), blurry(base, share=0.0),
        blurry(base, share=0.2), base.replace(base.tasks, shuffle=False),
    ]  # fmt: skip
    assert len({form.fingerprint() for form in forms}) == len(forms)
    assert blurry(base, share=0.2).fingerprint() == blurry(base, share=0.2).fingerprint()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s: online(s, transition=1.5), r"transition=1.5 should be between 0 \(abrupt\) and 1"),
        (lambda s: online(s, transition=-0.1), "transition=-0.1"),
        (lambda s: blurry(s, share=1.0), "share=1.0 should be at least 0 and below 1"),
        (lambda s: blurry(s, share=-0.5), "share=-0.5"),
    ],
)
def test_what_makes_no_stream_is_refused(call: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        call(numbered([5, 5]))


def test_a_single_task_has_no_boundary_to_blur() -> None:
    assert arrived(online(numbered([6]), transition=1.0)) == arrived(blurry(numbered([6]))) == arrived(numbered([6]))
