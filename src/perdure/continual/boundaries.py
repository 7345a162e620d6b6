"""Where one task ends and the next begins, for callers who say so before training, after it, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TaskId = Any
"""Whatever names a task: a number, a string, anything hashable but None."""


class Boundaries:
    """The state machine behind `register_task` and `train_step(..., task_id)`.

    A task is finalised once for each time it was trained, whether it is registered before its training, after it, or
    twice: registering decides by what has happened to the weights since the last boundary, not by its place in the
    code. It has no data and no model; what it decides is done by three functions.

    Parameters
    ----------
    moved
        Whether the weights differ from those at the last boundary, so that training elsewhere is noticed.
    finalise
        Consolidates a task with the weights as they are, or raises, and then nothing has changed here.
    begin
        Told which task is open now.

    Attributes
    ----------
    open
        The task that is being trained, or None.
    steps
        Training steps through the wrapper since the last boundary.
    done, registered
        Tasks that were finalised, and tasks that were registered, in order and each once.

    >>> log = []
    >>> tasks = Boundaries(lambda: False, lambda task: log.append(f"finalise {task}"), lambda task: None)
    >>> tasks.register(1); _ = tasks.enter(1); tasks.steps += 1; tasks.register(2); tasks.register(2)
    >>> log, tasks.open
    (['finalise 1'], 2)
    """

    def __init__(
        self, moved: Callable[[], bool], finalise: Callable[[TaskId], None], begin: Callable[[TaskId], None]
    ) -> None:
        self._moved, self._finalise, self._begin = moved, finalise, begin
        self.open: TaskId = None
        self.steps = 0
        self.done: list[TaskId] = []
        self.registered: list[TaskId] = []

    @property
    def dirty(self) -> bool:
        """Whether anything was trained since the last boundary."""
        return self.steps > 0 or self._moved()

    def register(self, task: TaskId) -> None:
        """Somebody names a task, before or after its training."""
        if not self.dirty:
            if task != self.open and task not in self.done:
                self._enter(task)
        elif self.open is None or task == self.open:
            self._leave(task)
        else:
            self._leave(self.open)
            self._enter(task)
        if task not in self.registered:
            self.registered.append(task)

    def enter(self, task: TaskId) -> bool:
        """A training step names its task; false if training that belongs to no task was found before it."""
        if task == self.open:
            return True
        owned = self.open is not None or not self.dirty
        # One task is registered, nothing was trained, and now comes another: the model knew the first one already.
        known_before = not self.done and self.registered == [self.open]
        if self.open is not None and (known_before or self.dirty):
            self._leave(self.open)
        self._enter(task)
        return owned

    def _leave(self, task: TaskId) -> None:
        self._finalise(task)
        self.open, self.steps = None, 0
        if task not in self.done:
            self.done.append(task)

    def _enter(self, task: TaskId) -> None:
        self.open, self.steps = task, 0
        self._begin(task)

    def state_dict(self) -> dict[str, Any]:
        return {
            "open": self.open,
            "steps": self.steps,
            "done": list(self.done),
            "registered": list(self.registered),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.open, self.steps = state["open"], state["steps"]
        self.done, self.registered = list(state["done"]), list(state["registered"])
