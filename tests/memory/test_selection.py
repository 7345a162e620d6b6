"""Selection by features against plain loops that follow the definitions, and against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from perdure.errors import DataError, UsageError
from perdure.memory.selection import herding, k_center, nearest_mean

SELECTIONS = [herding, nearest_mean, k_center]


def features(rows: int, width: int, seed: int, normalised: bool = False) -> torch.Tensor:
    made = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3
    return made / made.norm(dim=1, keepdim=True) if normalised else made


def plain_herding(phi: torch.Tensor, count: int) -> list[int]:
    """Algorithm 4 of the paper, word by word: the mean of the chosen rows and each candidate, one by one."""
    mean, chosen = phi.mean(0), []
    for k in range(1, count + 1):
        best, nearest = -1, float("inf")
        for row in range(len(phi)):
            if row not in chosen:
                distance = float((mean - (phi[[*chosen, row]].sum(0)) / k).norm())
                if distance < nearest:
                    best, nearest = row, distance
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_herding_is_the_greedy_running_mean(normalised, seed):
    phi = features(40, 6, seed, normalised)
    assert herding(phi, 25).tolist() == plain_herding(phi, 25)


def test_herding_of_unit_vectors_is_the_weight_vector_form():
    """w <- w + mean - chosen, the form in which it was published as herding, without repeats."""
    phi = features(60, 8, 9, normalised=True)
    mean = phi.mean(0)
    w, chosen = mean.clone(), []
    for _ in range(30):
        scores = phi @ w
        scores[chosen] = -torch.inf
        chosen.append(int(scores.argmax()))
        w += mean - phi[chosen[-1]]
    assert herding(phi, 30).tolist() == chosen


def test_herding_is_not_the_rows_nearest_to_the_mean_and_its_mean_is_nearer():
    phi = features(200, 16, 3)
    apart = [(phi[select(phi, 10)].mean(0) - phi.mean(0)).norm() for select in (herding, nearest_mean)]
    assert apart[0] < apart[1] / 2


def test_nearest_mean_sorts_by_distance():
    phi = features(50, 4, 1)
    distances = [float((row - phi.mean(0)).norm()) for row in phi]
    assert nearest_mean(phi, 50).tolist() == sorted(range(50), key=distances.__getitem__)


def radius(phi: torch.Tensor, chosen: list[int]) -> float:
    return float(torch.cdist(phi, phi[chosen]).min(1).values.max())


@pytest.mark.parametrize("seed", range(12))
def test_k_center_is_within_twice_the_best_radius(seed):
    phi = features(11, 2, seed)
    for count in (1, 2, 3, 4):
        best = min(radius(phi, list(subset)) for subset in itertools.combinations(range(11), count))
        assert radius(phi, k_center(phi, count).tolist()) <= 2 * best + 1e-9


def test_k_center_always_takes_the_row_farthest_from_those_chosen():
    phi = features(80, 5, 2)
    chosen = k_center(phi, 20).tolist()
    assert chosen[0] == nearest_mean(phi, 1)
    for k in range(1, 20):
        distances = [min(float((row - phi[j]).norm()) for j in chosen[:k]) for row in phi]
        assert distances[chosen[k]] == pytest.approx(max(distances), rel=1e-12)


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_shorter_selection_is_the_beginning_of_a_longer_one(select, dtype):
    phi = features(30, 7, 5).to(dtype)
    whole = select(phi, 30)
    assert whole.dtype == torch.int64
    assert sorted(whole.tolist()) == list(range(30))
    for count in (0, 1, 13, 30, 99):
        assert torch.equal(select(phi, count), whole[:count])


@pytest.mark.parametrize("select", SELECTIONS)
def test_no_row_is_chosen_twice_though_all_are_alike(select):
    assert sorted(select(torch.full((9, 3), 0.1), 9).tolist()) == list(range(9))


@pytest.mark.parametrize("select", SELECTIONS)
def test_moving_and_turning_the_features_changes_nothing(select):
    phi = features(40, 5, 8)
    turned = torch.linalg.qr(features(5, 5, 1)).Q
    assert torch.equal(select(phi, 15), select(phi @ turned + 3.0, 15))


@pytest.mark.parametrize("select", SELECTIONS)
def test_what_cannot_be_compared_is_refused(select):
    assert select(torch.zeros(0, 4), 3).tolist() == []
    with pytest.raises(UsageError, match=r"shape \[3\]"):
        select(torch.zeros(3), 1)
    with pytest.raises(UsageError, match="cannot choose -1 rows"):
        select(torch.zeros(3, 2), -1)
    with pytest.raises(DataError, match="not finite"):
        select(torch.tensor([[1.0], [torch.nan]]), 1)
