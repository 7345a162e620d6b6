"""Which task owns a weight: claiming what is free, giving back the smallest, and how long there will be enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

FREE = 0
_WIDEST = 255


def pruned_count(owned: int, share: float) -> int:
    """How many of `owned` weights are given back: their `share`, rounded to a whole number (a half to an even one).

    >>> [pruned_count(10, share) for share in (0.0, 0.25, 0.75, 1.0)]
    [0, 2, 8, 10]
    """
    return round(share * owned)


def smallest(weight: Tensor, owned: Tensor, share: float) -> Tensor:
    """Boolean, shaped like `weight`: the `share` of its `owned` values that are nearest to zero.

    Exactly `pruned_count` values; of equal ones those with the lower index.

    >>> smallest(torch.tensor([3.0, -1.0, 1.0, 0.5]), torch.tensor([True, True, True, False]), 1 / 3)
    tensor([False,  True, False, False])
    """
    mine = owned.reshape(-1).nonzero()[:, 0]
    sizes = weight.reshape(-1)[mine].abs()
    chosen = mine[sizes.argsort(stable=True)[: pruned_count(len(mine), share)]]
    drop = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    drop[chosen] = True
    return drop.view(weight.shape)


def claim(owner: Tensor, where: Tensor, name: int) -> Tensor:
    """`owner` [P] with all free weights of `where` (boolean [P]) owned by the task of that number, from 1.

    The result is of uint8 as long as the numbers fit, then of int16.
    """
    if name > _WIDEST and owner.dtype == torch.uint8:
        owner = owner.to(torch.int16)
    return owner.masked_fill(where & (owner == FREE), name)


def shares_left(free: int, shares: Sequence[float]) -> Iterator[int]:
    """Weights that are free when each of the coming tasks begins, which give back these shares of what they claim.

    >>> list(shares_left(8, [0.5, 0.5, 0.0, 0.5]))
    [8, 4, 2, 0]
    """
    for share in shares:
        yield free
        free = pruned_count(free, share)
