"""The main loss: which class columns count for a row, and how the sources are weighted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.batch import Allowed, Batch, Source, as_mask, joined_targets
from perdure.errors import DataError, UsageError

RowLoss = Callable[[Tensor, Any], Tensor]


class Criterion:
    """The mean loss over the rows of each pool of sources, and the weighted sum of the pools.

    Sources without a share are one pool with weight 1; a source with a share is a pool of its own with that weight.

    Parameters
    ----------
    function
        None for softmax cross-entropy (also of sequences, where a row is the mean over its unmasked tokens), or a
        callable `(outputs, targets)` that returns one value a row (reduction="none") or the mean over the rows it was
        given.
    """

    def __init__(self, function: RowLoss | None = None) -> None:
        self.function = function

    def __call__(self, outputs: Tensor, batch: Batch, allowed: Callable[[Source, int], Allowed]) -> Tensor:
        """The scalar loss; `allowed` says which class columns count for a source."""
        if len(batch.sources) == 1 and batch.now.share is None:
            return self._mean(outputs, batch.now.y, allowed(batch.now, outputs.shape[-1]), batch.pooled)
        pooled = tuple(source for source in batch.sources if source.share is None)
        total: Tensor | None = None
        if pooled:
            total = self._pool(outputs, batch, pooled, allowed)
        for source in batch.sources:
            if source.share:
                term = self._pool(outputs, batch, (source,), allowed)
                if source.share != 1.0:
                    term = term * source.share
                total = term if total is None else total + term
        return outputs[:0].sum() if total is None else total  # zero, also where a head wrote -inf

    def _pool(
        self, outputs: Tensor, batch: Batch, sources: tuple[Source, ...], allowed: Callable[[Source, int], Allowed]
    ) -> Tensor:
        whole = batch.pooled if sources[0].share is None else sources[0].whole
        if len(sources) < len(batch.sources):
            parts = [batch.part(source.name, outputs) for source in sources]
            outputs = parts[0] if len(parts) == 1 else torch.cat(parts)
        columns = [allowed(source, outputs.shape[-1]) for source in sources]
        mask: Allowed = columns[0]
        if any(c is not mask for c in columns) and any(
            c is not mask if isinstance(c, Tensor) or isinstance(mask, Tensor) else c != mask for c in columns
        ):
            width, device = outputs.shape[-1], outputs.device
            mask = torch.cat([as_mask(c, s.size, width, device) for c, s in zip(columns, sources, strict=True)])
        return self._mean(outputs, joined_targets(sources), mask, whole)

    def rows(self, outputs: Tensor, y: Any, allowed: Allowed) -> Tensor:
        """The loss of each row by itself [rows]; `allowed` says which columns count.

        Raises
        ------
        UsageError
            If the criterion returns nothing but a mean.
        """
        values = self._values(*_restricted(outputs, y, allowed), "none")
        if values.dim() == 0:
            raise UsageError("the criterion returns the mean over rows, and one loss a row is needed; reduction='none'")
        return values if values.dim() == 1 else values.flatten(1).mean(1)

    def _mean(self, outputs: Tensor, y: Any, allowed: Allowed, whole: int | None) -> Tensor:
        """Mean over rows of the loss; in a piece of a batch, the sum over its rows divided by the whole's rows."""
        values = self._values(*_restricted(outputs, y, allowed), "mean" if whole is None else "none")
        if values.dim() == 0:
            return values if whole is None else values * (len(outputs) / whole)
        if values.dim() > 1:
            values = values.flatten(1).mean(1)
        return values.mean() if whole is None else values.sum() / whole

    def _values(self, outputs: Tensor, y: Any, reduction: str) -> Tensor:
        return cross_entropy(outputs, y, reduction) if self.function is None else self.function(outputs, y)


def _restricted(outputs: Tensor, y: Any, allowed: Allowed) -> tuple[Tensor, Any]:
    """Outputs whose other columns cannot win, and targets that address them."""
    if isinstance(allowed, slice):
        moved = y - allowed.start if y.dim() == 1 else torch.where(y == -100, y, y - allowed.start)
        return outputs[..., allowed], moved
    if isinstance(allowed, Tensor):
        outputs = outputs.masked_fill(~(allowed if outputs.dim() == 2 else allowed[:, None]), float("-inf"))
    return outputs, y


def cross_entropy(outputs: Tensor, y: Tensor, reduction: str) -> Tensor:
    """Softmax cross-entropy of rows [n, columns], or of sequences [n, length, columns] (targets of -100 are ignored).

    Raises
    ------
    DataError
        If a target is not one of the columns.
    UsageError
        If the targets are not class columns.
    """
    if outputs.dim() == 3:
        tokens = F.cross_entropy(outputs.transpose(1, 2), y, reduction="none")
        counted = (y != -100).sum(1).clamp_min(1)
        values = tokens.sum(1) / counted
        return values.mean() if reduction == "mean" else values
    if len(outputs) != len(y):
        raise DataError(f"there are {len(outputs)} rows of inputs but {len(y)} targets; every row needs one")
    try:
        return F.cross_entropy(outputs, y, reduction=reduction)
    except IndexError:
        bad = y[(y < 0) | (y >= outputs.shape[1])]
        raise DataError(
            f"target {int(bad[0])} is not a column of the model's {outputs.shape[1]} outputs; build a model with more "
            "outputs, name the task's classes in begin_task(..., classes=...) for a growing head, or give class "
            "columns from 0 on"
        ) from None
    except RuntimeError as error:
        if y.dtype != torch.int64 and y.shape != outputs.shape:
            raise UsageError(
                f"targets of type {y.dtype} and shape {tuple(y.shape)} do not fit cross-entropy of outputs "
                f"{tuple(outputs.shape)}; give class columns as int64, or pass criterion= for regression"
            ) from error
        raise
