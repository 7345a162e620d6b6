"""Seeds derived from names, so that every random choice has a generator of its own.

A seed that is counted up, or one generator that several parts share, ties every draw to what was drawn before it. Here
a seed is a digest of what it is for: `(stream seed, "plan", task index)` always gives the same number, whoever else
draws.
"""

from __future__ import annotations

import hashlib
import json

import torch

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
