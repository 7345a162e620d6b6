"""Weights beside `theta`, at which the same module runs: what an inner loop moves and a meta-step looks from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from perdure.batch import Batch, Source
from perdure.methods.loss_scale import loss_scale
from perdure.parameters import average_over_processes
from perdure.tree import take

if TYPE_CHECKING:
    from perdure.learner import Learner


def loss_at(learner: Learner, tensors: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """The learner's main loss of a batch, with `tensors` (by parameter name) in the place of the module's own."""
    module = learner.parameters.module

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(module, dict(tensors), args, kwargs)

    learner.passes["forward_rows"] += batch.size
    learner.passes["backward_rows"] += batch.size
    return learner.criterion(learner.forward.batch(batch, learner.shown_task, run), batch, learner.allowed)


def leaves_of(learner: Learner, vector: Tensor) -> dict[str, Tensor]:
    """A vector [P] as one leaf a trainable parameter: it shares the vector's memory and can be differentiated by."""
    return {
        slot.name: slot.view(vector).detach().requires_grad_()
        for slot, parameter in zip(learner.parameters.layout, learner.parameters.members.values(), strict=True)
        if parameter.requires_grad
    }


class FastWeights:
    """A copy of the weights that moves away from `theta` and comes back.

    Attributes
    ----------
    vector
        The weights [P].
    reached
        Names of the parameters to which any gradient so far has come; the others (another task's head) took no part.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.vector = learner.parameters.theta.clone()
        self.reached: set[str] = set()
        self._leaves = leaves_of(learner, self.vector)
        self._slots = {slot.name: slot for slot in learner.parameters.layout}

    def gradient(self, batch: Batch, into: Tensor) -> Tensor:
        """Write the gradient [P] of the batch's loss at these weights into `into`; returns the detached loss.

        Parameters that take no part get zero.
        """
        scale = loss_scale(self.learner)
        losses: list[Tensor] = []
        for piece in batch.pieces(self.learner.micro_batches):
            loss = loss_at(self.learner, self._leaves, piece)
            found = torch.autograd.grad(
                loss if scale is None else loss * scale, list(self._leaves.values()), allow_unused=True
            )
            self._write(into, dict(zip(self._leaves, found, strict=True)), fresh=not losses)
            losses.append(loss.detach())
        if scale is not None:
            into.div_(scale)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _write(self, into: Tensor, gradients: Mapping[str, Tensor | None], fresh: bool) -> None:
        views, values = [], []
        for name, slot in self._slots.items():
            gradient = gradients.get(name)
            if gradient is not None:
                views.append(slot.view(into))
                values.append(gradient)
                self.reached.add(name)
            elif fresh:
                slot.view(into).zero_()
        if fresh:
            torch._foreach_copy_(views, values)
        else:
            torch._foreach_add_(views, values)


def hand_over(learner: Learner, gradient: Tensor, reached: set[str]) -> None:
    """Make `gradient` [P] the gradient of every parameter in `reached`, as a backward pass would have left it."""
    average_over_processes(learner.model, gradient)
    if learner.scaler is not None:
        gradient = learner.scaler.scale(gradient)
    learner.parameters.release()
    learner.optimizers.release()
    for slot, parameter in zip(learner.parameters.layout, learner.parameters.members.values(), strict=True):
        if slot.name in reached:
            parameter.grad = slot.view(gradient)


def chunks(batch: Batch, count: int, order: Tensor, learner: Learner) -> list[Batch]:
    """The current rows in `order` [rows], cut into at most `count` batches of which each has a mean loss of its own.

    Batch normalisation needs two rows at least.
    """
    source = replace(batch.now, x=take(batch.now.x, order), y=take(batch.now.y, order))
    least = 2 if any(isinstance(m, _BatchNorm) and m.training for m in learner.model.modules()) else 1
    count = max(1, min(count, source.size // least))
    bounds = [source.size * i // count for i in range(count + 1)]
    return [_only(source, slice(*pair), batch) for pair in pairwise(bounds)]


def _only(source: Source, index: slice, batch: Batch) -> Batch:
    return Batch((replace(source.piece(index), whole=None),), batch.task)
