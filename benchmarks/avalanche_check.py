"""Whether the sides of a comparison do the same work: equal batch sizes, and the weights of a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.avalanche_sides import LEARNING_RATE, PAST, Anchored, Setting, Side, update

# Between weights that the same arithmetic leads to in another order, where now and then a unit near zero opens on one
# side alone; a step moves weights by up to 2e-3.
TOLERANCE = 1e-5


@contextmanager
def recorded(setting: Setting, model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Every batch that passes through the model."""
    labels = setting.data(PAST)[1]
    batches: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().clone()
        batches.append((x, labels[(x[:, 0] * len(labels)).round().long()]))

    hook = model.register_forward_pre_hook(keep)
    try:
        yield batches
    finally:
        hook.remove()


def check(setting: Setting, made: dict[str, Side], past: list[Anchored]) -> tuple[int, int]:
    """Steps and rows of one run, equal on all sides; on each, the weights are those of a plain loop on its batches.

    Raises
    ------
    AssertionError
        If a side forwards other numbers of rows, or its weights end anywhere else.
    """
    sizes: dict[str, list[int]] = {}
    for name, side in made.items():
        plain = setting.model()
        plain.load_state_dict(side.model.state_dict())
        optimizer = torch.optim.SGD(plain.parameters(), lr=LEARNING_RATE)
        with recorded(setting, side.model) as batches:
            side.run()
        for x, y in batches:
            update(plain, optimizer, x, y, past)
        for theirs, ours in zip(side.model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(
                theirs, ours, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{setting.what}, {n}: {m}"
            )
        sizes[name] = [len(y) for _, y in batches]
    first = next(iter(sizes.values()))
    if any(found != first for found in sizes.values()):
        raise AssertionError(f"{setting.what}: the sides forward batches of different sizes: {sizes}")
    return len(first), sum(first)
