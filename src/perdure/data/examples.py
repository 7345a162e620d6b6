"""Examples addressed by row: in memory in their stored dtype, or in anybody's map-style `Dataset`."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from perdure.data.items import Items
from perdure.data.source import read_path
from perdure.data.validation import check_inputs, check_targets
from perdure.errors import DataError
from perdure.tree import leaves, take

Transform = Callable[[Tensor], Tensor]
FINGERPRINT_BYTES = 1 << 20


@dataclass(frozen=True)
class Chain:
    """Several transforms, applied one after the other."""

    transforms: tuple[Transform, ...]

    def __call__(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x

    def describe(self) -> str:
        """What the transforms do, in order."""
        return ", then ".join(describe(transform) for transform in self.transforms)


def describe(transform: Any) -> str:
    """Return what a transform says of itself, or its name."""
    if hasattr(transform, "describe"):
        return str(transform.describe())
    return getattr(transform, "__qualname__", type(transform).__qualname__)


class Examples:
    """Inputs and targets addressed by row, kept in memory in their stored dtype.

    Parameters
    ----------
    x
        A tensor [N, ...] of any dtype (uint8 images [N, H, W] or [N, C, H, W], float features [N, d]), or a tree of
        tensors.
    y
        Targets [n]: int64 class columns, or floats for regression.
    transform
        Raw batch to raw batch, row by row and deterministic (permute, rotate); applied when a batch is gathered.
    rows
        int64 [n], which rows of `x` these are; default: all. Subsets share `x`.

    Raises
    ------
    DataError
        If the lengths differ.

    >>> examples = Examples(torch.arange(8, dtype=torch.uint8).view(4, 2), torch.tensor([0, 1, 0, 1]))
    >>> odd = examples.subset(torch.tensor([1, 3]))
    >>> odd.gather(torch.tensor([1, 0]))
    (tensor([[6, 7],
            [2, 3]], dtype=torch.uint8), tensor([1, 1]))
    """

    def __init__(self, x: Any, y: Tensor, *, transform: Transform | None = None, rows: Tensor | None = None) -> None:
        inputs = _length(x) if rows is None else len(rows)
        if inputs != len(y):
            raise DataError(f"there are {inputs:,} inputs but {len(y):,} targets; every input needs one")
        self.x = x
        self.targets = y
        self.transform = transform
        self.rows = rows

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        change = "" if self.transform is None else f", {describe(self.transform)}"
        return f"{type(self).__name__}({len(self):,} rows{change})"

    def gather(self, rows: Tensor, number: int = 0) -> tuple[Any, Tensor]:
        """Return the raw inputs (stored dtype, transformed) and targets of `rows`, int64 [b], on the CPU.

        `number` is that of the batch in its plan: items that are drawn at random are others in every batch.
        """
        index = rows if self.rows is None else self.rows.index_select(0, rows)
        x = self.x.index_select(0, index) if isinstance(self.x, Tensor) else take(self.x, index)
        return x if self.transform is None else self.transform(x), self.targets.index_select(0, rows)

    def batches(self, plan: Iterable[Tensor], first: int = 0) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yield x, y and rows for each index tensor of `plan`, whose first batch is number `first` of the whole."""
        if self.rows is None and self.transform is None and isinstance(self.x, Tensor):
            x, y = self.x, self.targets
            for rows in plan:
                yield x.index_select(0, rows), y.index_select(0, rows), rows
        else:
            for rows in plan:
                yield *self.gather(rows), rows

    def ordered(self, batch_size: int) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yield x, y and rows of all examples in row order, once."""
        every = torch.arange(len(self))
        for start in range(0, len(self), batch_size):
            where = slice(start, start + batch_size)
            x = take(self.x, where if self.rows is None else self.rows[where])
            yield x if self.transform is None else self.transform(x), self.targets[where], every[where]

    def subset(self, rows: Tensor) -> Examples:
        """Return the examples of `rows`, int64 [m], in that order, sharing the inputs."""
        index = rows if self.rows is None else self.rows.index_select(0, rows)
        return self._with(self.targets.index_select(0, rows), index, self.transform)

    def with_targets(self, y: Tensor) -> Examples:
        """Return the same inputs with other targets [n]."""
        return self._with(y, self.rows, self.transform)

    def with_transform(self, transform: Transform) -> Examples:
        """Return the same examples with `transform` applied after what is applied already."""
        if isinstance(self.transform, Chain):
            transform = Chain((*self.transform.transforms, transform))
        elif self.transform is not None:
            transform = Chain((self.transform, transform))
        return self._with(self.targets, self.rows, transform)

    def fingerprint(self) -> str:
        """Return a short digest of the content: shapes, dtypes, targets, and the transformed inputs.

        Up to a mebibyte of inputs all rows count; of more, as many evenly spaced rows as fill one.
        """
        digest = hashlib.sha256(_bytes(self.targets))
        if len(self):
            width = max(1, sum(leaf[:1].nbytes for leaf in leaves(self.x)))
            count = min(len(self), max(1, FINGERPRINT_BYTES // width))
            inputs, _ = self.gather(torch.arange(count) * len(self) // count)
            for leaf in leaves(inputs):
                digest.update(f"{len(self)} {list(leaf.shape[1:])} {leaf.dtype}".encode())
                digest.update(_bytes(leaf))
        return digest.hexdigest()[:16]

    def _with(self, y: Tensor, rows: Tensor | None, transform: Transform | None) -> Examples:
        return Examples(self.x, y, rows=rows, transform=transform)


class DatasetExamples(Examples):
    """The examples of any map-style `Dataset` whose items are pairs (x, y), read when they are needed.

    What its items draw at random (augmentation) depends on the batch alone, its rows and its place in the plan, so that
    methods and models that draw random numbers too change nothing about the stream.

    Parameters
    ----------
    dataset
        Items with inputs of one shape. The targets are read once: from its attribute `targets` if it has one and no
        `target_transform`, else from every item.
    workers
        Processes that read items ahead (`DataLoader`'s `num_workers`).

    Raises
    ------
    DataError
        If an item is not a pair or the lengths differ.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        y: Tensor | None = None,
        *,
        transform: Transform | None = None,
        rows: Tensor | None = None,
        workers: int = 0,
    ) -> None:
        super().__init__(dataset, _targets_of(dataset) if y is None else y, transform=transform, rows=rows)
        self.workers = workers

    def gather(self, rows: Tensor, number: int = 0) -> tuple[Any, Tensor]:
        """Read, collate and transform the items of `rows`, int64 [b]; return them and their targets."""
        x = _collate_inputs(Items(self.x).__getitems__([number, *self._index(rows)]))
        return x if self.transform is None else self.transform(x), self.targets.index_select(0, rows)

    def batches(self, plan: Iterable[Tensor], first: int = 0) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yield x, y and rows for each index tensor of `plan`, read through a `DataLoader`."""
        waiting: deque[Tensor] = deque()

        def sampler() -> Iterator[list[int]]:
            for number, rows in enumerate(plan, first):
                waiting.append(rows)
                yield [number, *self._index(rows)]

        loader = DataLoader(
            Items(self.x),
            batch_sampler=_Once(sampler()),
            collate_fn=_collate_inputs,
            num_workers=self.workers,
            # Without a generator of its own a loader draws its workers' seed from the global one.
            generator=torch.Generator(),
        )
        for x in loader:
            rows = waiting.popleft()
            yield x if self.transform is None else self.transform(x), self.targets.index_select(0, rows), rows

    def ordered(self, batch_size: int) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yield x, y and rows of all examples in row order, once."""
        return self.batches(torch.split(torch.arange(len(self)), batch_size))

    def fingerprint(self) -> str:
        """Return a short digest of the data set's class, its length and its targets; items are not read."""
        rows = b"" if self.rows is None else _bytes(self.rows)
        what = f"{type(self.x).__qualname__} {len(self)} {describe(self.transform)}"
        return hashlib.sha256(what.encode() + _bytes(self.targets) + rows).hexdigest()[:16]

    def _index(self, rows: Tensor) -> list[int]:
        index: list[int] = (rows if self.rows is None else self.rows.index_select(0, rows)).tolist()
        return index

    def _with(self, y: Tensor, rows: Tensor | None, transform: Transform | None) -> Examples:
        return DatasetExamples(self.x, y, rows=rows, transform=transform, workers=self.workers)


class _Once:
    def __init__(self, batches: Iterator[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches


def as_examples(
    data: Any, *, target: str | None = None, size: int | tuple[int, int] | None = None, workers: int = 0
) -> Examples:
    """Return `data` as validated `Examples`.

    Parameters
    ----------
    data
        `Examples`; a pair (x, y) of tensors or NumPy arrays; a map-style `Dataset` of pairs; or the path of a .csv or
        .tsv file or an image folder. Arrays are shared, not copied, except that float64 arrays of NumPy (its default
        dtype) become float32. Integer targets are classes, float targets a regression.
    target, size
        The target column of a table; the size to which the images of a folder are resized.
    workers
        Processes that read the items of a `Dataset` ahead.

    Raises
    ------
    DataError
        If there are no examples, lengths differ, a float is NaN or infinite, or a label is negative or no integer.

    >>> as_examples((np.zeros((3, 2)), [0, 1, 0]))
    Examples(3 rows)
    >>> as_examples((np.zeros((3, 2)), [0, 1, -1]))
    Traceback (most recent call last):
    perdure.errors.DataError: the target of row 2 is -1; class labels are integers from 0
    """
    if isinstance(data, Examples):
        return data
    if isinstance(data, (str, PathLike)):
        arrays = read_path(data, target=target, size=size)
        return Examples(arrays.x, arrays.y)
    if isinstance(data, Subset) and isinstance(data.dataset, TensorDataset):
        return as_examples(data.dataset).subset(torch.as_tensor(data.indices))
    if isinstance(data, TensorDataset):
        if len(data.tensors) != 2:
            raise DataError(f"the data set should hold inputs and targets but holds {len(data.tensors)} tensors")
        data = data.tensors
    if isinstance(data, tuple) and len(data) == 2:
        x, y = check_inputs(data[0]), check_targets(data[1])
        return Examples(x, y) if len(y) else _no_examples()
    if (
        hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
        and not isinstance(data, (tuple, list, dict, Tensor, np.ndarray))
    ):
        return DatasetExamples(data, workers=workers) if len(data) else _no_examples()
    raise DataError(
        f"a {type(data).__name__} cannot be used as examples; give a pair (x, y) of tensors or arrays, a map-style "
        "Dataset of pairs, or the path of a .csv or .tsv file or an image folder"
    )


def _no_examples() -> Examples:
    raise DataError("there are no examples: the data are empty")


def _targets_of(dataset: Any) -> Tensor:
    stored = _stored_targets(dataset)
    if stored is not None:
        return stored
    targets = []
    for row in range(len(dataset)):
        item = dataset[row]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(
                f"item {row} of the data set should be a pair (input, target) but is a {type(item).__name__}"
            )
        targets.append(torch.as_tensor(item[1]))
    return check_targets(torch.stack(targets))


def _stored_targets(dataset: Any) -> Tensor | None:
    if isinstance(dataset, Subset):
        whole = _stored_targets(dataset.dataset)
        return None if whole is None else whole.index_select(0, torch.as_tensor(dataset.indices))
    stored = getattr(dataset, "targets", None)
    if stored is None or getattr(dataset, "target_transform", None) is not None or len(stored) != len(dataset):
        return None
    return check_targets(stored)


def _collate_inputs(items: list[Any]) -> Any:
    try:
        return default_collate([item[0] for item in items])
    except (RuntimeError, TypeError) as error:
        raise DataError(f"the data set's items cannot be joined to a batch: {error}") from error


def _length(x: Any) -> int:
    tensors = leaves(x)
    lengths = sorted({len(tensor) for tensor in tensors}) if tensors else [len(x)]
    if len(lengths) > 1:
        raise DataError(f"the inputs have parts of different lengths, {lengths[0]:,} and {lengths[-1]:,}")
    return lengths[0]


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b""
