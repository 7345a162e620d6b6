"""The wrapper of experience replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perdure.continual.boundaries import TaskId
from perdure.continual.wrapper import Wrapper, check_id
from perdure.criterion import RowLoss
from perdure.methods.base import check_value
from perdure.methods.replay import Replay
from perdure.tree import as_tensors, leaves, rows, take, to_device, tree_map


@dataclass
class Staged:
    """Rows that wait until the step on them has been taken; `chosen` are their places in the batch they came in."""

    x: Any
    y: Tensor
    task: int
    chosen: Tensor
    size: int

    def are_of(self, x: Any, y: Tensor) -> bool:
        """Whether `x`, `y` is the batch that these rows came in."""
        if rows(x) != self.size:
            return False
        theirs = [*leaves(take(x, self.chosen)), take(y, self.chosen)]
        ours = [*leaves(self.x), self.y]
        return len(ours) == len(theirs) and all(
            a.device == b.device and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
        )


class ExperienceReplay(Wrapper):
    """Train on a bounded, fair sample of past batches besides the current one.

    loss = mean over the current rows and `round(replay_ratio * rows)` remembered ones. The method is
    `perdure.methods.Replay` with reservoir sampling: Chaudhry et al. 2019, arXiv 1902.10486.

    Parameters
    ----------
    model
        Any module.
    memory_size
        Examples kept at most; 0 switches replay off.
    replay_ratio
        Remembered rows for each current one.
    device
        Where to train; the model's own device if left out.

    >>> model = nn.Linear(3, 2)
    >>> replay = ExperienceReplay(model, memory_size=20)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> for _ in range(3):
    ...     x, y = torch.randn(8, 3), torch.randint(2, (8,))
    ...     loss = replay.train_step(optimizer, nn.CrossEntropyLoss(), x, y, task_id=1)
    ...     replay.add_to_memory(x, y, task_id=1)  # here, or before the step
    >>> [tuple(part.shape) for part in replay.get_replay_batch(4)]
    [(4, 3), (4,)]
    """

    method: Replay

    def __init__(
        self,
        model: nn.Module,
        memory_size: int = 1000,
        replay_ratio: float = 0.5,
        device: str | torch.device | None = None,
    ) -> None:
        check_value("ExperienceReplay", "memory_size", memory_size)
        check_value("ExperienceReplay", "replay_ratio", replay_ratio)
        super().__init__(model, Replay(capacity=memory_size, ratio=replay_ratio), device)
        self._staged: Staged | None = None
        self._known: set[int] = set()
        self._known_of: TaskId = None

    def add_to_memory(
        self, inputs: Any, targets: Any, task_id: TaskId, *, sample_index: Tensor | Sequence[int] | None = None
    ) -> None:
        """Offer a batch to the memory, once for every time it is trained on, before or after `train_step`.

        Added before its step, the batch does not become part of that step. What was offered in the same task already
        is passed over, so that more epochs do not fill the memory with copies.

        Parameters
        ----------
        inputs, targets, task_id
            As for `train_step`.
        sample_index
            int64 [rows], the place of each row in its data set, by which copies are recognised; by content if left
            out, which cannot know a sample again that was augmented.
        """
        check_id(task_id)
        self._follow(at_boundary=False)
        self._store_staged()
        if task_id != self._known_of:
            self._known, self._known_of = set(), task_id
        device = self.learner.device
        x, y = to_device(as_tensors(inputs), device), to_device(as_tensors(targets), device)
        keys = _content(x, y) if sample_index is None else [int(index) for index in sample_index]
        chosen = []
        for row, key in enumerate(keys):
            if key not in self._known:
                self._known.add(key)
                chosen.append(row)
        index = torch.tensor(chosen, dtype=torch.int64)
        kept = tree_map(Tensor.detach, take(x, index)), take(y, index)
        task = self._index.setdefault(task_id, len(self._index))
        self._staged = Staged(*kept, task, index, len(keys))

    def get_replay_batch(self, batch_size: int) -> tuple[Any, Tensor] | None:
        """Draw `batch_size` remembered rows without replacement, fewer if there are fewer; None if there are none.

        A batch whose step is still to come is not among them.
        """
        check_value("ExperienceReplay", "batch_size", batch_size)
        if not len(self.method.buffer):
            return None
        drawn = self.method.buffer.sample(batch_size)
        return to_device(drawn["x"], self.learner.device), to_device(drawn["y"], self.learner.device)

    def train_step(self, optimizer: Optimizer, loss_fn: RowLoss, inputs: Any, targets: Any, task_id: TaskId) -> Tensor:
        """Perform one training step on a batch and on rows drawn from the memory; see `Wrapper.train_step`."""
        self._follow(at_boundary=False)
        device = self.learner.device
        x, y = to_device(as_tensors(inputs), device), to_device(as_tensors(targets), device)
        if self._staged is not None and not self._staged.are_of(x, y):
            self._store_staged()
        loss = super().train_step(optimizer, loss_fn, x, y, task_id)
        self._store_staged()
        return loss

    def _store_staged(self) -> None:
        staged, self._staged = self._staged, None
        if staged is not None and len(staged.chosen):
            self.method.buffer.add({"x": staged.x, "y": staged.y, "task": staged.task})

    def _warn_of_stray_training(self, task_id: TaskId) -> None:
        """Training elsewhere is as good as here: what counts is what was added to the memory."""

    def _vectors(self) -> list[Tensor]:
        staged = [] if self._staged is None else [*leaves(self._staged.x), self._staged.y]
        return [*super()._vectors(), *staged]

    def state_dict(self) -> dict[str, Any]:
        staged = None if self._staged is None else dict(vars(self._staged))
        known = {"keys": torch.tensor(sorted(self._known), dtype=torch.int64), "task": self._known_of}
        return {**super().state_dict(), "staged": staged, "known": known}

    def _load(self, state: dict[str, Any]) -> None:
        self._staged = None if state["staged"] is None else Staged(**to_device(state["staged"], self.learner.device))
        self._known, self._known_of = set(state["known"]["keys"].tolist()), state["known"]["task"]


def _content(x: Any, y: Tensor) -> list[int]:
    """A 64-bit digest of every row's bytes."""
    columns = [leaf.detach().cpu().contiguous() for leaf in (*leaves(x), y)]
    width = [column.reshape(len(column), -1).view(torch.uint8).numpy() for column in columns]
    digests = []
    for row in range(rows(y)):
        digest = blake2b(digest_size=8)
        for column in width:
            digest.update(column[row].tobytes())
        digests.append(int.from_bytes(digest.digest(), "big", signed=True))
    return digests
