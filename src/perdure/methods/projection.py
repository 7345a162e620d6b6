"""Projections of a gradient onto what does not hurt remembered examples, and the reference gradients they need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from perdure.batch import Batch, Source
from perdure.methods.loss_scale import finish_gradients, loss_scale
from perdure.methods.side_passes import frozen_statistics
from perdure.tree import to_device

if TYPE_CHECKING:
    from perdure.learner import Learner
    from perdure.parameters import ParameterVector


def reference_gradient(learner: Learner, x: Any, y: Any, tasks: Tensor | None, into: Tensor | None = None) -> Tensor:
    """Gradient [P] of the mean loss on remembered rows, each scored on its own task's columns where the scenario has
    them.

    A new vector, or `into`. No `p.grad` and no running statistics change. Zero, which constrains nothing, where float16
    overflowed; the loss scale is lowered then. The learner's augmentation changes remembered rows as it does current
    ones.
    """
    with _reference_loss(learner, x, y, tasks) as (loss, scale):
        gradient = learner.parameters.gradient(loss, into)
    # The gradient that is projected is the mean over all processes; so is what it is compared with.
    finish_gradients(learner, [gradient], scale)
    return gradient


def reference_gradients(learner: Learner, x: Any, y: Any, tasks: Tensor | None) -> dict[str, Tensor]:
    """`reference_gradient` as one tensor a name, without a copy, of the parameters that take part."""
    with _reference_loss(learner, x, y, tasks) as (loss, scale):
        found = learner.parameters.gradients(loss)
    finish_gradients(learner, list(found.values()), scale)
    return found


@contextmanager
def _reference_loss(learner: Learner, x: Any, y: Any, tasks: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The mean loss on remembered rows, times the loss scale of float16 if there is one, and that scale."""
    x, y = learner.augmented(to_device(x, learner.device)), to_device(y, learner.device)
    batch = Batch((Source("memory", x, y, tasks=tasks),), learner.task_index)
    with frozen_statistics(learner.model), private_dropout(learner.model, learner.device):
        outputs = learner.forward.batch(batch, learner.shown_task)
        loss = learner.criterion(outputs, batch, learner.allowed)
        scale = loss_scale(learner)
        yield loss if scale is None else loss * scale, scale
    learner.passes["forward_rows"] += batch.size
    learner.passes["backward_rows"] += batch.size


@contextmanager
def private_dropout(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Whatever dropout draws here, the step draws the same as without it."""
    if model.training:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    else:
        yield


def without_idle(parameters: ParameterVector, gradient: Tensor) -> Tensor:
    """`gradient` [P], in place, with zeros where a parameter takes no part in this step (another task's head).

    No optimizer moves such a parameter, so a product there would promise what no step keeps.
    """
    for slot, parameter in zip(parameters.layout, parameters.members.values(), strict=True):
        if parameter.grad is None:
            slot.view(gradient).zero_()
    return gradient


def nonnegative_quadratic(P: np.ndarray, q: np.ndarray, tolerance: float = 1e-12) -> np.ndarray:
    """The exact minimiser u >= 0 of u'Pu / 2 + q'u for a positive semi-definite P [k, k] and q [k], in float64.

    Active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974); duplicate, collinear and zero rows of
    the matrix behind P are allowed, and so are rows of very different length.
    """
    size = len(q)
    length = np.sqrt(np.diag(P))
    unit = np.divide(1.0, length, out=np.zeros(size), where=length > 0)
    P, q = P * np.outer(unit, unit), q * unit
    slack = tolerance * float(np.abs(q).max(initial=0.0))
    u = np.zeros(size)
    free, blocked = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)

    def solve() -> np.ndarray:
        index, solution = np.flatnonzero(free), np.zeros(size)
        solution[index] = np.linalg.lstsq(P[np.ix_(index, index)], -q[index], rcond=None)[0]
        return solution

    for _ in range(10 * size + 10):
        descent = np.where(free | blocked, -np.inf, -(P @ u + q))
        entering = int(descent.argmax())
        if descent[entering] <= slack:
            break
        free[entering] = True
        solution = solve()
        if solution[entering] <= 0:  # by rounding alone: nothing is gained there until something else has changed
            free[entering], blocked[entering] = False, True
            continue
        blocked[:] = False
        while (falling := np.flatnonzero(free & (solution <= 0))).size:
            steps = u[falling] / (u[falling] - solution[falling])
            u = u + steps.min() * (solution - u)
            free[falling[steps.argmin()]] = False
            free &= u > 0
            u[~free] = 0.0
            solution = solve()
        u = solution
    return u * unit


def gem_projection(memories: Tensor, gradient: Tensor, margin: float = 0.0, eps: float = 0.0) -> Tensor | None:
    """The nearest vector to `gradient` [P] with no negative product with any row of `memories` [k, P].

    Minimises v'(GG' + eps I)v / 2 + (Gg)'v over v >= margin and returns g + G'v, as in Lopez-Paz and Ranzato 2017,
    arXiv 1706.08840. Returns None where nothing is violated: the gradient stays as it is, the margin included. So it
    does where a value is not finite, which no projection repairs.
    """
    products = (memories @ gradient).double().cpu().numpy()
    if not (products < 0).any():
        return None
    gram = (memories @ memories.T).double().cpu().numpy()
    if not (np.isfinite(products).all() and np.isfinite(gram).all()):
        return None
    gram = gram + eps * np.eye(len(gram))
    v = nonnegative_quadratic(gram, products + gram @ np.full(len(gram), margin)) + margin
    return torch.addmv(gradient, memories.T, torch.from_numpy(v).to(gradient))


def agem_projection(gradient: Tensor, reference: Tensor, eps: float = 0.0) -> Tensor:
    """`gradient` [P] without its part against `reference` [P]; where the two agree, the gradient with the same bits.

    g - (g.r / (r.r + eps)) r if g.r < 0 else g: Chaudhry et al. 2019, arXiv 1812.00420, where eps is 0. It stays g
    where either product is not finite, which no projection repairs.
    """
    projected = gradient.clone()
    agem_project([projected], [reference], eps)
    return projected


def agem_project(gradients: Sequence[Tensor], references: Sequence[Tensor], eps: float = 0.0) -> None:
    """`agem_projection` in place, of vectors that come in pieces of equal shapes; off the CPU nothing waits for it."""
    pairs = [(g.flatten(), r.flatten()) for g, r in zip(gradients, references, strict=True)]
    product = torch.stack([torch.dot(g, r) for g, r in pairs]).sum()
    if product.device.type == "cpu" and not product < 0:
        return
    square = torch.stack([torch.dot(r, r) for _, r in pairs]).sum()
    violated = (product < 0) & (square > 0) & product.isfinite() & square.isfinite()
    if product.device.type == "cpu":
        if violated:
            torch._foreach_add_(list(gradients), list(references), alpha=-float(product / (square + eps)))
        return
    factor = torch.where(violated, product / (square + eps if eps else square), torch.zeros_like(product))
    for gradient, reference in zip(gradients, references, strict=True):
        gradient.copy_(torch.where(violated, gradient - factor * reference, gradient))
