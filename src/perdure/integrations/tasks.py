"""What the callbacks for trainers share: one training is one task, and its state is saved with the trainer's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perdure.attachment import Guard, outside_learner
from perdure.checkpoint import load_state, save_state
from perdure.compatibility import check_methods
from perdure.criterion import RowLoss
from perdure.errors import IncompatibleError, UsageError
from perdure.learner import Learner
from perdure.methods.base import Method
from perdure.saving import continual_state, load_continual_state

Split = Callable[[Any], tuple[Any, Any]]
"""From a batch as the trainer's loader gives it: inputs as the model takes them, and targets."""


class TaskRows:
    """A task's data as (inputs, targets): the trainer's loader, asked for only when somebody iterates.

    Without batches that the trainer leaves out, if it has a limit.
    """

    def __init__(self, loader: Callable[[], Iterable[Any]], split: Split, limit: Callable[[], int | None]) -> None:
        self.loader, self.split, self.limit = loader, split, limit

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in islice(self.loader(), self.limit()):
            yield self.split(batch)


class TaskCallback:
    """Base of the callbacks.

    Every training is one task: it begins with the training and ends with it. A training that was interrupted, or
    resumed from a checkpoint, goes on with the task that is open.

    Parameters
    ----------
    methods
        What `perdure.attach` takes; not those that put parameters of their own into the model (HAT).
    criterion
        The trainer's loss of remembered rows, with one value a row or their mean.
    scenario, seed
        As for `perdure.Learner`.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        criterion: RowLoss | None,
        scenario: str | None,
        seed: int,
    ) -> None:
        check_methods(methods)
        for method in methods:
            if method.adds_parameters:
                raise IncompatibleError(
                    f"'{method.name}' puts parameters of its own into the model, which the trainer's checkpoints could "
                    "not restore; use perdure.Learner"
                )
        self.methods = list(methods)
        self.criterion, self.scenario, self.seed = criterion, scenario, seed
        self._guard: Guard | None = None
        self._next: tuple[str, tuple[int, ...]] | None = None
        self._loaded: dict[str, Any] | None = None

    # -- for the caller -------------------------------------------------------------------------------------------

    @property
    def guard(self) -> Guard:
        """What holds on to the model and the optimizer, as `perdure.attach` returns it."""
        if self._guard is None:
            raise UsageError("the callback has seen no model yet; train first")
        return self._guard

    @property
    def learner(self) -> Learner:
        """The learner around the trainer's model: its methods, its tasks, `predict` and `outputs`."""
        return self.guard.learner

    def next_task(self, name: str, classes: Sequence[int] = ()) -> None:
        """Name the task of the next training, and its class columns if scenario, methods or a growing head need them.

        What `begin_task()` is for a learner. Without it the tasks are "task 0", "task 1" and so on.
        """
        self._next = name, tuple(classes)

    def save(self, folder: str | Path) -> None:
        """Write what the methods remember into `folder`; the model and the optimizer are the caller's to save."""
        save_state(folder, {**continual_state(self.learner), "weights": self._digest()})

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote; it is taken over when the next training begins, on the weights it was saved with."""
        self._loaded = load_state(folder)

    # -- for the callbacks ----------------------------------------------------------------------------------------

    @property
    def looks_at_rows(self) -> bool:
        """Whether a method has to be shown the rows of every step."""
        return any(method.has(hook) for method in self.methods for hook in ("on_batch", "loss", "after_step"))

    @property
    def passes_rows(self) -> bool:
        """Whether a method runs the model on rows: those of a step, or a task's data when it ends."""
        return self.looks_at_rows or any(method.needs_task_data and method.acts for method in self.methods)

    def start(self, model: nn.Module, optimizer: Optimizer, data: TaskRows, closures: bool = False) -> None:
        """Take hold of a model and an optimizer that are about to train, and begin or continue a task."""
        if self._guard is None:
            learner = outside_learner(model, optimizer, self.methods, self.criterion, self.scenario, self.seed)
            learner.forward.prepare = _as_given
            self._guard = Guard(learner, optimizer, closures)
        elif self.learner.model is not model:
            raise UsageError("the callback remembers another model's past; make a new Continual for this model")
        else:
            self.guard.follow(optimizer)
        self.guard.forget()
        learner = self.learner
        if self._loaded is not None:
            self._take_over(self._loaded)
            self._loaded = None
        if learner.task is None:
            name, classes = self._next or (f"task {learner.tasks_begun}", ())
        else:
            name, classes = learner.task.name, learner.task.classes
            if self._next is not None and self._next[0] != name:
                raise UsageError(
                    f"task '{self._next[0]}' cannot begin, because the training of task '{name}' did not come to its "
                    f"end; train that first"
                )
            learner.restored = True
        begun = learner.tasks_begun
        try:
            self.guard.begin(name, data, classes)
        except Exception:
            if learner.tasks_begun > begun:  # a method refused the task, and may be content with a better description
                learner.task, learner.tasks_begun = None, begun
            raise
        self._next = None

    def finish(self) -> None:
        """End the open task, if there is one."""
        if self._guard is not None and self.learner.task is not None:
            self.guard.end()

    def _take_over(self, state: dict[str, Any]) -> None:
        saved = state.get("weights")
        if saved is not None and saved != self._digest():
            raise UsageError(
                "the model's weights are not those with which the methods' state was saved; load both from the same "
                "checkpoint"
            )
        load_continual_state(self.learner, state)

    def _digest(self) -> str:
        theta = self.learner.parameters.theta.detach().to("cpu")
        return hashlib.sha256(theta.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _as_given(x: Any) -> Any:
    """Rows are stored as the trainer feeds them to the model, and go into it like that again."""
    return x


def as_pair(batch: Any) -> tuple[Any, Tensor]:
    """A batch that is a pair already."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise UsageError(
            f"a batch is a {type(batch).__name__} and not a pair of inputs and targets; say how to make one of it: "
            "Continual(..., rows=lambda batch: (batch['image'], batch['label']))"
        )
    return batch[0], batch[1]
