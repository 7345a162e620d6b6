"""Several sets of examples as one, row after row, without copying them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from perdure.data.examples import Examples, Transform
from perdure.tree import cat, take


class JoinedExamples(Examples):
    """The rows of `parts` one after another; each part keeps its own transform.

    Where a method adds rows of the past to a task's own, `own` is the number of the part that is new.

    >>> a = Examples(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    >>> b = Examples(torch.ones(1, 3), torch.ones(1, dtype=torch.int64))
    >>> JoinedExamples([a, b]).gather(torch.tensor([2, 0]))[1]
    tensor([1, 0])
    """

    def __init__(
        self,
        parts: Sequence[Examples],
        y: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        transform: Transform | None = None,
        own: int | None = None,
    ) -> None:
        self.parts = list(parts)
        self.own = own
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        every = torch.cat([part.targets for part in parts])
        index = torch.arange(len(every)) if rows is None else rows
        super().__init__(None, every.index_select(0, index) if y is None else y, rows=index, transform=transform)

    def owners(self, rows: Tensor) -> Tensor:
        """Which part each of `rows` [b] belongs to, int64 [b]."""
        assert self.rows is not None
        return torch.searchsorted(self.ends, self.rows.index_select(0, rows), right=True)

    def gather(self, rows: Tensor, number: int = 0) -> tuple[Any, Tensor]:
        assert self.rows is not None
        index, owners, found, order = self.rows.index_select(0, rows), self.owners(rows), [], []
        for owner in torch.unique(owners).tolist():
            chosen = (owners == owner).nonzero()[:, 0]
            start = 0 if owner == 0 else int(self.ends[owner - 1])
            found.append(self.parts[owner].gather(index[chosen] - start, number)[0])
            order.append(chosen)
        x = take(cat(found), torch.cat(order).argsort())
        return x if self.transform is None else self.transform(x), self.targets.index_select(0, rows)

    def batches(self, plan: Iterable[Tensor], first: int = 0) -> Iterator[tuple[Any, Tensor, Tensor]]:
        for number, rows in enumerate(plan, first):
            yield *self.gather(rows, number), rows

    def ordered(self, batch_size: int) -> Iterator[tuple[Any, Tensor, Tensor]]:
        return self.batches(torch.split(torch.arange(len(self)), batch_size))

    def fingerprint(self) -> str:
        parts = "+".join(part.fingerprint() for part in self.parts)
        if self.rows is None or (len(self.rows) == self.ends[-1] and bool((self.rows.diff() == 1).all())):
            return parts
        return f"{parts}[{hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()[:16]}]"

    def _with(self, y: Tensor, rows: Tensor | None, transform: Transform | None) -> Examples:
        return JoinedExamples(self.parts, y, rows=rows, transform=transform, own=self.own)


def new_rows(data: Any, rows: Tensor | None) -> Tensor | None:
    """Which of `rows` [b] are a task's own, boolean [b] on the CPU; None if all are, or nobody can tell."""
    if rows is None or not isinstance(data, JoinedExamples) or data.own is None:
        return None
    new = data.owners(rows.cpu()) == data.own
    return None if bool(new.all()) else new


def own_examples(data: Any) -> Any:
    """A task's own examples, without those that a method has added; whatever else a task has as its data is its own.

    >>> old, new = (Examples(torch.full((n, 1), n), torch.zeros(n, dtype=torch.int64)) for n in (2, 3))
    >>> len(own_examples(JoinedExamples([new, old], own=0))), len(own_examples(old))
    (3, 2)
    """
    new = new_rows(data, torch.arange(len(data))) if isinstance(data, JoinedExamples) else None
    return data if new is None else data.subset(new.nonzero()[:, 0])


def pooled(parts: Sequence[Examples], rows: Tensor) -> Examples:
    """`rows`, int64 [n], of the parts one after another, in that order.

    Plain tensors are laid out anew, which makes every batch one gather; what is transformed or read from a `Dataset` is
    addressed where it is.
    """
    joined = JoinedExamples(parts)
    chosen = joined.subset(rows)
    plain = all(type(part) is Examples and isinstance(part.x, Tensor) and part.transform is None for part in parts)
    if not plain or len({(part.x.dtype, part.x.shape[1:]) for part in parts}) > 1:
        return chosen
    x = parts[0].x.new_empty((len(rows), *parts[0].x.shape[1:]))
    owners = joined.owners(rows)
    for number, part in enumerate(parts):
        where = (owners == number).nonzero()[:, 0]
        start = 0 if number == 0 else int(joined.ends[number - 1])
        x[where] = part.gather(rows[where] - start)[0]
    return Examples(x, chosen.targets)
