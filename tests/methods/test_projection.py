"""The exact projection against brute force over all active sets, and A-GEM's formula."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from perdure.methods.projection import agem_projection, gem_projection, nonnegative_quadratic


def brute_force(P: np.ndarray, q: np.ndarray) -> float:
    """The smallest value of u'Pu / 2 + q'u over u >= 0, from the stationary point of every set of free variables."""
    unit = 1 / np.sqrt(np.where(np.diag(P) > 0, np.diag(P), 1.0))  # of no consequence for the minimum, but for rounding
    P, q = P * np.outer(unit, unit), q * unit
    best = 0.0
    for count in range(1, len(q) + 1):
        for free in itertools.combinations(range(len(q)), count):
            index = list(free)
            u = np.zeros(len(q))
            u[index] = np.linalg.pinv(P[np.ix_(index, index)], rcond=1e-10, hermitian=True) @ -q[index]
            if (u >= -1e-10).all():
                u = u.clip(0)
                best = min(best, float(u @ P @ u / 2 + q @ u))
    return best


def problem(seed: int, rows: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Constraint rows [k, 12] and a gradient [12]."""
    draw = np.random.default_rng(seed)
    G = draw.normal(size=(rows, 12))
    if kind == "duplicates" and rows > 1:
        G[-1] = G[0]
    elif kind == "collinear" and rows > 2:
        G[-1] = 2 * G[0] + 0.5 * G[1]
    elif kind == "opposite" and rows > 1:
        G[-1] = -3 * G[0]
    elif kind == "zero":
        G[0] = 0
    elif kind == "agreeing":
        G += 3 * draw.normal(size=12)
    elif kind == "scales":
        G *= 10.0 ** draw.integers(-8, 3, size=(rows, 1))
    return G, draw.normal(size=12)


KINDS = ["plain", "duplicates", "collinear", "opposite", "zero", "agreeing", "scales"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_minimum_is_that_of_brute_force_over_all_active_sets(kind: str) -> None:
    for seed in range(60):
        G, g = problem(seed, 1 + seed % 6, kind)
        u = nonnegative_quadratic(G @ G.T, G @ g)
        assert (u >= 0).all()
        assert np.isfinite(u).all()
        value = float(u @ (G @ G.T) @ u / 2 + (G @ g) @ u)
        best = brute_force(G @ G.T, G @ g)
        assert value == pytest.approx(best, rel=1e-6, abs=1e-9), (seed, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_projection_is_feasible_and_no_feasible_point_is_nearer(kind: str) -> None:
    for seed in range(60):
        G, g = problem(seed, 1 + seed % 6, kind)
        projected = gem_projection(torch.from_numpy(G), torch.from_numpy(g))
        if projected is None:
            assert (G @ g >= 0).all()
            continue
        nearest = projected.numpy()
        lengths = np.linalg.norm(G, axis=1)
        assert (G @ nearest >= -1e-8 * lengths).all()
        # The projection onto a cone: what was removed is orthogonal to what is left, and lies in the dual cone.
        assert float((g - nearest) @ nearest) == pytest.approx(0, abs=1e-7)
        distance = float(((g - nearest) ** 2).sum())
        assert distance == pytest.approx(-2 * brute_force(G @ G.T, G @ g), rel=1e-6, abs=1e-9)


def test_projecting_one_constraint_after_the_other_would_fail_here() -> None:
    """Guards the tests above: on these problems the sequential projection is not feasible or farther away."""
    worse = 0
    for seed in range(60):
        G, g = problem(seed, 4, "plain")
        if not (G @ g < 0).any():
            continue
        sequential = g.copy()
        for row in G:
            if row @ sequential < 0:
                sequential -= (row @ sequential) / (row @ row) * row
        nearest = gem_projection(torch.from_numpy(G), torch.from_numpy(g)).numpy()
        violated = (G @ sequential < -1e-9).any()
        farther = ((g - sequential) ** 2).sum() > ((g - nearest) ** 2).sum() + 1e-9
        worse += bool(violated or farther)
    assert worse > 20


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
def test_the_projection_does_not_depend_on_the_units(scale: float) -> None:
    G, g = problem(3, 5, "plain")
    one = gem_projection(torch.from_numpy(G), torch.from_numpy(g))
    two = gem_projection(torch.from_numpy(G * scale), torch.from_numpy(g * scale))
    assert torch.allclose(one * scale, two, rtol=1e-9, atol=0)


def test_rows_of_very_different_length_end() -> None:
    """Without scaling, least squares drops the short row, and an active-set method can turn in a circle for ever."""
    u = nonnegative_quadratic(np.diag([1.0, 1e-20]), np.array([-1.0, -1e-11]))
    assert u == pytest.approx([1.0, 1e9])


def test_a_feasible_gradient_is_left_alone_whatever_the_margin() -> None:
    g = torch.tensor([1.0, 2.0, 0.0])
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 5.0], [0.0, 0.0, 0.0]])
    assert gem_projection(rows, g, margin=0.5, eps=1e-3) is None


def test_values_that_are_not_finite_are_left_to_the_training_loop() -> None:
    rows = torch.tensor([[1.0, 0.0], [float("nan"), 1.0]])
    assert gem_projection(rows, torch.tensor([-1.0, 0.0])) is None


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("margin", [0.0, 0.5, 2.0])
def test_the_published_quadratic_programme_is_solved(margin: float, eps: float) -> None:
    """v >= margin minimises v'(GG' + eps I)v / 2 + (Gg)'v: v is stationary, or at its bound and pushed against it."""
    for seed in range(30):
        G, g = problem(seed, 1 + seed % 6, "plain")
        projected = gem_projection(torch.from_numpy(G), torch.from_numpy(g), margin, eps)
        if projected is None:
            continue
        v = np.linalg.lstsq(G.T, projected.numpy() - g, rcond=None)[0]
        slope = (G @ G.T + eps * np.eye(len(G))) @ v + G @ g
        assert (v >= margin - 1e-9).all()
        assert (slope >= -1e-8).all()
        assert np.abs(slope * (v - margin)).max() < 1e-7
        # <g~, g_k> = slope_k - eps v_k, which is the guarantee that the method gives.
        assert (G @ projected.numpy() >= -eps * v - 1e-8).all()


def test_a_larger_margin_moves_further_towards_the_past() -> None:
    G, g = problem(1, 1, "plain")
    g = -G[0] + 0.1 * g
    rows, gradient = torch.from_numpy(G), torch.from_numpy(g)
    products = [float(rows[0] @ gem_projection(rows, gradient, margin)) for margin in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert products == sorted(products)
    assert products[0] == pytest.approx(0, abs=1e-9)
    assert products[-1] > products[0] + 1


def test_one_constraint_is_the_formula_of_averaged_gem() -> None:
    for seed in range(40):
        G, g = problem(seed, 1, "plain")
        rows, gradient = torch.from_numpy(G), torch.from_numpy(g)
        joint = gem_projection(rows, gradient)
        assert torch.allclose(gradient if joint is None else joint, agem_projection(gradient, rows[0]), atol=1e-12)


# -- A-GEM ------------------------------------------------------------------------------------------------------------


def pairs() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(50, generator=draw), torch.randn(50, generator=draw)) for _ in range(40)]


def test_an_agreeing_gradient_keeps_its_bits() -> None:
    found = 0
    for gradient, reference in pairs():
        if gradient @ reference >= 0:
            kept = gradient.clone()
            assert torch.equal(agem_projection(gradient, reference), kept)
            assert torch.equal(gradient, kept)
            found += 1
    assert found > 10


def test_a_disagreeing_gradient_loses_exactly_its_part_along_the_reference() -> None:
    found = 0
    for gradient, reference in pairs():
        if gradient @ reference < 0:
            g, r = gradient.double().numpy(), 7 * reference.double().numpy()
            expected = g - (g @ r) / (r @ r) * r
            projected = agem_projection(gradient, 7 * reference)
            assert torch.allclose(projected.double(), torch.from_numpy(expected), atol=1e-6)
            assert float(projected @ (7 * reference)) >= -1e-6 * float((7 * reference).square().sum())
            assert projected.norm() <= gradient.norm()
            again = agem_projection(projected, 7 * reference)
            assert torch.allclose(again, projected, atol=1e-6)
            found += 1
    assert found > 10


def test_a_reference_of_zero_changes_nothing() -> None:
    gradient = torch.randn(5)
    assert torch.equal(agem_projection(gradient, torch.zeros(5)), gradient)


@pytest.mark.parametrize("reference", [[-float("inf"), 0.0], [float("nan"), -1.0], [-1e30, 0.0], [-3e38, -3e38]])
def test_what_is_not_finite_is_projected_on_nothing(reference: list[float]) -> None:
    """Neither an infinite reference nor a finite one whose square is infinite."""
    gradient = torch.tensor([1.0, 1.0])
    assert torch.equal(agem_projection(gradient, torch.tensor(reference)), gradient)


def test_agem_projection_with_a_constant_in_the_denominator() -> None:
    gradient, reference = torch.tensor([1.0, 2.0]), torch.tensor([-0.5, 0.0])
    assert agem_projection(gradient, reference, 0.25).tolist() == [0.5, 2.0]
    assert torch.equal(agem_projection(gradient, -reference, 0.25), gradient)
