"""La-MAML: look-ahead meta-learning with a learned rate for every weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from perdure.errors import UsageError
from perdure.memory.buffer import Buffer
from perdure.methods.base import Method, check_choice, check_count, check_value
from perdure.methods.fast_weights import FastWeights, chunks, hand_over, leaves_of, loss_at
from perdure.methods.loss_scale import loss_scale
from perdure.methods.replay import add_drawn, columns_of
from perdure.methods.side_passes import frozen_statistics
from perdure.methods.statistics_pass import learn_statistics
from perdure.parameters import average_over_processes
from perdure.registry import register
from perdure.seeding import derive

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner
    from perdure.parameters import Remap


@register("la_maml")
@dataclass
class LaMAML(Method):
    """Learn new rows chunk by chunk on fast weights, and step where all looks-ahead on old and new rows agree.

    Every glance at a batch: fast = theta; for each chunk i: fast <- fast - relu(rates) grad CE(chunk; fast), and L_i is
    the loss of remembered and current rows at fast. Then rates <- rates - opt_lr dL/drates, and theta <- theta -
    relu(rates) dL/dtheta, with L the mean of the L_i.

    Gupta et al. 2020, arXiv 2007.13904. A weight whose gradients disagree between old and new gets a small rate, and a
    rate of 0 or less freezes it. `update="sync"` lets the learner's optimizer make the step of theta; with `opt_lr=0`
    as well, rates stay what they are: C-MAML. Asynchronously (the default) the rates themselves make it, and the
    optimizer and its schedule have no part in it.

    Batch normalisation: rows are normalised by their batch, and no pass at fast weights, which are thrown away, changes
    running statistics. They learn in a pass of their own over remembered and current rows, one a step, at the weights
    that it leaves.

    Parameters
    ----------
    capacity
        Examples kept in total, a uniform sample of the stream; 0 switches the method off.
    batch_size
        Remembered rows a glance; 0 switches the method off.
    alpha
        Rate of every weight to begin with.
    opt_lr
        Rate at which the rates are learned.
    glances
        Meta-steps for every batch.
    chunks
        Pieces of a batch that are learned one after the other; 10 rows in 10 pieces are single examples.
    order
        "first" takes the gradients of the chunks as constants; "second" differentiates through them.
    update
        "async" or "sync".
    clip
        Largest norm of dL/dtheta, and of dL/drates; none if null.
    old_tasks
        Whether only rows of other tasks than the current one are replayed; they need announced tasks.
    """

    capacity: int = 200
    batch_size: int = 10
    alpha: float = 0.15
    opt_lr: float = 0.3
    glances: int = 5
    chunks: int = 10
    order: str = "first"
    update: str = "async"
    clip: float | None = 2.0
    old_tasks: bool = False

    summary: ClassVar[str] = "look-ahead meta-learning with a learned rate for every weight"
    paper: ClassVar[str] = "Gupta et al. 2020, arXiv 2007.13904"
    use_when: ClassVar[str] = "online streams in small batches, some old examples may be kept, and time is no concern"
    cost: ClassVar[str] = "time: glances x (1 + chunks (batch + batch_size) / batch) steps; memory: M D + 7 P"
    stores_examples: ClassVar[bool] = True
    owns: ClassVar[tuple[str, ...]] = ("step",)

    def __post_init__(self) -> None:
        check_count(self.name, "capacity", self.capacity)
        check_count(self.name, "batch_size", self.batch_size)
        check_value(self.name, "alpha", self.alpha)
        check_value(self.name, "opt_lr", self.opt_lr)
        check_count(self.name, "glances", self.glances, 1)
        check_count(self.name, "chunks", self.chunks, 1)
        check_choice(self.name, "order", self.order, ("first", "second"))
        check_choice(self.name, "update", self.update, ("async", "sync"))
        if self.clip is not None:
            check_value(self.name, "clip", self.clip)

    def has(self, hook: str) -> bool:
        return super().has(hook) and 0 not in (self.capacity, self.batch_size)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.buffer = Buffer(self.capacity, seed=derive(learner.seed, "buffer", self.name))
        self.rates = self.parameters.pack({}, fill=self.alpha)

    def resize(self, remap: Remap) -> None:
        self.rates = remap(self.rates, self.alpha)

    @property
    def sample_passes(self) -> int:
        """Passes over every row of the stream, not counting remembered ones."""
        return self.glances * (self.chunks + 1)

    def step(self, batch: Batch) -> Tensor:
        before = self.parameters.theta.clone()
        losses, every = [], batch
        for _ in range(self.glances):
            every = self._with_remembered(batch)
            with frozen_statistics(self.learner.model):
                losses.append(self._glance(batch, every))
        learn_statistics(self.learner, every)
        self.learner.finish_update(before)
        return losses[0]

    def _glance(self, batch: Batch, every: Batch) -> Tensor:
        learner = self.learner
        order = torch.randperm(batch.now.size, generator=self.generator)
        pieces = chunks(batch, self.chunks, order, learner)
        look = self._first_order if self.order == "first" else self._second_order
        loss, gradient, slope, reached = look(pieces, every)
        hand_over(learner, gradient, reached)

        def move() -> None:
            grad = self.parameters.gather()
            self._shorten(grad)
            if self.opt_lr:
                average_over_processes(learner.model, slope)
                self._shorten(slope)
                self.rates.sub_(slope, alpha=self.opt_lr)
            if self.update == "async":
                self.parameters.theta.addcmul_(self.rates.relu(), grad, value=-1)
            elif not learner.flat.step():
                learner.optimizers.step()

        learner.apply_gradient(move=move)
        return loss

    def _first_order(self, pieces: Sequence[Batch], every: Batch) -> tuple[Tensor, Tensor, Tensor, set[str]]:
        """The mean loss, its gradients [P] by theta and by the rates, and what they reach.

        With the chunks' gradients g as constants, fast = theta - relu(rates) (g_1 + ... + g_i): the gradient by theta
        is the one at fast, and that by the rates is minus its product with the sum of the g.
        """
        fast = FastWeights(self.learner)
        rates, active = self.rates.relu(), (self.rates > 0).to(self.rates.dtype)
        piece, look, so_far, gradient, slope = (torch.zeros_like(rates) for _ in range(5))
        losses = []
        for chunk in pieces:
            fast.gradient(chunk, into=piece)
            fast.vector.addcmul_(rates, piece, value=-1)
            so_far.add_(piece)
            losses.append(fast.gradient(every, into=look))
            gradient.add_(look)
            slope.addcmul_(look, so_far, value=-1)
        slope.mul_(active)
        return torch.stack(losses).mean(), gradient.div_(len(pieces)), slope.div_(len(pieces)), fast.reached

    def _second_order(self, pieces: Sequence[Batch], every: Batch) -> tuple[Tensor, Tensor, Tensor, set[str]]:
        """As `_first_order`, with the derivatives of the chunks' gradients as well."""
        learner, scale = self.learner, loss_scale(self.learner)
        start, rates = leaves_of(learner, self.parameters.theta), leaves_of(learner, self.rates)
        fast, losses = dict(start), []
        for chunk in pieces:
            loss = loss_at(learner, fast, chunk)
            found = torch.autograd.grad(
                loss if scale is None else loss * scale, list(fast.values()), create_graph=True, allow_unused=True
            )
            for name, part in zip(list(fast), found, strict=True):
                if part is not None:
                    fast[name] = fast[name] - rates[name].relu() * (part if scale is None else part / scale)
            losses.append(loss_at(learner, fast, every))
        loss = torch.stack(losses).mean()
        wanted = [*start.values(), *rates.values()]
        found = torch.autograd.grad(loss if scale is None else loss * scale, wanted, allow_unused=True)
        by_theta, by_rates = (
            {name: part for name, part in zip(start, half, strict=True) if part is not None}
            for half in (found[: len(start)], found[len(start) :])
        )
        gradient, slope = self.parameters.pack(by_theta), self.parameters.pack(by_rates)
        if scale is not None:
            gradient, slope = gradient.div_(scale), slope.div_(scale)
        return loss.detach(), gradient, slope, set(by_theta)

    def _with_remembered(self, batch: Batch) -> Batch:
        if self.old_tasks and batch.task is None:
            raise UsageError(
                f"{self.name}: old_tasks=True needs to know where tasks begin; call begin_task(), or set it to False"
            )
        if not len(self.buffer):
            return batch
        where = self.buffer.view("task") != batch.task if self.old_tasks else None
        return add_drawn(batch, "replay", self.buffer.sample(self.batch_size, where=where), "joint", None)

    def _shorten(self, vector: Tensor) -> None:
        """Clip a gradient [P] to the norm `clip`, in place."""
        if self.clip is not None:
            vector.mul_((self.clip / (torch.linalg.vector_norm(vector) + 1e-6)).clamp(max=1.0))

    def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
        if batch.first_pass:
            self.buffer.add(columns_of(batch.now, batch.task))
