"""`python -m benchmarks.gem`: GEM's projection against the usual route through NumPy and quadprog.

Twenty memory gradients of a million values, some of which the gradient violates. The usual route copies everything to
float64, forms the Gram matrix there and hands it to quadprog; without that package its row is left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.rows import HEAD, Row
from benchmarks.timing import interleave, ratio
from perdure.methods.projection import gem_projection

TASKS, VALUES, MARGIN, EPS = 20, 1_000_000, 0.5, 1e-3


def problem(tasks: int = TASKS, size: int = VALUES) -> tuple[Tensor, Tensor]:
    """Memory gradients [tasks, size] that have something in common, and a gradient [size] that violates many."""
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(size, generator=draw)
    memories = 0.3 * shared + torch.randn(tasks, size, generator=draw)
    return memories / size**0.5, (torch.randn(size, generator=draw) - 0.2 * shared) / size**0.5


def through_quadprog(memories: Tensor, gradient: Tensor, margin: float = MARGIN, eps: float = EPS) -> Tensor:
    """The programme as it is usually solved: Lopez-Paz and Ranzato 2017, arXiv 1706.08840."""
    quadprog: Any = importlib.import_module("quadprog")
    if not (torch.mv(memories, gradient) < 0).any():
        return gradient
    rows, g = memories.double().numpy(), gradient.double().numpy()
    gram = rows @ rows.T
    gram = 0.5 * (gram + gram.T) + np.eye(len(rows)) * eps
    v = quadprog.solve_qp(gram, -(rows @ g), np.eye(len(rows)), np.full(len(rows), margin))[0]
    return torch.from_numpy(v @ rows + g).to(gradient.dtype)


def variants() -> dict[str, Callable[[], object]]:
    memories, gradient = problem()
    agreeing = memories.mean(0)
    runs: dict[str, Callable[[], object]] = {
        "projection": lambda: gem_projection(memories, gradient, MARGIN, EPS),
        "check": lambda: gem_projection(memories, agreeing, MARGIN, EPS),
    }
    if importlib.util.find_spec("quadprog") is not None:
        ours, theirs = gem_projection(memories, gradient, MARGIN, EPS), through_quadprog(memories, gradient)
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        runs["quadprog"] = lambda: through_quadprog(memories, gradient)
    return runs


def rows(rounds: int = 21) -> Iterator[Row]:
    """The quadprog route in multiples of our time, where that package is installed; then what the check alone takes."""
    seconds = interleave(variants(), rounds)
    what, ours = f"{TASKS} x {VALUES:,}", "our projection"
    if "quadprog" in seconds:
        times = ratio(seconds, "quadprog", "projection")
        yield Row(what, "GEM, through NumPy and quadprog", ours, *times, goal=4.0, more=True)
    yield Row.of(what, "GEM, nothing violated", ours, seconds, ("check", "projection"), None)


def main() -> int:
    torch.set_num_threads(1)
    found = list(rows())
    print("\n".join([HEAD, *map(str, found)]))
    if importlib.util.find_spec("quadprog") is None:
        print("quadprog is not installed: pip install quadprog")
    return 1 if any(row.missed for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
