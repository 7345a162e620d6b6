"""What it costs to choose examples by their features, against loops that compute everything anew for each choice.

python -m benchmarks.selection
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.rows import HEAD, Row
from benchmarks.timing import interleave
from perdure.memory.selection import herding, k_center


def plain_herding(features: Tensor, count: int) -> list[int]:
    """For every choice the means of all candidates, and their distances to the mean."""
    mean, total, chosen = features.mean(0), torch.zeros(features.shape[1]), []
    for k in range(1, count + 1):
        distance = (mean - (total + features) / k).norm(dim=1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total = total + features[chosen[-1]]
    return chosen


def plain_k_center(features: Tensor, count: int) -> list[int]:
    """For every choice the distances of all rows to all that are chosen."""
    chosen = [int((features - features.mean(0)).norm(dim=1).argmin())]
    while len(chosen) < count:
        distance = torch.stack([(features - features[j]).norm(dim=1) for j in chosen]).min(0).values
        chosen.append(int(distance.argmax()))
    return chosen


def rows() -> Iterator[Row]:
    """Herding and k-center of 5,000 rows with 512 features; both loops choose the same rows as the library."""
    features = torch.randn(5000, 512, generator=torch.Generator().manual_seed(0))
    features /= features.norm(dim=1, keepdim=True)
    for what, ours, plain, count, goal in (
        ("herding", herding, plain_herding, 200, 0.1),
        ("k-center", k_center, plain_k_center, 50, 0.02),
    ):
        assert ours(features, count).tolist() == plain(features, count), f"{what} chooses other rows than the loop"
        runs = {"ours": lambda f=ours, n=count: f(features, n), "plain": lambda f=plain, n=count: f(features, n)}
        seconds = interleave(runs, rounds=5)
        name = f"{what}, {count} of 5,000 x 512"
        yield Row.of("-", name, "all distances anew", seconds, ("ours", "plain"), goal)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(HEAD)
    for row in rows():
        print(row, flush=True)
