"""Examples chosen by what the model makes of them, when their task ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perdure.data.joined import own_examples
from perdure.errors import UsageError
from perdure.memory.ranked import Ranked
from perdure.methods.features import features_of
from perdure.tree import cat, take, to_device

if TYPE_CHECKING:
    from perdure.learner import Learner
    from perdure.memory.buffer import Buffer
    from perdure.streams.task import Task


@torch.no_grad()
def choose_examples(
    learner: Learner, buffer: Buffer, task: Task, *, with_logits: bool = False, per_class: int | None = None
) -> None:
    """Rank the task's training data class by class, and add the best rows to a buffer that keeps ranked rows.

    Parameters
    ----------
    buffer
        With the writing policy "herding", "nearest_mean" or "k_center".
    with_logits
        Store the logits [rows, columns] that the chosen rows have now, in evaluation mode.
    per_class
        Let the buffer grow by so many rows of each class; by default the classes share its capacity.

    Raises
    ------
    UsageError
        If the targets are not classes.
    """
    policy = buffer.writing
    assert isinstance(policy, Ranked)
    features, y, gather = _measured(learner, task)
    if y.ndim != 1 or y.is_floating_point():
        raise UsageError(
            f"writing='{policy.name}' chooses examples class by class, and the targets of task '{task.name}' are "
            "no integer classes; use writing='reservoir'"
        )
    classes = {label: (y == label).nonzero().squeeze(1) for label in sorted(set(y.tolist()))}
    if not classes:
        return

    def columns(index: Tensor) -> dict[str, Any]:
        x, labels = gather(index)
        found = {"x": to_device(x, learner.device), "y": to_device(labels, learner.device), "task": task.index}
        return found | {"logits": learner.outputs(x, learner.shown_task)} if with_logits else found

    if per_class is not None:
        buffer.resize((buffer.capacity or 0) + per_class * len(classes))
    if buffer.capacity is None:  # what fits into a budget of bytes is known when the columns are
        first = columns(torch.zeros(1, dtype=torch.int64))
        buffer.add({name: c if isinstance(c, int) else take(c, slice(0, 0)) for name, c in first.items()})
    room = policy.room({(task.index, label): len(own) for label, own in classes.items()}, buffer.capacity or 0)
    ranked = []
    for label, own in classes.items():
        count = room[task.index, label] if per_class is None else min(per_class, room[task.index, label])
        ranked.append(own[policy.select(features[own.to(features.device)], count).cpu()])
    buffer.add(columns(torch.cat(ranked)))


def _measured(learner: Learner, task: Task) -> tuple[Tensor, Tensor, Any]:
    """Features [rows, d], targets [rows] on the CPU, and how to get the raw rows (x, y) of an index."""
    data = own_examples(task.train)
    features, targets, kept = [], [], []
    addressed = hasattr(data, "gather")
    for x, y, *_ in data.ordered(256) if addressed else data:
        features.append(features_of(learner, x, task=learner.shown_task))
        targets.append(y.cpu())
        if not addressed:
            kept.append(x)
    y = torch.cat(targets)
    if addressed:
        return torch.cat(features), y, data.gather
    # A loader that shuffles gives its rows once: those that are chosen must be the ones that were measured.
    every = cat(kept)
    return torch.cat(features), y, lambda index: (take(every, index), y[index])
