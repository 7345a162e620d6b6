"""Whether old tasks still give the outputs that they gave: digests of a few of them, taken whenever a task ends.

Only digests are kept, no rows: which rows they are of follows from the stream's seed. Equal digests are equal bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perdure.errors import DataError
from perdure.seeding import generator
from perdure.tree import leaves

if TYPE_CHECKING:
    from perdure.learner import Learner
    from perdure.streams.task import Stream, Task

ROWS = 32


@dataclass(frozen=True)
class Digests:
    """Of each of the first tasks of a stream: the rows that are looked at, and what the model gives for them.

    Attributes
    ----------
    inputs, outputs
        One SHA-256 a task. Outputs are the raw ones, in the task's class columns alone; where a method replaces the
        prediction they are the predicted columns, since that is what anybody gets to see.
    """

    inputs: list[str]
    outputs: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As it is saved."""
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """One comparison: the outputs of `task` after a later task with those after the task itself, both by index.

    `recomputed` says that the later ones are of a model that was built again, and not those of the run.
    """

    task: int
    after: int
    equal: bool
    recomputed: bool


def fixed_rows(task: Task, seed: int) -> Tensor:
    """The rows of a task's test set that are looked at, int64, sorted: at most 32, drawn from the stream's seed."""
    if task.test is None or not len(task.test):
        raise DataError(f"task '{task.name}' has no test examples to look at; give the stream a test set")
    draw = generator(seed, "audit", task.index)
    return torch.randperm(len(task.test), generator=draw)[:ROWS].sort().values


def take_digests(learner: Learner, stream: Stream, count: int) -> Digests:
    """The digests of the first `count` tasks of a task-incremental stream; nothing of the learner changes."""
    found = Digests([], [])
    owner = learner.hooks["predict"]
    for task in stream[:count]:
        rows = fixed_rows(task, stream.seed)
        assert task.test is not None
        x, _ = task.test.gather(rows)
        if owner:
            seen = owner[0].predict(x, task.index)
        else:
            # All at once: the last bits may depend on how many rows a pass has.
            seen = learner.outputs(x, task.index, batch_size=ROWS)[:, list(task.classes)]
        found.inputs.append(digest(leaves(x)))
        found.outputs.append(digest([seen]))
    learner.forward.activate(learner.shown_task)
    return found


def digest(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of the bits of some tensors, their types and shapes.

    >>> one = digest([torch.zeros(2)])
    >>> one == digest([torch.zeros(2)]), one == digest([-torch.zeros(2)]), one == digest([torch.zeros(1, 2)])
    (True, False, False)
    """
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def compared(stored: Sequence[Digests], now: Digests, inside: bool) -> list[Row]:
    """Every old task after every later one.

    Parameters
    ----------
    stored
        What the run took after each of its tasks.
    now
        What a model gives that was built again from a checkpoint: after the last of these tasks, or, if `inside`, in
        the middle of the one behind it.
    """
    rows = []
    last = len(stored) - 1
    for task in range(len(stored)):
        own = stored[task].outputs[task]
        for after in range(task + 1, len(stored) + inside):
            fresh = after == last + inside
            outputs = now.outputs if fresh else stored[after].outputs
            rows.append(Row(task, after, outputs[task] == own, fresh))
    return rows
