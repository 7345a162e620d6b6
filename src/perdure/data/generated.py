"""Examples that are a function of their number: made when they are needed, and never kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from perdure.data.examples import Examples, Transform, describe
from perdure.tree import leaves

Make = Callable[[Tensor], tuple[Any, Tensor]]
"""From row numbers, int64 [b], to inputs [b, ...] and targets [b]; a number gives the same row in every batch."""

SAMPLED = 256


class GeneratedExamples(Examples):
    """So many rows that `make` gives for the numbers 0 to `count - 1`; they take no memory.

    >>> squares = GeneratedExamples(lambda rows: (rows.float().square().unsqueeze(1), rows % 2), 10**12)
    >>> len(squares), squares.gather(torch.tensor([3, 4]))
    (1000000000000, (tensor([[ 9.],
            [16.]]), tensor([1, 0])))
    """

    def __init__(
        self,
        make: Make,
        count: int,
        *,
        rows: Tensor | None = None,
        y: Tensor | None = None,
        transform: Transform | None = None,
    ) -> None:
        self.make, self.count = make, count
        self.rows, self.y, self.transform = rows, y, transform
        self.x = None

    def __len__(self) -> int:
        return self.count if self.rows is None else len(self.rows)

    @property
    def targets(self) -> Tensor:  # type: ignore[override]
        """All targets [n], made for whoever asks: the one thing here that takes memory."""
        if self.y is not None:
            return self.y
        return torch.cat([y for _, y, _ in self.ordered(1 << 16)])

    def gather(self, rows: Tensor, number: int = 0) -> tuple[Any, Tensor]:
        x, y = self.make(rows if self.rows is None else self.rows.index_select(0, rows))
        return x if self.transform is None else self.transform(x), y if self.y is None else self.y.index_select(0, rows)

    def ordered(self, batch_size: int) -> Iterator[tuple[Any, Tensor, Tensor]]:
        for start in range(0, len(self), batch_size):
            rows = torch.arange(start, min(start + batch_size, len(self)))
            yield *self.gather(rows), rows

    def subset(self, rows: Tensor) -> Examples:
        index = rows if self.rows is None else self.rows.index_select(0, rows)
        y = None if self.y is None else self.y.index_select(0, rows)
        return GeneratedExamples(self.make, self.count, rows=index, y=y, transform=self.transform)

    def fingerprint(self) -> str:
        """Return a short digest of the number of rows and of up to 256 evenly spaced ones."""
        count = min(len(self), SAMPLED)
        x, y = self.gather(torch.arange(count) * len(self) // max(1, count))
        digest = hashlib.sha256(f"{len(self)} {'' if self.transform is None else describe(self.transform)}".encode())
        for leaf in [*leaves(x), y]:
            digest.update(f"{leaf.dtype} {list(leaf.shape)}".encode())
            digest.update(leaf.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _with(self, y: Tensor | None, rows: Tensor | None, transform: Transform | None) -> Examples:
        return GeneratedExamples(self.make, self.count, rows=rows, y=y, transform=transform)

    def with_transform(self, transform: Transform) -> Examples:
        chained = Examples(torch.empty(0, 1), torch.empty(0), transform=self.transform).with_transform(transform)
        return self._with(self.y, self.rows, chained.transform)
