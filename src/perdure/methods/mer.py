"""Meta-experience replay: one example at a time, and only a part of each sequence's way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from perdure.batch import Batch, Source
from perdure.memory.buffer import Buffer
from perdure.methods.base import Method, check_choice, check_count, check_value
from perdure.methods.replay import columns_of
from perdure.methods.side_passes import running_statistics
from perdure.methods.statistics_pass import learn_statistics
from perdure.registry import register
from perdure.seeding import derive
from perdure.tree import take, to_device

if TYPE_CHECKING:
    from perdure.learner import Learner


@register("mer")
@dataclass
class MER(Method):
    """Learn every example in short sequences with remembered ones, and go only a part of the way that they lead.

    For every current example: `steps` sequences of single-example steps over it and `batch_size` remembered ones, after
    each theta <- before + beta (theta - before); after all, theta <- start + gamma (theta - start). So gradients of
    different examples are rewarded for agreeing (Reptile).

    Riemer et al. 2019, arXiv 1810.11910. Algorithm 1 is the above, the current example first. Algorithm 6 has the
    current example last and gamma instead of beta. Algorithm 7 has one sequence, the current example last with
    `steps` times the learning rate. The learner's optimizer makes the single steps, plain SGD in the paper (lr 0.03 to
    0.1), with its clipping; a schedule advances once a batch. An example is remembered once it is learned, so cutting
    the stream into other batches changes nothing.

    Batch normalisation: one row cannot be normalised by itself, so the steps normalise by running statistics, which
    learn from the current rows in a pass of their own. Weights alone are interpolated, never statistics or counters.

    Parameters
    ----------
    capacity
        Examples kept in total, a uniform sample of the stream; 0 switches the method off.
    batch_size
        Remembered examples in a sequence; 0 switches the method off.
    steps
        Sequences for every current example (with algorithm 7: the factor on its learning rate); 0 switches the method
        off.
    beta
        Part of the way of every sequence (algorithm 1).
    gamma
        Part of the way of all sequences together; of every sequence with algorithm 6. By default 1 with algorithm 1,
        else 0.3.
    algorithm
        1, 6 or 7 of the paper.
    """

    capacity: int = 1000
    batch_size: int = 10
    steps: int = 5
    beta: float = 0.03
    gamma: float | None = None
    algorithm: int = 1

    summary: ClassVar[str] = "replay single examples in sequences and move a part of the way: gradients learn to agree"
    paper: ClassVar[str] = "Riemer et al. 2019, arXiv 1810.11910"
    use_when: ClassVar[str] = "short online streams, some old examples may be kept, and time is no concern"
    cost: ClassVar[str] = "time: steps (batch_size + 1) single-example steps an example; memory: M D + 3 P"
    stores_examples: ClassVar[bool] = True
    owns: ClassVar[tuple[str, ...]] = ("step",)

    def __post_init__(self) -> None:
        check_count(self.name, "capacity", self.capacity)
        check_count(self.name, "batch_size", self.batch_size)
        check_count(self.name, "steps", self.steps)
        check_value(self.name, "beta", self.beta, 0, 1)
        if self.gamma is not None:
            check_value(self.name, "gamma", self.gamma, 0, 1)
        check_choice(self.name, "algorithm", self.algorithm, (1, 6, 7))

    def has(self, hook: str) -> bool:
        return super().has(hook) and 0 not in (self.capacity, self.batch_size, self.steps)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.buffer = Buffer(self.capacity, seed=derive(learner.seed, "buffer", self.name))

    @property
    def sample_passes(self) -> int:
        """Passes over single rows for every row of the stream."""
        return (1 if self.algorithm == 7 else self.steps) * (self.batch_size + 1)

    def step(self, batch: Batch) -> Tensor:
        learner = self.learner
        before = learner.parameters.theta.clone()
        learn_statistics(learner, batch)
        with running_statistics(learner.model):
            losses = [
                self._learn(replace(batch.now.piece(slice(i, i + 1)), whole=None), batch) for i in range(batch.size)
            ]
        learner.finish_update(before)
        return torch.stack(losses).mean()

    def _learn(self, current: Source, batch: Batch) -> Tensor:
        """Learn one example and remember it; returns its loss when it was first met."""
        theta = self.parameters.theta
        gamma = (1.0 if self.algorithm == 1 else 0.3) if self.gamma is None else self.gamma
        within, across = (self.beta, gamma) if self.algorithm == 1 else (gamma, 1.0)
        losses, start = [], theta.clone()
        for _ in range(1 if self.algorithm == 7 else self.steps):
            before = theta.clone()
            remembered = self._remembered(batch)
            sequence = [current, *remembered] if self.algorithm == 1 else [*remembered, current]
            for source in sequence:
                last = self.algorithm == 7 and source is current
                loss = self._descend(source, batch, float(self.steps) if last else 1.0)
                if source is current:
                    losses.append(loss)
            torch.lerp(before, theta, within, out=theta)
        torch.lerp(start, theta, across, out=theta)
        if batch.first_pass:
            self.buffer.add(columns_of(current, batch.task))
        return losses[0]

    def _remembered(self, batch: Batch) -> list[Source]:
        """Examples from the memory, one a source, changed at random if the current rows are."""
        if not len(self.buffer):
            return []
        drawn: dict[str, Any] = self.buffer.sample(self.batch_size)
        drawn.pop("slot")
        drawn = {name: to_device(column, self.learner.device) for name, column in drawn.items() if name != "task"} | {
            "task": drawn["task"]
        }
        drawn["x"] = batch.augmented(drawn["x"])
        rows = [take(drawn, slice(i, i + 1)) for i in range(len(drawn["task"]))]
        return [Source("replay", row["x"], row["y"], tasks=row["task"]) for row in rows]

    def _descend(self, source: Source, batch: Batch, factor: float) -> Tensor:
        """One step on one example, with `factor` times the learning rate; returns its loss."""
        learner = self.learner
        learner.parameters.release()
        learner.optimizers.release()
        loss, _ = learner.backward(Batch((source,), batch.task))
        # Not the loss times the factor: momentum would keep it for later steps, clipping and Adam would take it back.
        with learner.optimizers.times(factor):
            learner.apply_gradient()
        return loss
