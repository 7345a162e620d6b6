"""The wrapper of Elastic Weight Consolidation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from perdure.continual.boundaries import TaskId
from perdure.continual.penalty import PenaltyWrapper
from perdure.continual.wrapper import check_id
from perdure.criterion import RowLoss
from perdure.data.examples import as_examples
from perdure.errors import DivergedError, UsageError
from perdure.learner import Learner
from perdure.methods import ewc as methods
from perdure.methods.base import check_value
from perdure.parameters import Remap
from perdure.tree import as_tensors, leaves, rows, to_device, tree_map


class EWC(PenaltyWrapper):
    """Penalise changes of weights in proportion to their Fisher information on past tasks.

    loss += importance / 2 * sum_k sum_i F_k,i (theta_i - theta_k,i)^2 over the finished tasks k. The method is
    `perdure.methods.EWC`: Kirkpatrick et al. 2017, arXiv 1612.00796.

    Parameters
    ----------
    model
        Any module with outputs [rows, classes].
    importance
        Factor of the penalty (it counts half).
    fisher_sample_size
        Samples of a task that its Fisher information is estimated from, exactly so many if there are as many.
    device
        Where to train; the model's own device if left out.

    >>> model = nn.Linear(3, 2)
    >>> ewc = EWC(model, importance=10.0)
    >>> loader = [(torch.randn(8, 3), torch.randint(2, (8,)))]
    >>> ewc.register_task(1, loader)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> loss = ewc.train_step(optimizer, nn.CrossEntropyLoss(), *loader[0], task_id=1)
    >>> ewc.register_task(2, loader)  # task 1 ends here
    >>> bool(ewc.method.importance.sum() > 0), ewc.get_ewc_loss().item()
    (True, 0.0)
    """

    method: methods.EWC

    def __init__(
        self,
        model: nn.Module,
        importance: float = 1000.0,
        fisher_sample_size: int = 1000,
        device: str | torch.device | None = None,
    ) -> None:
        check_value("EWC", "importance", importance)
        check_value("EWC", "fisher_sample_size", fisher_sample_size, 1)
        super().__init__(model, methods.EWC(strength=importance, n_samples=fisher_sample_size), device)
        self._data: dict[TaskId, Any] = {}
        self._recent: deque[tuple[Any, Any]] = deque()
        # Weights at the end of the latest task and of those without a Fisher yet, and the penalty without the latest.
        self._ends: dict[TaskId, _End] = {}
        self._pending: set[TaskId] = set()
        self._latest: TaskId = None
        self._without_latest = _Penalty.of(self.method)

    def register_task(self, task_id: TaskId, dataloader: Any = None) -> None:
        """Name a task before or after its training, with its data; what was trained since the last one is consolidated.

        Its Fisher information is estimated when it ends, with its own loader, or without one from its last batches in
        `train_step`. If there is neither, it is pending: `update_fisher` completes it, and until then nothing protects
        the task. Calling it again changes nothing.

        Parameters
        ----------
        task_id
            A number, a name, anything hashable.
        dataloader
            Batches (inputs, targets); a data set or a pair (inputs, targets) will do.
        """
        check_id(task_id)
        data = _as_batches(dataloader)
        if data is not None:
            self._data[task_id] = data
        self._register(task_id)

    def update_fisher(self, task_id: TaskId, dataloader: Any) -> None:
        """Estimate a finished task's Fisher information from this data, with the weights that it ended with.

        For a task that is still open it names the data for its end, as `register_task` does.

        Raises
        ------
        UsageError
            If the task was never registered, or its Fisher information cannot be told from later ones any more.
        """
        data = _as_batches(dataloader)
        if data is None:
            raise UsageError("update_fisher needs the task's data; pass a loader of (inputs, targets)")
        self._follow()
        if task_id in self._ends:
            self._replace_fisher(task_id, data)
        elif task_id == self._boundaries.open:
            self._data[task_id] = data
        elif task_id in self._boundaries.done:
            raise UsageError(
                f"the Fisher information of task {task_id!r} is merged with those of later tasks; only that of the "
                f"latest task ({self._latest!r}) and pending ones can be updated"
            )
        else:
            raise UsageError(f"task {task_id!r} is not known; call register_task({task_id!r}, loader)")

    def get_ewc_loss(self) -> Tensor:
        """The penalty, a scalar to differentiate in a loop of your own; 0 before the first task ends."""
        return self._penalty_loss()

    def train_step(self, optimizer: Optimizer, loss_fn: RowLoss, inputs: Any, targets: Any, task_id: TaskId) -> Tensor:
        """Perform one training step with the penalty; see `Wrapper.train_step`."""
        loss = super().train_step(optimizer, loss_fn, inputs, targets, task_id)
        if task_id in self._data:
            self._recent.clear()
        else:
            self._keep(as_tensors(inputs), as_tensors(targets))
        return loss

    def _keep(self, inputs: Any, targets: Any) -> None:
        """Remember a batch, and of those before it as many as the Fisher information needs."""
        self._recent.appendleft((tree_map(_copy, inputs), tree_map(_copy, targets)))
        spare = sum(rows(x) for x, _ in self._recent) - (self.method.n_samples or 0)
        while spare >= rows(self._recent[-1][0]):
            spare -= rows(self._recent.pop()[0])

    def _change_task(self, old: TaskId, data: Any, new: TaskId) -> None:
        if data is not None:
            self._data.setdefault(old, _as_batches(data))
        super()._change_task(old, data, new)

    # -- consolidating --------------------------------------------------------------------------------------------

    def _begin(self, task_id: TaskId) -> None:
        super()._begin(task_id)
        self._recent.clear()

    def _consolidate(self, task_id: TaskId) -> None:
        before, end = _Penalty.of(self.method), _End.of(self.learner)
        data: Any = self._data.get(task_id)
        if data is None and self._recent:
            data = list(self._recent)
        assert self.learner.task is not None
        if data is not None:
            self.learner.task = replace(self.learner.task, train=data)
            with _order_kept(data):
                self.learner.end_task()
            self._pending.discard(task_id)
        elif not bool(end.weights.isfinite().all()):
            raise DivergedError(f"training diverged: weights are not finite at the end of task {task_id!r}")
        else:
            self._pending.add(task_id)
        if self._latest not in self._pending:
            self._ends.pop(self._latest, None)
        self._ends[task_id], self._latest, self._without_latest = end, task_id, before
        self._recent.clear()

    def _replace_fisher(self, task_id: TaskId, data: Any) -> None:
        """Set the Fisher information of the latest task, or add that of a pending one."""
        method, end = self.method, self._ends[task_id]
        whole = _Penalty.of(method)
        try:
            fisher = self._estimate(task_id, data)
        finally:
            whole.put(method)
        if task_id != self._latest:
            self._without_latest.put(method)
            method.absorb(fisher, end.weights)
            self._without_latest = _Penalty.of(method)
            whole.put(method)
            del self._ends[task_id]
        else:
            self._without_latest.put(method)
        method.absorb(fisher, end.weights)
        self._pending.discard(task_id)

    def _estimate(self, task_id: TaskId, data: Any) -> Tensor:
        """A task's Fisher diagonal [P] at the weights that it ended with: what the empty method absorbs there."""
        learner = self.learner
        now, open_task = _End.of(learner), learner.task
        _Penalty().put(self.method)
        learner.task = replace(self._task(task_id), train=data)
        self._ends[task_id].put(learner)
        try:
            with _order_kept(data):
                self.method.end_task(learner.task)
        finally:
            now.put(learner)
            learner.task = open_task
        assert self.method.importance is not None
        return self.method.importance

    # -- state ----------------------------------------------------------------------------------------------------

    def _resize(self, remap: Remap) -> None:
        super()._resize(remap)
        theta = self.learner.parameters.theta
        for end in self._ends.values():
            end.weights = remap(end.weights, theta)
        without = self._without_latest
        if without.importance is not None and without.anchor is not None:
            without.importance, without.anchor = remap(without.importance, 0.0), remap(without.anchor, theta)

    def _vectors(self) -> list[Tensor]:
        ends = [tensor for end in self._ends.values() for tensor in (end.weights, *end.buffers.values())]
        without = [v for v in (self._without_latest.importance, self._without_latest.anchor) if v is not None]
        return [*super()._vectors(), *ends, *without, *leaves(list(self._recent))]

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "recent": [list(batch) for batch in self._recent],
            "ends": [[task_id, dict(vars(end)), task_id in self._pending] for task_id, end in self._ends.items()],
            "latest": self._latest,
            "without_latest": dict(vars(self._without_latest)),
        }

    def _load(self, state: dict[str, Any]) -> None:
        device = self.learner.device
        self._recent = deque((x, y) for x, y in state["recent"])
        self._ends = {task_id: _End(**to_device(end, device)) for task_id, end, _ in state["ends"]}
        self._pending = {task_id for task_id, _, pending in state["ends"] if pending}
        self._latest, self._without_latest = state["latest"], _Penalty(**to_device(state["without_latest"], device))


@dataclass
class _Penalty:
    """A merged penalty: S [P], mu [P] and the constant. The method makes new tensors whenever they change."""

    importance: Tensor | None = None
    anchor: Tensor | None = None
    constant: float = 0.0

    @classmethod
    def of(cls, method: methods.EWC) -> _Penalty:
        return cls(method.importance, method.anchor, method.constant)

    def put(self, method: methods.EWC) -> None:
        method.importance, method.anchor, method.constant = self.importance, self.anchor, self.constant
        if self.importance is not None and self.anchor is not None:
            method.replace(self.importance, self.anchor)


@dataclass
class _End:
    """The model at one moment: weights [P], and buffers such as running statistics."""

    weights: Tensor
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, learner: Learner) -> _End:
        buffers = {name: tensor.clone() for name, tensor in learner.parameters.module.named_buffers()}
        return cls(learner.parameters.theta.clone(), buffers)

    @torch.no_grad()
    def put(self, learner: Learner) -> None:
        learner.parameters.theta.copy_(self.weights)
        for name, tensor in learner.parameters.module.named_buffers():
            if name in self.buffers and self.buffers[name].shape == tensor.shape:
                tensor.copy_(self.buffers[name])


def _as_batches(data: Any) -> Any:
    """Something to iterate over for (inputs, targets), as often as it is needed."""
    if data is None:
        return None
    if isinstance(data, (tuple, Dataset)):
        return as_examples(data)
    if not hasattr(data, "__iter__"):
        raise UsageError(f"dataloader is a {type(data).__name__}; pass a DataLoader or a list of (inputs, targets)")
    return data


@contextmanager
def _order_kept(data: Any) -> Iterator[None]:
    """Leave a shuffling loader's own generator as it is, so that this pass does not change the next epoch's order."""
    owners = (data, getattr(data, "sampler", None))
    generators = [g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
