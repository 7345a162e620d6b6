"""Projections of a gradient onto what does not hurt remembered examples, and the reference gradients they need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from perdure.batch import Batch, Source
from perdure.methods.side_passes import frozen_statistics

if TYPE_CHECKING:
    from perdure.learner import Learner


def reference_gradient(learner: Learner, x: Any, y: Any, tasks: Tensor | None) -> Tensor:
    """Gradient [P] of the mean loss on remembered rows, each scored on its own task's columns where the scenario has
    them.

    No `p.grad` and no running statistics change.
    """
    batch = Batch((Source("memory", x, y, tasks=tasks),), learner.task_index)
    with frozen_statistics(learner.model):
        outputs = learner.forward.batch(batch, learner.shown_task)
        loss = learner.criterion(outputs, batch, learner.allowed)
        scale = 1.0 if learner.scaler is None else learner.scaler.get_scale()
        gradient = learner.parameters.gradient(loss * scale if scale != 1.0 else loss)
    learner.passes["forward_rows"] += batch.size
    learner.passes["backward_rows"] += batch.size
    return gradient.div_(scale) if scale != 1.0 else gradient


def nonnegative_quadratic(P: np.ndarray, q: np.ndarray, tolerance: float = 1e-12) -> np.ndarray:
    """The exact minimiser u >= 0 of u'Pu / 2 + q'u for a positive semi-definite P [k, k] and q [k], in float64.

    Active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974); duplicate, collinear and zero rows
    of the matrix behind P are allowed.
    """
    size = len(q)
    u = np.zeros(size)
    free = np.zeros(size, dtype=bool)
    slack = tolerance * max(1.0, float(np.abs(P).max(initial=0.0)), float(np.abs(q).max(initial=0.0)))
    for _ in range(10 * size + 10):
        descent = -(P @ u + q)
        descent[free] = -np.inf
        entering = int(descent.argmax())
        if free.all() or descent[entering] <= slack:
            break
        free[entering] = True
        while True:
            index = np.flatnonzero(free)
            solution = np.zeros(size)
            solution[index] = np.linalg.lstsq(P[np.ix_(index, index)], -q[index], rcond=None)[0]
            if (solution[index] > 0).all():
                u = solution
                break
            falling = free & (solution <= 0)
            step = float((u[falling] / (u[falling] - solution[falling])).min())
            u = u + step * (solution - u)
            leaving = free & (u <= 1e-15 * max(1.0, float(u.max())))
            free &= ~leaving
            u[~free] = 0.0
            if not free.any():
                break
    return u


def gem_projection(memories: Tensor, gradient: Tensor, margin: float = 0.0, eps: float = 0.0) -> Tensor | None:
    """The nearest vector to `gradient` [P] with no negative product with any row of `memories` [k, P].

    Minimises v'(GG' + eps I)v / 2 + (Gg)'v over v >= margin and returns g + G'v, as in Lopez-Paz and Ranzato 2017,
    arXiv 1706.08840. Returns None where nothing is violated: the gradient stays as it is, the margin included.
    """
    products = (memories @ gradient).double().cpu().numpy()
    if (products >= 0).all():
        return None
    gram = (memories @ memories.T).double().cpu().numpy()
    gram = gram + eps * np.eye(len(gram))
    v = nonnegative_quadratic(gram, products + gram @ np.full(len(gram), margin)) + margin
    return torch.addmv(gradient, memories.T, torch.from_numpy(v).to(gradient))


def agem_projection(gradient: Tensor, reference: Tensor) -> Tensor:
    """`gradient` [P] without its part against `reference` [P]; where the two agree, the gradient with the same bits.

    g - (g.r / r.r) r if g.r < 0 else g: Chaudhry et al. 2019, arXiv 1812.00420. The choice is made on the device.
    """
    product = torch.dot(gradient, reference)
    square = torch.dot(reference, reference)
    violated = (product < 0) & (square > 0)
    if gradient.device.type == "cpu" and not violated:
        return gradient
    factor = torch.where(violated, product / square, torch.zeros_like(product))
    return torch.where(violated, gradient - factor * reference, gradient)
