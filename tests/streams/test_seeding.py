from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from perdure.seeding import derive, generator

PARTS = st.lists(st.integers() | st.text() | st.booleans() | st.none(), max_size=4).map(tuple)


@given(parts=PARTS)
def test_seeds_are_the_same_at_every_call_and_have_63_bits(parts: tuple[int | str | bool | None, ...]) -> None:
    assert derive(*parts) == derive(*parts)
    assert 0 <= derive(*parts) < 2**63


def test_different_parts_give_different_seeds() -> None:
    names = [(seed, use, task) for seed in range(20) for use in ("plan", "test") for task in range(20)]
    others = [(1, "2"), (12,), ("1", 2), ("12",), (1, 2), (True, 2), (None,), ()]
    assert len({derive(*parts) for parts in [*names, *others]}) == len(names) + len(others)


def test_known_seeds_never_change() -> None:
    assert derive(0, "plan", 3) == 8362229768921964477


def test_generators_are_private() -> None:
    state = torch.get_rng_state()
    first = torch.rand(4, generator=generator(0, "a"))
    assert torch.equal(first, torch.rand(4, generator=generator(0, "a")))
    assert not torch.equal(first, torch.rand(4, generator=generator(0, "b")))
    assert torch.equal(torch.get_rng_state(), state)
