"""Which rows of a set stand for it best, judged by their features: herding, nearest to the mean, k-center.

All three return an order, so that the first m of a longer selection are the selection of m: a quota that falls is
followed by cutting off the end. All are deterministic and need O(rows * count * features) time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perdure.errors import DataError, UsageError


@torch.no_grad()
def herding(features: Tensor, count: int, mean: Tensor | None = None) -> Tensor:
    """Rows whose running mean stays as close as possible to the mean of all, best first.

    Row k is the one for which the mean of the first k rows comes closest to the mean of `features`; none twice.
    iCaRL normalises the features to length 1 before.

    Rebuffi et al. 2017, iCaRL, arXiv 1611.07725 (algorithm 4).

    Parameters
    ----------
    features
        [rows, features]
    count
        How many to choose.
    mean
        [features], what to stay close to instead of the rows' own mean.

    Returns
    -------
    int64 [min(count, rows)] on the device of `features`.

    Raises
    ------
    UsageError, DataError
        If `features` is not a finite matrix, or `count` is negative.

    >>> herding(torch.tensor([[0.0], [9.0], [4.0], [5.0]]), 3).tolist()
    [2, 3, 0]
    """
    centred = _centred(features, count, mean)
    chosen = torch.empty(min(count, len(centred)), dtype=torch.int64, device=centred.device)
    # The mean of k rows is off by |sum + row| / k: what decides is sum.row + |row|^2 / 2.
    cost = centred.square().sum(1) / 2
    total = centred.new_zeros(centred.shape[1])
    for k in range(len(chosen)):
        best = torch.addmv(cost, centred, total).argmin().view(1)
        chosen[k : k + 1] = best
        total += centred.index_select(0, best)[0]
        cost.index_fill_(0, best, torch.inf)
    return chosen


@torch.no_grad()
def nearest_mean(features: Tensor, count: int) -> Tensor:
    """Rows in the order of their distance to the mean of all. This is not herding: their mean may be far off.

    Parameters and result are those of `herding`.

    >>> nearest_mean(torch.tensor([[0.0], [9.0], [4.0], [5.0]]), 3).tolist()
    [2, 3, 0]
    """
    centred = _centred(features, count)
    return centred.square().sum(1).argsort(stable=True)[:count]


@torch.no_grad()
def k_center(features: Tensor, count: int) -> Tensor:
    """Rows that cover the set: the first is the nearest to the mean, each further one the farthest from those chosen.

    The largest distance of a row to its nearest chosen one is at most twice what the best choice could reach.
    Parameters and result are those of `herding`.

    Gonzalez 1985, Clustering to minimize the maximum intercluster distance; as a selection of training examples: Sener
    and Savarese 2018, arXiv 1708.00489.

    >>> k_center(torch.tensor([[0.0], [9.0], [4.0], [5.0]]), 3).tolist()
    [2, 1, 0]
    """
    centred = _centred(features, count)
    chosen = torch.empty(min(count, len(centred)), dtype=torch.int64, device=centred.device)
    square = centred.square().sum(1)
    distance, farthest = square.neg(), square.new_full((len(centred),), torch.inf)
    for k in range(len(chosen)):
        newest = distance.argmax().view(1)
        chosen[k : k + 1] = newest
        # Squared distances to the newest row; rounding must not bring a chosen row back, so it is ruled out.
        reached = torch.addmv(square + square[newest], centred, centred[newest][0], alpha=-2).clamp_min_(0)
        farthest = torch.minimum(farthest, reached).index_fill_(0, newest, -1.0)
        distance = farthest
    return chosen


def _centred(features: Tensor, count: int, mean: Tensor | None = None) -> Tensor:
    """The features around their mean (or another), in float32 or float64."""
    if features.ndim != 2:
        raise UsageError(f"features have shape {list(features.shape)}, they must be a matrix [rows, features]")
    if count < 0:
        raise UsageError(f"cannot choose {count} rows, the number must be 0 or more")
    if features.dtype not in (torch.float32, torch.float64):
        features = features.float()
    if not len(features):
        return features
    centred = features - (features.mean(0) if mean is None else mean.to(features.dtype))
    if not bool(centred.isfinite().all()):
        raise DataError("some features are not finite, so no row can be compared with their mean; check the model")
    return centred
