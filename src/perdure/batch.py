"""The rows of one training step: the current ones first, remembered or generated ones after, each source by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from perdure.errors import UsageError
from perdure.tree import cat, rows, take

Allowed = Tensor | slice | None
"""Which class columns the criterion may use: all (None), one block for every row, or a boolean mask [rows, columns]."""


@dataclass(slots=True)
class Source:
    """Rows of one origin; not to be changed, but replaced.

    Attributes
    ----------
    x, y
        Inputs in their stored form (uint8 stays uint8 until the forward pass) and targets, `size` rows each.
    share
        None: the rows belong to the pooled mean. A number: they count as that number times their mean; 0 keeps them
        from the criterion.
    separate
        Whether they get a forward pass of their own (it matters to batch normalisation).
    prepared
        Whether `x` is what the model takes already (rows that a generator made), not the stored form.
    tasks
        int64 [rows], the task index of every row, or None where unknown; the current rows' task is the batch's.
    allowed
        Class columns for the criterion, beyond what the scenario says.
    extras
        Whatever the method that added the rows wants to find again (stored logits, ...), row by row.
    whole
        Rows of this source in the whole batch, when this is a piece of it (gradient accumulation).
    raw
        The inputs as they came, where `x` is an augmented view of them: what a memory stores. None: they are `x`.
    new
        Boolean [rows] on the CPU, of current rows: which are the task's own, where a method has put rows of the past
        among its data. None: all are.
    """

    name: str
    x: Any
    y: Any
    share: float | None = None
    separate: bool = False
    prepared: bool = False
    tasks: Tensor | None = None
    allowed: Allowed = None
    extras: dict[str, Any] = field(default_factory=dict)
    whole: int | None = None
    raw: Any = None
    new: Tensor | None = None
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = rows(self.x)

    @property
    def stored(self) -> Any:
        """The inputs as a memory keeps them: without augmentation."""
        return self.x if self.raw is None else self.raw

    def only_new(self, values: Any) -> Any:
        """Of `values` (a tensor or tree, one row for each of this source's) those of the new rows."""
        return values if self.new is None else take(values, self.new.nonzero()[:, 0])

    def piece(self, index: slice) -> Source:
        """Some rows of this source, which remember how many there were."""
        return replace(
            self,
            x=take(self.x, index),
            y=take(self.y, index),
            tasks=None if self.tasks is None else self.tasks[index],
            allowed=self.allowed[index] if isinstance(self.allowed, Tensor) else self.allowed,
            extras=take(self.extras, index),
            whole=self.whole or self.size,
            raw=None if self.raw is None else take(self.raw, index),
            new=None if self.new is None else self.new[index],
        )


class Batch:
    """Named sources in order; `outputs` of the forward pass have their rows in the same order.

    Attributes
    ----------
    task
        Index of the current task, or None where there is none.
    index
        int64 [current rows]: rows of the task's training data, or None in a loop that gives none.
    first_pass
        Whether the current rows are seen for the first time (a buffer stores those that are new then and only then).
    pooled
        Rows without a share in the whole batch, when this is a piece of it; a piece may lack a small source.
    augment
        What changes remembered inputs at random, as it changed the current ones; None: nothing does.
    """

    def __init__(
        self,
        sources: tuple[Source, ...],
        task: int | None = None,
        index: Tensor | None = None,
        first_pass: bool = True,
        pooled: int | None = None,
        augment: Callable[[Any], Any] | None = None,
    ) -> None:
        self.sources = sources
        self.task = task
        self.index = index
        self.first_pass = first_pass
        self.pooled = pooled
        self.augment = augment
        self._parts: tuple[Tensor, dict[str, Tensor]] | None = None

    @classmethod
    def current(
        cls, x: Any, y: Any, task: int | None = None, index: Tensor | None = None, first_pass: bool = True
    ) -> Batch:
        """A batch of current rows alone."""
        return cls((Source("current", x, y),), task, index, first_pass)

    @property
    def now(self) -> Source:
        """The current rows."""
        return self.sources[0]

    @property
    def size(self) -> int:
        """Rows of all sources."""
        return sum(source.size for source in self.sources)

    def with_sources(self, *sources: Source) -> Batch:
        """The same step with other sources."""
        return Batch(sources, self.task, self.index, self.first_pass, self.pooled, self.augment)

    def augmented(self, x: Any) -> Any:
        """Remembered inputs, changed at random if this run augments its inputs."""
        return x if self.augment is None else self.augment(x)

    def add(self, name: str, x: Any, y: Any, **options: Any) -> Batch:
        """This batch and a new source behind it; the options are those of `Source`. A taken name is an error."""
        if self.find(name) is not None:
            raise UsageError(f"the batch has a source '{name}' already; give the second one another name")
        source = Source(name, x, y, **options)
        return self.with_sources(*self.sources, source)

    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    def find(self, name: str) -> Source | None:
        """The source of that name, or None."""
        for source in self.sources:
            if source.name == name:
                return source
        return None

    def slice(self, name: str) -> slice:
        """Where a source's rows lie in the outputs."""
        start = 0
        for source in self.sources:
            if source.name == name:
                return slice(start, start + source.size)
            start += source.size
        raise UsageError(f"the batch has no source '{name}'; it has {', '.join(self.names())}")

    def part(self, name: str, outputs: Tensor) -> Tensor:
        """The rows of `outputs` that belong to a source.

        The outputs are split once for everybody who asks: every slice of its own would have the backward pass fill and
        add up a tensor of all rows.
        """
        if len(self.sources) == 1 and self.now.name == name:
            return outputs
        if self._parts is None or self._parts[0] is not outputs:
            pieces = outputs.split_with_sizes([source.size for source in self.sources])
            self._parts = outputs, dict(zip(self.names(), pieces, strict=True))
        if name not in self._parts[1]:
            raise UsageError(f"the batch has no source '{name}'; it has {', '.join(self.names())}")
        return self._parts[1][name]

    def mean(self, name: str, values: Tensor) -> Tensor:
        """Mean over a source's rows of `values` [rows], one a row.

        In a piece of a batch the sum is divided by the whole batch's rows, so that the pieces add up to the mean.
        """
        source = self.find(name)
        if source is None or source.whole is None:
            return values.mean()
        return values.sum() / source.whole

    def pieces(self, count: int) -> Iterator[Batch]:
        """At most `count` smaller batches, each with the same mix of sources; sizes differ by one row at most."""
        count = min(count, self.now.size)
        if count == 1:
            yield self
            return
        pooled = sum(source.size for source in self.sources if source.share is None)
        bounds = [[source.size * i // count for i in range(count + 1)] for source in self.sources]
        for i in range(count):
            parts = [source.piece(slice(b[i], b[i + 1])) for source, b in zip(self.sources, bounds, strict=True)]
            index = None if self.index is None else self.index[bounds[0][i] : bounds[0][i + 1]]
            yield Batch(tuple(p for p in parts if p.size), self.task, index, self.first_pass, pooled)

    def in_order(self, outputs: Sequence[Tensor], count: int) -> Tensor:
        """The outputs of `pieces(count)`, put back into the order of this batch's rows."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.names()}
        for piece, out in zip(self.pieces(count), outputs, strict=True):
            for source, found in zip(piece.sources, out.split_with_sizes([s.size for s in piece.sources]), strict=True):
                parts[source.name].append(found)
        return torch.cat([part for found in parts.values() for part in found])


def joined(sources: tuple[Source, ...]) -> Any:
    """The inputs of some sources as one; a single source is not copied."""
    return cat([source.x for source in sources])


def joined_targets(sources: tuple[Source, ...]) -> Any:
    """The targets of some sources as one."""
    return cat([source.y for source in sources])


def as_mask(allowed: Allowed, count: int, columns: int, device: torch.device) -> Tensor:
    """`allowed` written out as a boolean mask [count, columns]."""
    if isinstance(allowed, Tensor):
        return allowed.expand(count, -1)
    mask = torch.ones(count, columns, dtype=torch.bool, device=device)
    if isinstance(allowed, slice):
        mask[:, : allowed.start] = False
        mask[:, allowed.stop :] = False
    return mask
