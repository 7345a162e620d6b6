"""What a method is: a class with the hooks it needs, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.seeding import generator

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner
    from perdure.parameters import ParameterVector, Remap
    from perdure.streams.task import Task

HOOKS = (
    "begin_task",
    "training_data",
    "activate",
    "on_batch",
    "criterion",
    "loss",
    "observe_gradient",
    "add_gradient",
    "project_gradient",
    "on_update",
    "observe_update",
    "after_step",
    "end_task",
    "predict",
    "step",
)

# Ranks inside `on_update`, in the order in which they run.
PROX, PROJECT, MASK, RESTORE = range(0, 40, 10)


class Method:
    """A way to keep what was learned: override the hooks that you need.

    Hooks run in the order of `HOOKS`; inside a hook, methods run by the rank that their class declares for it in
    `ranks` (default 50), then by name, so the order of `methods=[...]` never matters. A hook that is not overridden
    costs nothing. Whatever a method keeps as attributes after `setup` is its state and is saved by looking: tensors,
    generators, buffers, plain values, and lists and dictionaries of those.

    Class attributes
    ----------------
    needs_boundaries
        Works only if somebody says where tasks end.
    needs_train_task_id, needs_test_task_id
        Needs to be told the task of a row in training, or in prediction.
    needs_task_data
        Reads the task's data when the task begins or ends.
    scenarios
        Where it is defined: a subset of task, domain, class, online, blurry.
    needs_update
        Wants the parameters from before the step in `on_update` or `observe_update`.
    stores_examples
        Keeps raw examples (some engineers may not).
    regulariser
        Protects weights or outputs without remembered examples; alone it fails on class-incremental streams.
    owns
        What nobody else may own beside it: "predict", "criterion", "training_data", "step".
    attachable
        Whether it works inside a loop that somebody else owns.
    adds_parameters
        Puts parameters of its own into the model, which a checkpoint that somebody else writes cannot restore.
    distils_current
        Its `loss` reads the outputs of the current rows.
    aligned
        Attributes that are vectors [P] like `theta`, zero in the gaps between parameters, each with the fill of new
        entries: a number or "theta".
    task_sums
        Those of `aligned` that add up, step by step, within a task and are zero when it has ended. Where a boundary is
        found late, the old task gets the sum as it was and the next one the rest.
    transient
        Attributes that are caches and are not saved.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    ranks: ClassVar[dict[str, int]] = {}
    needs_boundaries: ClassVar[bool] = False
    needs_train_task_id: ClassVar[bool] = False
    needs_test_task_id: ClassVar[bool] = False
    needs_task_data: ClassVar[bool] = False
    scenarios: ClassVar[frozenset[str]] = frozenset({"task", "domain", "class", "online", "blurry"})
    needs_update: ClassVar[bool] = False
    stores_examples: ClassVar[bool] = False
    regulariser: ClassVar[bool] = False
    owns: ClassVar[tuple[str, ...]] = ()
    attachable: ClassVar[bool] = True
    adds_parameters: ClassVar[bool] = False
    distils_current: ClassVar[bool] = False
    aligned: ClassVar[dict[str, float | str]] = {}
    task_sums: ClassVar[tuple[str, ...]] = ()
    transient: ClassVar[tuple[str, ...]] = ()

    fit_seconds: float = 0.0
    """Time spent on training inside `predict`, by a method that trains only when it is asked."""

    learner: Learner
    parameters: ParameterVector
    generator: torch.Generator
    _given: frozenset[str]

    # -- life ---------------------------------------------------------------------------------------------------

    def setup(self, learner: Learner) -> None:
        """Allocate state for this model. Called once by the learner; a second learner starts afresh."""
        if "_given" not in vars(self):
            self._given = frozenset(vars(self))
        for name in set(self._state_names()) - self._given:
            delattr(self, name)
        self.learner = learner
        self.parameters = learner.parameters
        self.generator = generator(learner.seed, "method", self.name)

    def resize(self, remap: Remap) -> None:
        """Follow a parameter vector that changed shape; moves what `aligned` declares."""
        for attribute, fill in self.aligned.items():
            vector = getattr(self, attribute, None)
            if vector is not None:
                new = remap(vector, self.parameters.theta if fill == "theta" else float(fill))
                setattr(self, attribute, new)

    def rebuild(self, state: dict[str, Any]) -> None:
        """Change the model's structure again as the saved `state` says, before its weights are loaded."""

    # -- hooks, in the order in which they run --------------------------------------------------------------------

    def begin_task(self, task: Task) -> None:
        """Snapshot a teacher, open a column, pick masks."""

    def training_data(self, task: Task) -> Task:
        """Extend the task's own data before its plan is drawn (one owner)."""
        return task

    def activate(self, task: int | None) -> None:
        """Before any forward pass for a task, training or not; None where the scenario hides the task."""

    def on_batch(self, batch: Batch) -> Batch:
        """Add remembered rows, shares, allowed classes."""
        return batch

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Replace the main loss (one owner). `outputs` [rows, columns]; returns a scalar."""
        raise UsageError(f"{self.name} does not own the criterion")

    def loss(self, batch: Batch, outputs: Tensor) -> Tensor | None:
        """An extra loss term (a scalar, a mean over rows made with `batch.mean`), or None."""
        return None

    def observe_gradient(self, grad: Tensor) -> None:
        """Read the raw gradient [P]; change nothing."""

    def start_gradient(self, grad: Tensor) -> bool:
        """Write into `grad` [P] what `add_gradient` would add, before the backward pass adds the rest; false: nothing.

        Not a hook of its own: the first `add_gradient` is asked in steps in which nobody has to see the vector without
        it. The sum of two numbers does not depend on their order, so the bits are the same.
        """
        return False

    @property
    def pulls(self) -> bool:
        """Whether `descend` may stand for `add_gradient` where the optimizer does nothing but `theta -= lr * grad`."""
        return False

    def descend(self) -> None:
        """Take what `add_gradient` would add as a step on `theta` [P]: less `lr` times that."""
        raise NotImplementedError

    def add_gradient(self, grad: Tensor) -> None:
        """Add an analytic penalty gradient or a late replay gradient to `grad` [P], in place."""

    def project_gradient(self, grad: Tensor) -> None:
        """Constrain or rescale the sum in `grad` [P], in place.

        Where `gathers` is false, change `p.grad` of the parameters instead: `grad` may be anything then.
        """

    def on_update(self, before: Tensor, theta: Tensor) -> None:
        """Act on the finished update, in place on `theta` [P]. `before` [P] is valid only if `needs_update`."""

    def observe_update(self, before: Tensor, theta: Tensor) -> None:
        """Read the movement that really happened, after every `on_update`; change nothing.

        But for the one method of rank 99, which comes last and may use `before` [P] as scratch memory.
        """

    def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
        """Store examples, update running statistics. `outputs` [rows, columns] are those before the update."""

    def end_task(self, task: Task) -> None:
        """Consolidate: Fisher, exemplars, pruning."""

    def predict(self, x: Any, task: int | None) -> Tensor:
        """Replace the prediction rule (one owner). Returns class columns, int64 [rows]."""
        raise UsageError(f"{self.name} does not own predict")

    def step(self, batch: Batch) -> Tensor:
        """Replace everything from `on_batch` to `on_update` (one owner). Returns the detached loss."""
        raise UsageError(f"{self.name} does not own the step")

    # -- what there is to see -------------------------------------------------------------------------------------

    def pictures(self) -> Tensor | None:
        """Images [n, channels, height, width] in [0, 1], one or three channels, that are worth a look when a task ends.

        Not a hook: asked when a task of a stream has ended, for the report. It must change nothing and draw from a
        generator made for the purpose. None if there is nothing to see.
        """
        return None

    # -- state ----------------------------------------------------------------------------------------------------

    def has(self, hook: str) -> bool:
        """Whether a hook (or `pictures`) does anything; one that does nothing is never called and costs nothing."""
        return getattr(type(self), hook) is not getattr(Method, hook)

    @property
    def reads_arrivals(self) -> bool:
        """Whether `observe_update` reads `parameters.arrivals`, the raw gradients tensor by tensor.

        That is cheaper than `observe_gradient`, whose vector has to be copied, since what follows changes it.
        """
        return False

    @property
    def gathers(self) -> bool:
        """Whether its gradient hooks need the vector; a `project_gradient` that works on each `p.grad` does not."""
        return True

    @property
    def acts(self) -> bool:
        """Whether any hook does anything: not if the method is switched off."""
        return any(self.has(hook) for hook in HOOKS)

    @property
    def sample_passes(self) -> int:
        """How often every row of a step passes through the model, as far as the arguments say."""
        return 1

    @classmethod
    def rank(cls, hook: str) -> tuple[int, str]:
        return cls.ranks.get(hook, 50), cls.name

    def arguments(self) -> dict[str, Any]:
        """The constructor arguments: a dataclass's fields."""
        if not dataclasses.is_dataclass(self):
            return {}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    def _state_names(self) -> list[str]:
        skipped = {"learner", "parameters", "_given", *self.transient, *self.arguments()}
        return sorted(name for name in vars(self) if name not in skipped)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the method holds besides its arguments and caches."""
        state = {}
        for name in self._state_names():
            value = getattr(self, name)
            if isinstance(value, nn.Module) or (
                not isinstance(value, torch.Generator) and hasattr(value, "state_dict")
            ):
                value = value.state_dict()
            state[name] = value
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, in a method that was set up for the same model."""
        for name in set(self._state_names()) - set(state) - self._given:
            delattr(self, name)
        for name, value in state.items():
            current = getattr(self, name, None)
            if isinstance(current, torch.Generator):
                current.set_state(value if isinstance(value, Tensor) else value.get_state())
            elif current is not None and hasattr(current, "load_state_dict"):
                current.load_state_dict(value)
            else:
                setattr(self, name, _placed(value, self.parameters.theta.device))

    def memory_bytes(self) -> int:
        """Bytes of state as it is held: vectors with the gaps between parameters, buffers, teachers."""
        return sum(_bytes(getattr(self, name)) for name in self._state_names())


def _placed(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _placed(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_placed(item, device) for item in value)
    return value


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if hasattr(value, "bytes") and callable(value.bytes):
        return int(value.bytes())
    if hasattr(value, "state_dict"):
        return _bytes(value.state_dict())
    if isinstance(value, dict):
        return sum(_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_bytes(item) for item in value)
    return 0


def check_value(method: str, argument: str, value: float, low: float = 0.0, high: float = float("inf")) -> None:
    """Raise UsageError unless `value` is a number with `low <= value <= high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{method}: {argument} is {value!r}, it must be a number")
    if not low <= value <= high:
        allowed = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise UsageError(f"{method}: {argument} is {value!r}, it must be {allowed}")


def check_count(method: str, argument: str, value: Any, low: int = 0) -> None:
    """Raise UsageError unless `value` is a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{method}: {argument} is {value!r}, it must be a whole number")
    check_value(method, argument, value, low)


def check_choice(method: str, argument: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise UsageError unless `value` is one of `choices`."""
    if value not in choices:
        raise UsageError(f"{method}: {argument} is {value!r}, it must be one of {', '.join(map(str, choices))}")
