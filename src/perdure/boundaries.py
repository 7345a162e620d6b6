"""Tasks that nobody announces: a detector watches the training, and its alarms end one task and begin the next.

An alarm comes late, and the weights have then been trained on the new task already. So a few lagged snapshots of them
are kept, and a sample of the task's rows with the step of each; what is consolidated at the alarm is the newest weights
and the rows from before the change, as the detector estimates it. Training goes on as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perdure.batch import Batch
from perdure.data.examples import Examples
from perdure.detection import Boundary, Detector
from perdure.errors import DivergedError, UsageError
from perdure.memory import Buffer
from perdure.registry import detectors
from perdure.seeding import derive
from perdure.streams.task import Task

if TYPE_CHECKING:
    from perdure.learner import Learner
    from perdure.methods.base import Method
    from perdure.parameters import Remap

Signal = Callable[[Tensor, Batch], Tensor]
"""From the outputs [rows, columns] of the current rows, before the update, and their batch: a scalar."""

SIGNALS = ("loss", "accuracy")


@dataclass
class Snapshot:
    """The model before a step, and the vectors that methods add up within a task."""

    step: int
    theta: Tensor
    buffers: dict[str, Tensor]
    sums: dict[str, Tensor]


@dataclass
class Boundaries:
    """How a learner finds its tasks itself.

    Parameters
    ----------
    detector
        A detector, or its name; what it is given is measured before each update.
    signal
        "loss" or "accuracy" of the current rows, or a function of outputs and batch; default: what suits the detector.
    snapshot_every, snapshots
        Steps between two snapshots of the weights, and how many are kept. Together they should cover the detector's
        delay, else the oldest is taken. Memory: `snapshots` times P.
    samples
        Rows of the open task, a uniform sample, that are kept for methods that read a task's data when it ends (EWC);
        none if there is no such method.

    Attributes
    ----------
    found
        Every boundary so far, by the learner's steps.

    >>> import perdure
    >>> boundaries = Boundaries("page_hinkley", snapshots=3)
    >>> learner = perdure.Learner(torch.nn.Linear(2, 2), methods=[perdure.methods.L2()], boundaries=boundaries)
    >>> _ = learner.step(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))
    >>> learner.task.name, boundaries.found
    ('detected 0', [])
    """

    detector: Detector | str
    signal: str | Signal | None = None
    snapshot_every: int = 10
    snapshots: int = 5
    samples: int = 1000
    found: list[Boundary] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.detector, str):
            self.detector = detectors.get(self.detector)()
        if not isinstance(self.detector, Detector):
            raise UsageError(
                f"boundaries is {self.detector!r}, it must be a detector such as perdure.detection.PageHinkley() or a "
                "name of 'perdure list detectors'"
            )
        self.watch: Detector = self.detector
        if self.signal is not None and not callable(self.signal) and self.signal not in SIGNALS:
            raise UsageError(f"signal is {self.signal!r}, it must be {' or '.join(SIGNALS)}, or a function")
        for name in ("snapshot_every", "snapshots", "samples"):
            if getattr(self, name) < 1:
                raise UsageError(f"boundaries: {name} is {getattr(self, name)}, it must be at least 1")

    # -- life -----------------------------------------------------------------------------------------------------

    def setup(self, learner: Learner) -> None:
        """Start afresh for this learner."""
        self.learner = learner
        self.watch.reset()
        self.found, self.ring = [], list[Snapshot]()
        self.acting = False
        self.rows = self._new_rows()

    def _new_rows(self) -> Buffer | None:
        if not any(method.needs_task_data and method.acts for method in self.learner.methods):
            return None
        return Buffer(self.samples, seed=(derive(self.learner.seed, "boundaries", self.learner.tasks_begun),))

    def open(self) -> None:
        """Begin the first task, or the next one after somebody has ended a task by hand."""
        self._begin()
        self.ring = [self._snapshot()]

    def after_step(self, batch: Batch, outputs: Tensor | None, loss: Tensor) -> None:
        """Watch a finished step; if there is an alarm, end the task where it ended and begin the next."""
        value, *columns = self._read(batch, outputs, loss)
        step = self.watch.steps
        if not math.isfinite(value):
            raise DivergedError(
                f"training diverged: the {self._named} of step {step} is {value}; look for NaN in the inputs, lower "
                "the learning rate or a method's strength, or use a penalty's solver='prox'"
            )
        self._open_classes(columns)
        if self.rows is not None and batch.first_pass:
            self.rows.add({"x": batch.now.stored, "y": batch.now.y, "step": step})
        boundary = self.watch.observe(value)
        if boundary is not None:
            self._change_task(boundary)
        elif (step + 1) % self.snapshot_every == 0:
            self.ring = [*self.ring, self._snapshot()][-self.snapshots :]

    # -- the signal -----------------------------------------------------------------------------------------------

    @property
    def _named(self) -> str:
        return self.signal if isinstance(self.signal, str) else "signal" if self.signal else self.watch.signal

    @torch.no_grad()
    def _read(self, batch: Batch, outputs: Tensor | None, loss: Tensor) -> list[float]:
        """The signal, and for each class column whether it is among the targets: all the step asks of the device."""
        value, y = self._measure(batch, outputs, loss).double().reshape(1), batch.now.y
        if outputs is None or not isinstance(y, Tensor) or y.dtype != torch.int64 or y.dim() > 1 or outputs.dim() > 2:
            return list(value.tolist())
        present = value.new_zeros(outputs.shape[-1]).index_fill_(0, y, 1.0)
        return list(torch.cat([value, present]).tolist())

    def _open_classes(self, columns: list[float]) -> None:
        """A class begins with its first label, as it does with its task where tasks are announced."""
        learner = self.learner
        assert learner.task is not None
        known = learner.classes.by_task.get(learner.task.index, ())
        classes = sorted({*known, *(column for column, present in enumerate(columns) if present)})
        if len(classes) > len(known):
            learner.classes.open(learner.task.index, classes)

    @torch.no_grad()
    def _measure(self, batch: Batch, outputs: Tensor | None, loss: Tensor) -> Tensor:
        if outputs is None:
            if self._named != "loss":
                raise UsageError(f"signal {self._named} needs the outputs, and a method replaced the step; use 'loss'")
            return loss
        learner = self.learner
        current = batch.part("current", outputs)
        if callable(self.signal):
            value: Tensor = self.signal(current, batch)
            return value
        if self._named == "accuracy":
            right: Tensor = current.argmax(-1) == batch.now.y
            return right.double().mean()
        alone = len(batch.sources) == 1 and batch.now.share is None and batch.now.allowed is None
        if alone and not learner.hooks["loss"] and not learner.hooks["criterion"]:
            return loss
        own = Batch.current(batch.now.x, batch.now.y, batch.task)
        return learner.criterion(current, own, learner.allowed)

    # -- the boundary ---------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        learner = self.learner
        empty = Examples(torch.empty(0, 1), torch.empty(0, dtype=torch.int64))
        self.acting = True
        try:
            learner.begin_task(Task(learner.tasks_begun, f"detected {learner.tasks_begun}", empty, None, ()))
        finally:
            self.acting = False
        self.rows = self._new_rows()

    def _change_task(self, boundary: Boundary) -> None:
        learner = self.learner
        self.found.append(boundary)
        learner.follow_model()  # before the weights are exchanged: a new layer is noticed at a boundary
        assert learner.task is not None
        with self._as_it_was(boundary.change_point):
            learner.task = self.with_rows(learner.task, boundary.change_point)
            learner.end_task()
            self._begin()
        self.ring = [self._snapshot()]

    def with_rows(self, task: Task, change_point: int | None = None) -> Task:
        """The task with the sampled rows from before the change as its data; with all if there is none."""
        rows = self.rows
        if rows is None or not len(rows) or (task.train is not None and len(task.train)):
            return task
        if change_point is None:
            change_point = self.watch.steps
        before = (rows.view("step") < change_point).nonzero().flatten()
        kept = rows.take(before if len(before) else torch.arange(len(rows)))
        return Task(task.index, task.name, Examples(kept["x"], kept["y"]), None, task.classes)

    @contextmanager
    def _as_it_was(self, change_point: int) -> Iterator[None]:
        """The model with the newest weights from before the change (else the oldest), and afterwards as it is now.

        A method that changes weights at a boundary keeps its change: then training goes on from there.
        """
        learner = self.learner
        if change_point > self.watch.steps - 1:  # the detector says that nothing has changed yet
            yield
            return
        clean = [snapshot for snapshot in self.ring if snapshot.step <= change_point]
        lagged = clean[-1] if clean else self.ring[0]
        theta, now = learner.parameters.theta, self._snapshot()
        self._put(lagged)
        yield
        changed = learner.parameters.theta is not theta or not torch.equal(theta, lagged.theta)
        with torch.no_grad():
            if not changed:
                self._put(Snapshot(now.step, now.theta, now.buffers, {}))
            for key, method, name in self._summing():
                getattr(method, name).add_(now.sums[key] - lagged.sums[key])

    def _snapshot(self) -> Snapshot:
        learner = self.learner
        buffers = {name: tensor.clone() for name, tensor in learner.parameters.module.named_buffers()}
        sums = {key: getattr(method, name).clone() for key, method, name in self._summing()}
        return Snapshot(self.watch.steps, learner.parameters.theta.clone(), buffers, sums)

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

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values; a signal that is a function is named."""
        return {
            "detector": {"name": self.watch.name, **self.watch.arguments()},
            "signal": getattr(self.signal, "__qualname__", self.signal),
            "snapshot_every": self.snapshot_every,
            "snapshots": self.snapshots,
            "samples": self.samples,
        }

    def state_dict(self) -> dict[str, Any]:
        """Detector, snapshots, sampled rows and the boundaries so far."""
        return {
            "detector": self.watch.state_dict(),
            "ring": [vars(snapshot) for snapshot in self.ring],
            "rows": None if self.rows is None else self.rows.state_dict(),
            "found": [vars(boundary) for boundary in self.found],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, for a learner with the same weights' layout and tasks begun."""
        device = self.learner.parameters.theta.device
        self.watch.load_state_dict(state["detector"])
        self.ring = [
            Snapshot(
                saved["step"],
                saved["theta"].to(device, copy=True),
                {name: tensor.to(device, copy=True) for name, tensor in saved["buffers"].items()},
                {name: tensor.to(device, copy=True) for name, tensor in saved["sums"].items()},
            )
            for saved in state["ring"]
        ]
        self.rows = self._new_rows()
        if self.rows is not None and state["rows"] is not None:
            self.rows.load_state_dict(state["rows"])
        self.found = [Boundary(**saved) for saved in state["found"]]


def as_boundaries(given: Boundaries | Detector | str | None) -> Boundaries | None:
    """What `Learner(boundaries=...)` was given, as one kind of object."""
    return given if given is None or isinstance(given, Boundaries) else Boundaries(given)


def boundaries_like(saved: dict[str, Any]) -> Boundaries:
    """Boundaries built again from their saved settings."""
    options = {key: value for key, value in saved.items() if key != "detector"}
    if options["signal"] not in (None, *SIGNALS):
        raise UsageError(
            f"the saved learner's signal was the function '{options['signal']}', which a folder cannot hold; pass "
            "boundaries= as it was"
        )
    arguments = dict(saved["detector"])
    return Boundaries(detectors.get(arguments.pop("name"))(**arguments), **options)
