"""The diagonal of the Fisher information: the mean over samples of squared per-sample gradients of log p(y|x).

Every estimator is the same pass with another cotangent v, the derivative of a loss with respect to a sample's outputs:
the expectation of v v^T is diag(p) - p p^T for all that estimate the Fisher itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.errors import DataError, UnknownNameError, UsageError
from perdure.methods.per_sample import Cotangents, mean_over_samples
from perdure.registry import nearest

ESTIMATORS = ("rademacher", "exact", "sample", "empirical", "predicted")

# Rows whose random numbers are drawn together, whatever the batch size, so that it does not change the result.
BLOCK = 256


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    *,
    estimator: str = "rademacher",
    samples: int | None = None,
    draws: int = 1,
    columns: slice | Tensor | None = None,
    generator: torch.Generator,
    names: Mapping[str, nn.Parameter],
) -> dict[str, Tensor]:
    """Estimate the Fisher diagonal of a classifier (or, for floating-point targets, of a Gaussian of unit variance).

    The model runs in evaluation mode and is left as it was: modes, gradients, running statistics and torch's global
    generator do not change, and the size of the batches does not change the result.

    Parameters
    ----------
    model
        Maps x to outputs [n, classes], or to [n, length, classes] for targets [n, length], whose log-probabilities are
        summed (-100 is ignored). A dictionary x is passed as keywords; `.logits` is taken from the answer.
    batches
        (x, y) pairs, ready for the model; y is int64 class columns, or floating point for regression.
    estimator
        "rademacher": random signs, unbiased, one backward pass a draw. "exact": one backward pass a class. "sample":
        labels drawn from the model, unbiased but of huge variance when the model is confident. "empirical": the true
        labels. "predicted": the model's own best label. The last two are not the Fisher information.
    samples
        Use exactly so many samples (all by default).
    draws
        Draws a sample for "rademacher" and "sample".
    columns
        The active class columns (a slice or an index tensor); all by default.
    generator
        A CPU generator for the draws.
    names
        The parameters wanted, by name.

    Returns
    -------
    dict
        One float32 tensor a name, of the parameter's shape, on its device; zero for parameters that took no part.

    Raises
    ------
    UsageError
        For an unknown estimator or numbers below one.
    DataError
        If there is no sample, or a label is not among the columns.

    Sources: Kirkpatrick et al. 2017, arXiv 1612.00796; Kunstner et al. 2019, arXiv 1905.12558 (why not "empirical").

    >>> model = nn.Linear(2, 2)
    >>> batches = [(torch.ones(3, 2), torch.tensor([0, 1, 1]))]
    >>> found = diagonal_fisher(model, batches, generator=torch.Generator(), names=dict(model.named_parameters()))
    >>> {name: tuple(value.shape) for name, value in found.items()}
    {'weight': (2, 2), 'bias': (2,)}
    """
    if estimator not in ESTIMATORS:
        hint = nearest(estimator, ESTIMATORS) or ";"
        raise UnknownNameError(f"unknown Fisher estimator '{estimator}'{hint} there are {', '.join(ESTIMATORS)}")
    if draws < 1 or (samples is not None and samples < 1):
        raise UsageError(f"the Fisher needs at least one sample and draw, not samples={samples}, draws={draws}")
    cotangents = _Cotangents(estimator, draws, columns, generator)
    found = mean_over_samples(model, batches, cotangents, names=names, samples=samples)
    # A mean over draws, except for "exact", whose backward passes are the terms of one sum.
    divisor = draws if estimator in ("rademacher", "sample") else 1
    return {name: mean / divisor for name, mean in found.items()} if divisor > 1 else found


class _Cotangents:
    """The cotangents of one estimator, sample by sample independent of how the samples are batched."""

    def __init__(self, estimator: str, draws: int, columns: slice | Tensor | None, generator: torch.Generator) -> None:
        self.estimator = estimator
        self.draws = draws
        self.columns = columns
        self.generator = generator
        self._ahead = torch.empty(0)

    def __call__(self, outputs: Tensor, y: Tensor) -> Cotangents:
        """Tensors like `outputs` [n, ..., classes], zero outside the active columns."""
        wide = torch.promote_types(outputs.dtype, torch.float32)
        if y.is_floating_point():
            if y.numel() != outputs.numel():
                raise DataError(f"targets of shape {tuple(y.shape)} do not fit outputs of shape {tuple(outputs.shape)}")
            residual = outputs.to(wide) - y.to(outputs.device, wide).view_as(outputs)
            return (cotangent.to(outputs.dtype) for cotangent in self._of_regression(residual))
        index = None if self.columns is None else self._index(outputs)
        z = outputs.to(wide) if index is None else outputs.to(wide).index_select(-1, index)
        y = y.to(outputs.device)
        if y.shape != outputs.shape[:-1]:
            raise DataError(f"targets of shape {tuple(y.shape)} do not fit outputs of shape {tuple(outputs.shape)}")
        counted = None if z.ndim == 2 else (y >= 0).unsqueeze(-1)
        return (self._placed(v, outputs, index, counted) for v in self._of_classes(z, y, index))

    def _index(self, outputs: Tensor) -> Tensor:
        width = outputs.shape[-1]
        if isinstance(self.columns, slice):
            return torch.arange(width, device=outputs.device)[self.columns]
        assert self.columns is not None
        return self.columns.to(outputs.device)

    @staticmethod
    def _placed(v: Tensor, outputs: Tensor, index: Tensor | None, counted: Tensor | None) -> Tensor:
        if counted is not None:
            v = v * counted
        v = v.to(outputs.dtype)
        return v if index is None else torch.zeros_like(outputs).index_copy_(-1, index, v)

    def _of_classes(self, z: Tensor, y: Tensor, index: Tensor | None) -> Iterator[Tensor]:
        p = z.softmax(-1)
        classes = z.shape[-1]
        if self.estimator == "exact":
            root = p.sqrt()
            for c in range(classes):
                v = p * root[..., c : c + 1]
                v[..., c] -= root[..., c]
                yield v
        elif self.estimator == "rademacher":
            # sum_c s_c sqrt(p_c) (e_c - p): the signs' products vanish on average, and diag(p) - p p^T remains.
            root = p.sqrt()
            for signs in self._drawn(_signs, z):
                a = root * signs
                yield a - p * a.sum(-1, keepdim=True)
        elif self.estimator == "sample":
            cumulative = p.cumsum(-1)
            for u in self._drawn(_uniform, z[..., :1]):
                label = (cumulative <= u * cumulative[..., -1:]).sum(-1).clamp_max(classes - 1)
                yield p - F.one_hot(label, classes)
        elif self.estimator == "predicted":
            yield p - F.one_hot(p.argmax(-1), classes)
        else:
            yield p - F.one_hot(_local(y, index, classes), classes)

    def _of_regression(self, residual: Tensor) -> Iterator[Tensor]:
        if self.estimator == "rademacher":
            yield from self._drawn(_signs, residual)
        elif self.estimator == "sample":
            yield from self._drawn(_normal, residual)
        elif self.estimator == "exact":
            for unit in torch.eye(residual[0].numel(), device=residual.device, dtype=residual.dtype):
                yield unit.view(residual.shape[1:]).expand_as(residual)
        elif self.estimator == "empirical":
            yield residual
        else:
            raise UsageError("the 'predicted' Fisher of a regression is zero; use rademacher")

    def _drawn(self, draw: Callable[..., Tensor], like: Tensor) -> Iterator[Tensor]:
        """`draws` random tensors like `like` [n, ...]; every sample takes the next row of blocks of a fixed size."""
        shape = (self.draws, *like.shape[1:])
        if self._ahead.shape[1:] != shape:
            self._ahead = torch.empty(0, *shape)
        parts, missing = [], len(like)
        while missing:
            if not len(self._ahead):
                self._ahead = draw((BLOCK, *shape), generator=self.generator)
            parts.append(self._ahead[:missing])
            self._ahead = self._ahead[len(parts[-1]) :]
            missing -= len(parts[-1])
        values = torch.cat(parts).to(like.device, like.dtype, non_blocking=True)
        for k in range(self.draws):
            yield values[:, k]


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _local(y: Tensor, index: Tensor | None, classes: int) -> Tensor:
    """Global class columns as positions among the active ones; ignored targets (-100) become 0."""
    if index is None:
        local, wrong = y, y >= classes
    else:
        match = y.unsqueeze(-1) == index
        local, wrong = match.int().argmax(-1), ~match.any(-1)
    wrong = wrong & (y != -100) | (y < 0) & (y != -100)
    if wrong.any():
        raise DataError(f"label {int(y[wrong][0])} is not among the {classes} active columns")
    return local.clamp_min(0)
