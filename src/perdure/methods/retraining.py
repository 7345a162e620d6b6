"""More steps on a task's own data when its training has ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor

from perdure.errors import DataError
from perdure.seeding import Part
from perdure.streams.task import draw_plan

if TYPE_CHECKING:
    from perdure.learner import Learner

Rows = tuple[Any, Any, Tensor | None]


def retrain(learner: Learner, batches: Iterator[Rows], lr: float) -> None:
    """Take steps of the learner on batches of (inputs, targets, row numbers) that it has seen before.

    Learning rates are `lr` times what they are and schedules stand still. Every other method takes part, and no buffer
    stores the rows again. Afterwards the model is in the mode in which it was, without gradients.
    """
    model, schedulers = learner.model, learner.schedulers
    modes = [(module, module.training) for module in model.modules()]
    if not model.training:
        model.train()
    learner.schedulers = []
    try:
        with learner.optimizers.times(lr):
            for x, y, index in batches:
                learner.step(x, y, index=index, first_pass=False)
    finally:
        learner.schedulers = schedulers
        for module, training in modes:
            module.training = training
    learner.parameters.release()


def training_batches(data: Any, count: int, batch_size: int, seed: Sequence[Part]) -> Iterator[Rows]:
    """`count` batches of a task's data: in orders drawn from `seed`, or as a loader gives them, again and again.

    Raises
    ------
    DataError
        If a loader gives nothing (any more).
    """
    if hasattr(data, "batches"):
        yield from data.batches(draw_plan(len(data), seed, batch_size=batch_size, steps=count))
        return
    while count > 0:
        found = 0
        for pair in islice(data, count):
            yield pair[0], pair[1], None
            found += 1
        if not found:
            raise DataError("the task's data is used up and cannot be trained on again; pass a loader, not an iterator")
        count -= found
