"""What the five wrappers share: a learner with one method, and a training step with the caller's optimizer and loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perdure.continual.boundaries import Boundaries, TaskId
from perdure.criterion import RowLoss
from perdure.errors import PerdureWarning, UsageError
from perdure.learner import Learner
from perdure.methods.base import Method
from perdure.parameters import Layout, Remap
from perdure.streams.task import Task
from perdure.tree import as_tensors


class Wrapper:
    """A model and a method that protects what it has learned.

    The model's parameters become views of one vector and stay the caller's: other loops may train them, evaluate them
    and save them. Training outside the wrapper is noticed at the next boundary between tasks.

    Attributes
    ----------
    model
        The caller's model.
    method
        The method of `perdure.methods` that does the work.
    learner
        The learner that takes the steps.
    """

    def __init__(self, model: nn.Module, method: Method, device: str | torch.device | None) -> None:
        self.model = model
        self.method = method
        # The first train_step brings the optimizer; until then one that moves nothing stands for it. Inputs and memory
        # format stay as the caller has them, for it is he who evaluates the model.
        self.learner = _Learner(model, partial(torch.optim.SGD, lr=0.0), [method], device=device, channels_last=False)
        self.learner.followers.append(self._resize)
        self.learner.forward.prepare = _as_they_are
        self._boundaries = Boundaries(self._moved, self._finalise, self._begin)
        self._snapshot = self.learner.parameters.theta.clone()
        self._index: dict[TaskId, int] = {}
        self._warned = False

    def train_step(self, optimizer: Optimizer, loss_fn: RowLoss, inputs: Any, targets: Any, task_id: TaskId) -> Tensor:
        """Perform one training step on a batch of a task; a new `task_id` ends the task before it.

        Gradients are set to None first. The model stays in the mode (training or evaluation) that it is in.

        Parameters
        ----------
        optimizer
            Over all trainable parameters of the model; it may be another one at any time.
        loss_fn
            `(outputs, targets)` -> the mean loss, or one loss a row.
        inputs, targets
            A batch, `inputs` as the model takes them.
        task_id
            A number, a name, anything hashable.

        Returns
        -------
        The loss before the step with everything that the method adds to it, a detached scalar.

        Raises
        ------
        UsageError
            If the optimizer is not one of torch's kind, or `task_id` is None.
        ModelError
            If the optimizer leaves a trainable parameter out.
        """
        check_id(task_id)
        if not isinstance(optimizer, Optimizer):
            raise UsageError(f"optimizer is {optimizer!r}; pass a torch optimizer over model.parameters()")
        self._follow(at_boundary=False)
        self._settle()
        if not self._boundaries.enter(task_id):
            self._warn_of_stray_training(task_id)
        if self.learner.task is None:
            self.learner.begin_task(self._task(task_id))
        if self.learner.optimizers.all != [optimizer]:
            self.learner.use_optimizer(optimizer)
            self._optimizer_changed()
        self.learner.criterion.function = loss_fn
        added = self._added_loss()
        # What is remembered is said by add_to_memory, never by a step.
        loss = self.learner.step(as_tensors(inputs), as_tensors(targets), first_pass=False)
        self._boundaries.steps += 1
        return loss if added is None else loss + added

    def memory_bytes(self) -> int:
        """Bytes of everything that is kept beside the model and its optimizer."""
        return self.method.memory_bytes() + sum(vector.nbytes for vector in self._vectors())

    # -- for whoever finds boundaries -----------------------------------------------------------------------------

    def _finish_step(self) -> None:
        """Take in a step that the caller has taken himself, and parameters that were replaced."""
        self._follow()
        self._settle()

    def _change_task(self, old: TaskId, data: Any, new: TaskId) -> None:
        """End a task with the weights as they are, and with `data`, if it has none of its own, and begin the next."""
        self._boundaries.register(old)
        self._boundaries.register(new)

    # -- what a method of its own kind does otherwise -------------------------------------------------------------

    def _added_loss(self) -> Tensor | None:
        """What the method adds to the loss without showing it to the backward pass, a detached scalar."""
        return None

    def _settle(self) -> None:
        """Finish what waits for the step that the caller has taken since."""

    def _optimizer_changed(self) -> None:
        """Another optimizer takes the steps from here on."""

    def _begin(self, task_id: TaskId) -> None:
        """A task is open now."""
        self._index.setdefault(task_id, len(self._index))

    def _consolidate(self, task_id: TaskId) -> None:
        """End the learner's open task, whose weights are final."""
        self.learner.end_task()

    def _resize(self, remap: Remap) -> None:
        """Follow a parameter vector that changed shape."""
        self._snapshot = remap(self._snapshot, self.learner.parameters.theta)

    def _vectors(self) -> list[Tensor]:
        """Tensors that are kept besides those of the method."""
        return [self._snapshot]

    # -- boundaries -----------------------------------------------------------------------------------------------

    def _register(self, task_id: TaskId) -> None:
        check_id(task_id)
        self._follow()
        self._settle()
        self._boundaries.register(task_id)

    def _finalise(self, task_id: TaskId) -> None:
        self._index.setdefault(task_id, len(self._index))
        try:
            if self.learner.task is None:
                self.learner.begin_task(self._task(task_id))
            self._consolidate(task_id)
        finally:
            # Also after an error: whatever comes next must not find the task half open.
            self.learner.task = None
        self._snapshot = self.learner.parameters.theta.clone()

    def _moved(self) -> bool:
        """Whether any weight differs from the last boundary's, bit for bit."""
        theta = self.learner.parameters.theta
        return not torch.equal(theta.view(torch.uint8), self._snapshot.view(torch.uint8))

    def _task(self, task_id: TaskId) -> Task:
        nothing: Any = ()
        return Task(self._index[task_id], str(task_id), nothing, None, ())

    def _warn_of_stray_training(self, task_id: TaskId) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the model was trained outside this wrapper before the first step of task {task_id!r}, and nothing of "
                "that is protected; call register_task with that training's id before or after it",
                PerdureWarning,
                stacklevel=3,
            )

    def _follow(self, at_boundary: bool = True) -> None:
        """Notice parameters that were replaced, moved or bound elsewhere; gradients that are there survive it."""
        parameters = self.learner.parameters
        if not (parameters.changed() if at_boundary else not parameters.intact()):
            return
        gradients = [(p, p.grad) for p in self.model.parameters()]
        self.learner.follow_model()
        for parameter, gradient in gradients:
            parameter.grad = gradient

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on besides the model, the optimizer and the loaders."""
        return {
            "layout": self.learner.parameters.layout.to_json(),
            "method": self.method.state_dict(),
            "boundaries": self._boundaries.state_dict(),
            "snapshot": self._snapshot,
            "index": [[task_id, index] for task_id, index in self._index.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, in a wrapper with the same arguments around the model as it was saved.

        Loaders are not part of it: register the open task again with its own.
        """
        self._follow()
        parameters = self.learner.parameters
        self.method.load_state_dict(state["method"])
        self._boundaries.load_state_dict(state["boundaries"])
        self._snapshot = state["snapshot"].to(parameters.theta.device, copy=True)
        self._index = dict(state["index"])
        self._load(state)
        saved = Layout.from_json(state["layout"])
        if saved != parameters.layout:
            self.learner.resize(Remap(saved, parameters.layout))
        self.learner.task = None  # the next step begins the open task again

    def _load(self, state: dict[str, Any]) -> None:
        """Take over what a wrapper of its own kind has added to the state."""


class _Learner(Learner):
    """A learner that takes other people's vectors along when the parameters change shape."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.followers: list[Callable[[Remap], None]] = []
        super().__init__(*arguments, **options)

    def resize(self, remap: Remap) -> None:
        super().resize(remap)
        for follow in self.followers:
            follow(remap)


def _as_they_are(x: Any) -> Any:
    return x


def check_id(task_id: TaskId) -> None:
    if task_id is None or not isinstance(task_id, Hashable):
        raise UsageError(f"task_id is {task_id!r}; give a number, a name or anything hashable")
