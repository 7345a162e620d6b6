"""Seeds derived from names, so that every random choice has a generator of its own.

A seed that is counted up, or one generator that several parts share, ties every draw to what was drawn before it. Here
a seed is a digest of what it is for: `(stream seed, "plan", task index)` always gives the same number, whoever else
draws.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Part = int | str | float | bool | None


def derive(*parts: Part) -> int:
    """Return the 63-bit seed that belongs to `parts`: the first 63 bits of the sha256 of their JSON text.

    >>> derive(0, "plan", 3) == derive(0, "plan", 3)
    True
    >>> derive(0, "plan", 3) == derive(0, "plan", "3")
    False
    """
    digest = hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: Part, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a new generator on `device` seeded with `derive(*parts)`.

    >>> bool(torch.rand((), generator=generator(0, "noise")) == torch.rand((), generator=generator(0, "noise")))
    True
    """
    return torch.Generator(device=device).manual_seed(derive(*parts))


def uniforms(index: Tensor, width: int, *parts: Part) -> Tensor:
    """Return `width` numbers in [0, 1) for each of `index`, int64 [n], as float32 [n, width]: no generator, no state.

    Number (i, k) depends on `parts`, i, k and `width` alone: it is the draw `i * width + k` of a SplitMix64 generator
    seeded with `derive(*parts)`. So any row of an endless stream can be made at any time, alone or in a batch.

    Source: G. L. Steele, D. Lea, C. H. Flood, Fast Splittable Pseudorandom Number Generators, 2014.

    >>> bool((uniforms(torch.tensor([7]), 3, 0, "x") == uniforms(torch.arange(10), 3, 0, "x")[7]).all())
    True
    """
    columns: npt.NDArray[np.uint64] = np.arange(1, width + 1, dtype=np.uint64)
    z = index.numpy().astype(np.uint64)[:, None] * np.uint64(width) + columns
    z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive(*parts))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))


def normals(index: Tensor, width: int, *parts: Part) -> Tensor:
    """Return standard normal numbers, float32 [n, width], of the same kind as `uniforms` (Box and Muller, 1958)."""
    u = uniforms(index, 2 * width, *parts)
    return (-2 * (1 - u[:, :width]).log()).sqrt() * (2 * torch.pi * u[:, width:]).cos()
