"""Recent snapshots of a learner, for somebody who learns only now that a task has ended a while ago."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from perdure.learner import Learner
    from perdure.methods.base import Method
    from perdure.parameters import Remap


@dataclass
class Snapshot:
    """The model before a step, and the vectors that methods add up within a task."""

    step: int
    theta: Tensor
    buffers: dict[str, Tensor]
    sums: dict[str, Tensor]


class Lagged:
    """The `keep` newest snapshots, one in `every` steps.

    Memory: `keep` times P, and as much again for each vector in `Method.task_sums`.
    """

    def __init__(self, learner: Learner, every: int, keep: int) -> None:
        self.learner, self.every, self.keep = learner, every, keep
        self.ring: list[Snapshot] = []

    def restart(self, step: int) -> None:
        """Keep nothing but the model as it is before `step`."""
        self.ring = [self._snapshot(step)]

    def after_step(self, steps: int) -> None:
        """Take a snapshot if it is time to, when `steps` steps have been taken."""
        if steps % self.every == 0:
            self.ring = [*self.ring, self._snapshot(steps)][-self.keep :]

    @contextmanager
    def as_it_was(self, change_point: int, steps: int) -> Iterator[None]:
        """The model with the newest weights from before step `change_point` (else the oldest), then as it is now.

        A method that changes weights meanwhile keeps its change: then training goes on from there. What methods add up
        within a task is divided: inside is the part up to the snapshot, and afterwards the rest is added to what the
        method has left there. `steps` is the number of steps taken so far.
        """
        learner = self.learner
        if change_point > steps - 1:  # nothing has changed yet
            yield
            return
        clean = [snapshot for snapshot in self.ring if snapshot.step <= change_point]
        lagged = clean[-1] if clean else self.ring[0]
        theta, now = learner.parameters.theta, self._snapshot(steps)
        self._put(lagged)
        try:
            yield
        except BaseException:
            self._put(now)
            raise
        changed = learner.parameters.theta is not theta or not torch.equal(theta, lagged.theta)
        with torch.no_grad():
            if not changed:
                self._put(Snapshot(now.step, now.theta, now.buffers, {}))
            for key, method, name in self._summing():
                getattr(method, name).add_(now.sums[key] - lagged.sums[key])

    def _snapshot(self, step: int) -> Snapshot:
        learner = self.learner
        buffers = {name: tensor.clone() for name, tensor in learner.parameters.module.named_buffers()}
        sums = {key: getattr(method, name).clone() for key, method, name in self._summing()}
        return Snapshot(step, learner.parameters.theta.clone(), buffers, sums)

    @torch.no_grad()
    def _put(self, snapshot: Snapshot) -> None:
        self.learner.parameters.theta.copy_(snapshot.theta)
        for name, tensor in self.learner.parameters.module.named_buffers():
            if name in snapshot.buffers:
                tensor.copy_(snapshot.buffers[name])
        for key, method, name in self._summing():
            if key in snapshot.sums:
                getattr(method, name).copy_(snapshot.sums[key])

    def _summing(self) -> list[tuple[str, Method, str]]:
        """Every vector that a method adds up within a task."""
        return [(f"{m.name}.{name}", m, name) for m in self.learner.methods for name in m.task_sums]

    # -- state ----------------------------------------------------------------------------------------------------

    def resize(self, remap: Remap) -> None:
        """Follow a parameter vector that changed shape."""
        theta = self.learner.parameters.theta
        for snapshot in self.ring:
            snapshot.theta = remap(snapshot.theta, theta)
            snapshot.sums = {key: remap(vector, 0.0) for key, vector in snapshot.sums.items()}

    def state(self) -> list[dict[str, Any]]:
        """The snapshots as plain dictionaries."""
        return [vars(snapshot) for snapshot in self.ring]

    def load(self, state: list[dict[str, Any]]) -> None:
        """Take over what `state` gave."""
        device = self.learner.parameters.theta.device
        self.ring = [
            Snapshot(
                saved["step"],
                saved["theta"].to(device, copy=True),
                {name: tensor.to(device, copy=True) for name, tensor in saved["buffers"].items()},
                {name: tensor.to(device, copy=True) for name, tensor in saved["sums"].items()},
            )
            for saved in state
        ]
