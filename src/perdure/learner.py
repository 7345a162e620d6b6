"""The learner: the one training step of the library, and the few calls around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from perdure.augment import Augment, as_augment
from perdure.batch import Allowed, Batch, Source
from perdure.boundaries import Boundaries, as_boundaries
from perdure.classes import ClassTable
from perdure.compatibility import (
    check_found_tasks,
    check_methods,
    check_optimizers,
    check_scenario,
    check_task,
    check_task_parts,
)
from perdure.criterion import Criterion, RowLoss
from perdure.data.examples import as_examples
from perdure.data.joined import new_rows, own_examples
from perdure.detection import Detector
from perdure.errors import DivergedError, ModelError, UsageError
from perdure.flat import FlatStep
from perdure.forward import Forward, default_prepare, has_convolutions
from perdure.methods.base import HOOKS, Method
from perdure.methods.side_passes import eval_mode
from perdure.models.heads import open_columns
from perdure.optimizers import Factory, Optimizers
from perdure.parameters import ParameterVector, Remap
from perdure.prequential import Prequential
from perdure.seeding import generator
from perdure.streams.task import HIDDEN, Stream, Task
from perdure.tree import as_tensors, rows, take, to_device

DEFAULT_OPTIMIZER: Factory = partial(torch.optim.Adam, lr=1e-3)


class Learner:
    """A model, its optimizer and the methods that keep what it knows.

    Parameters
    ----------
    model
        Any module. Its trainable parameters become views of one vector, `learner.parameters.theta`.
    optimizer
        A factory called with (name, parameter) pairs, such as `partial(torch.optim.Adam, lr=1e-3)`, or an optimizer
        that already holds the model's parameters.
    methods
        `perdure.methods.EWC(strength=100)` and so on; their order never matters. None at all is plain fine-tuning.
    criterion
        `(outputs, targets)` -> one loss a row (reduction="none") or their mean; softmax cross-entropy if left out.
    scheduler
        A factory called with each optimizer; the schedule advances once after every update.
    scenario
        "task", "domain", "class", "online" or "blurry" in a loop of your own; `fit` takes it from the stream. In the
        last two a class may be predicted once a label of it has come, and `prequential` counts the right predictions.
    seed
        Of the methods' private generators. Nothing here draws from torch's global generator.
    device
        Where to train; the model's own device if left out.
    precision
        "float32", "bfloat16" or "float16" (autocast; gradients are unscaled before any method sees them).
    clip_norm, clip_value
        Gradient clipping after all methods have had their say.
    micro_batches
        Cut every batch into that many pieces, with one update: gradient accumulation.
    channels_last
        Memory format of images; by default on for models with convolutions.
    active_classes
        Columns in the training loss of class-incremental streams: "all" from the start, or those "seen" so far.
    augment
        Random changes of the inputs of every training step, of current and remembered rows alike: "flip", "crop" (by up
        to 4 pixels), "crop_flip", or a function `(x, generator) -> x` of stored rows. Memories store what came before
        it. Evaluation, importance and selection see no augmentation.
    boundaries
        A detector, such as `perdure.detection.PageHinkley()` or its name, that finds where tasks end: the learner then
        begins and ends them itself, and nobody announces any. See `perdure.boundaries.Boundaries`.

    Raises
    ------
    UsageError, IncompatibleError, ModelError
        For arguments, combinations and models that cannot work, before any training.

    >>> import perdure
    >>> stream = perdure.benchmarks.split_digits(seed=0)
    >>> learner = Learner(perdure.models.MLP(64, [32], 10, seed=0), methods=[perdure.methods.Replay(capacity=100)])
    >>> results = learner.fit(stream, epochs=1, batch_size=32)
    >>> results.matrix.shape
    (5, 5)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Factory | Optimizer = DEFAULT_OPTIMIZER,
        methods: Sequence[Method] = (),
        *,
        criterion: RowLoss | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
        scenario: str | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        precision: str = "float32",
        clip_norm: float | None = None,
        clip_value: float | None = None,
        micro_batches: int = 1,
        channels_last: bool | None = None,
        active_classes: str = "all",
        augment: Augment | str | None = None,
        boundaries: Boundaries | Detector | str | None = None,
    ) -> None:
        if micro_batches < 1:
            raise UsageError(f"micro_batches is {micro_batches}, it must be at least 1")
        if active_classes not in ("all", "seen"):
            raise UsageError(f"active_classes is '{active_classes}', it must be 'all' or 'seen'")
        if not isinstance(model, nn.Module):
            raise ModelError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
        check_methods(methods)
        if device is not None:
            model.to(device)
        if channels_last is None:
            channels_last = has_convolutions(model)
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        self.seed = seed
        self.clip_norm, self.clip_value, self.micro_batches = clip_norm, clip_value, micro_batches
        self.parameters = ParameterVector(model)
        self.device = self.parameters.theta.device
        self.optimizers = Optimizers(optimizer, list(self.parameters.members.items()))
        self.schedulers = [scheduler(each) for each in self.optimizers.all] if scheduler else []
        if any(isinstance(each, torch.optim.lr_scheduler.ReduceLROnPlateau) for each in self.schedulers):
            raise UsageError(
                "ReduceLROnPlateau waits for a score, and schedules here advance with updates; step it yourself"
            )
        self.flat = FlatStep(self.parameters, self.optimizers)
        self.scaler = torch.amp.GradScaler(self.device.type) if precision == "float16" else None
        self.forward = Forward(model, self.parameters.theta, precision, channels_last)
        self.criterion = Criterion(criterion)
        self.augment = as_augment(augment)
        self.augment_generator = generator(seed, "augment")
        self.classes = ClassTable(active_classes, self.device)
        self.scenario: str | None = None
        self.methods = sorted(methods, key=lambda method: method.name)
        self.boundaries = as_boundaries(boundaries)
        if self.boundaries is not None:
            check_found_tasks(self.methods)
        self.task: Task | None = None
        self.stream: Stream | None = None
        self.tasks_begun = 0
        self.restored = False
        self.progress = 0.0
        self.steps_per_pass: int | None = None
        self.passes = {"steps": 0, "forward_rows": 0, "backward_rows": 0}
        self.prequential: Prequential | None = None
        self._width_checked = False
        self.hooks: dict[str, list[Method]] = {
            hook: sorted((m for m in self.methods if m.has(hook)), key=methodcaller("rank", hook)) for hook in HOOKS
        }
        self.parameters.keeps_arrivals = any(method.reads_arrivals and method.acts for method in self.methods)
        gradient_hooks = ("observe_gradient", "add_gradient", "project_gradient")
        gathering = any(method.gathers for hook in gradient_hooks for method in self.hooks[hook])
        self._gathers = gathering or self.parameters.keeps_arrivals
        self._starter = self._find_starter()
        first = self.hooks["add_gradient"][:1] if self.parameters.keeps_arrivals else []
        self._late_start = first[0].start_gradient if first and not self.hooks["observe_gradient"] else None
        self._pulls = False
        self.own_hooks = 0
        check_optimizers(self.methods, self.optimizers.all)
        self._needs_before = any(method.needs_update for method in self.methods)
        if scenario is not None:
            self.set_scenario(scenario)
        for method in self.methods:
            method.setup(self)
        self._pulls = self._may_pull()
        # A method may have put layers of its own into the model.
        self.follow_model()
        self._find_activators()
        if self.boundaries is not None:
            self.boundaries.setup(self)

    # -- the step -------------------------------------------------------------------------------------------------

    def step(self, x: Any, y: Any, *, index: Tensor | None = None, first_pass: bool = True) -> Tensor:
        """One update on a batch of the current task.

        Parameters
        ----------
        x, y
            Inputs (a tensor [rows, ...] or a tree of tensors) and targets, in stored form: uint8 images are scaled
            later.
        index
            int64 [rows]: which rows of the task's data (`learner.task.train`) these are, where that is known. It tells
            a method's exemplars among them from new rows.
        first_pass
            Whether the rows are new; a buffer stores them then and only then.

        Returns
        -------
        The detached loss, a scalar on the device.
        """
        if self.task is None:
            self._start_without_task()
        counts = self.prequential if first_pass else None
        if counts is not None:
            counts.ask(self.scenario, self.task_index)
        if self.scenario in HIDDEN:
            self._see(y)
        if not self.parameters.intact():
            self.follow_model()
        batch = Batch.current(self._on_device(x), self._on_device(y), self.task_index, index, first_pass)
        new = None if self.task is None else new_rows(self.task.train, index)
        if new is not None:
            batch = batch.with_sources(replace(batch.now, new=new))
        if self.augment is not None:
            now = replace(batch.now, x=self.augmented(batch.now.x), raw=batch.now.x)
            batch = Batch((now,), batch.task, index, first_pass, augment=self.augmented)
        if self.hooks["step"]:
            loss, outputs = self.hooks["step"][0].step(batch), None
        else:
            for method in self.hooks["on_batch"]:
                batch = method.on_batch(batch)
            self.parameters.release()
            self.optimizers.release()
            starter = None if self._descends() else self._starter
            started = starter is not None and self.parameters.expect(starter.start_gradient)
            loss, outputs = self.backward(batch)
            before = self.apply_gradient(started)
            if before is not None:
                self.finish_update(before)
        self.passes["steps"] += 1
        if counts is not None:
            # Outputs that do not predict are nobody's predictions.
            counts.count(batch, None if self.hooks["predict"] else outputs)
        for method in self.hooks["after_step"]:
            method.after_step(batch, outputs)
        if self.boundaries is not None:
            self.boundaries.after_step(batch, outputs, loss)
        return loss

    def augmented(self, x: Any) -> Any:
        """Stored rows, changed at random if this run augments its inputs."""
        return x if self.augment is None else self.augment(x, self.augment_generator)

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Accumulate gradients in every `p.grad`; returns the detached loss and outputs of the whole batch."""
        losses, outputs = [], []
        for piece in batch.pieces(self.micro_batches):
            out = self.forward.batch(piece, self.shown_task)
            if not self._width_checked:
                self._check_width(out)
            owner = self.hooks["criterion"]
            loss = owner[0].criterion(out, piece) if owner else self.criterion(out, piece, self.allowed)
            for method in self.hooks["loss"]:
                term = method.loss(piece, out)
                if term is not None:
                    loss = loss + term
            torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))
            losses.append(loss.detach())
            outputs.append(out.detach())
        size = batch.size
        self.passes["forward_rows"] += size
        self.passes["backward_rows"] += size
        if len(losses) == 1:
            return losses[0], outputs[0]
        return torch.stack(losses).sum(), batch.in_order(outputs, self.micro_batches)

    def apply_gradient(self, started: bool = False, move: Callable[[], None] | None = None) -> Tensor | None:
        """From the finished backward pass to the moved weights: gradient hooks, clipping, optimizer.

        `move` moves them in the optimizer's place. Returns the weights before that [P], which `finish_update` wants, or
        None if float16 overflowed and nothing has moved.
        """
        if self.scaler is not None and not self._unscale():
            return None
        before = self.transform_gradient(started)
        if move is not None:
            move()
        elif not self.flat.step():
            self.optimizers.step()
        return before

    def transform_gradient(self, started: bool = False) -> Tensor:
        """Let the methods read and change the gradient, and clip it; returns the weights before the step [P].

        `started` says that the first `add_gradient` is in the gradient already.
        """
        if not started and self._descends():
            return self._descend()
        grad = self.parameters.grad
        if self._gathers or self.flat.worth_gathering:
            grad = self.parameters.arrived() if started else self.parameters.gather(self._late_start)
            for method in self.hooks["observe_gradient"]:
                method.observe_gradient(grad)
            for method in self.hooks["add_gradient"][self.parameters.begun :]:
                method.add_gradient(grad)
        for method in self.hooks["project_gradient"]:
            method.project_gradient(grad)
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(self.parameters.members.values(), self.clip_value)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.members.values(), self.clip_norm)
        return self.parameters.snapshot() if self._needs_before else self.parameters.theta

    def _descends(self) -> bool:
        """Whether penalties may take their part of a plain descent on the weights, and the gradient stay the loss's."""
        return self._pulls and self.optimizers.descends(self.own_hooks)

    def _descend(self) -> Tensor:
        for method in self.hooks["observe_gradient"]:
            method.observe_gradient(self.parameters.gather())
        if self.parameters.keeps_arrivals:
            self.parameters.arrivals = [p.grad for p in self.parameters.members.values()]
        before = self.parameters.snapshot() if self._needs_before else self.parameters.theta
        for method in self.hooks["add_gradient"]:
            method.descend()
        return before

    def finish_update(self, before: Tensor) -> None:
        """Let the methods act on the update and read it; `before` [P] is what `transform_gradient` returned."""
        theta = self.parameters.theta
        for method in self.hooks["on_update"]:
            method.on_update(before, theta)
        for method in self.hooks["observe_update"]:
            method.observe_update(before, theta)
        for schedule in self.schedulers:
            schedule.step()

    def _unscale(self) -> bool:
        """Divide the gradients by the loss scale; false if one of them overflowed, and then nothing may use them."""
        assert self.scaler is not None
        gradients = [p.grad for p in self.parameters.members.values() if p.grad is not None]
        for optimizer in self.optimizers.all:
            self.scaler.unscale_(optimizer)
        self.scaler.update()
        return bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all())

    # -- tasks in a loop of your own ------------------------------------------------------------------------------

    def begin_task(self, task: Task | str | int, data: Any = None, classes: Sequence[int] = ()) -> None:
        """Announce a task.

        Parameters
        ----------
        task
            A task of a stream, or any name.
        data
            The task's examples (arrays, a data set, a DataLoader); only methods with `needs_task_data` ask for it.
            A learner that was loaded in the middle of a task gets that task's data by beginning it again.
        classes
            The class columns of the task, where the scenario or a growing head needs them.
        """
        if self.boundaries is not None and not self.boundaries.acting:
            raise UsageError(
                f"task '{getattr(task, 'name', task)}' is announced to a learner that finds its tasks itself; call "
                "step() alone, or build it without boundaries"
            )
        if isinstance(data, (tuple, Dataset, str, Path)):
            data = as_examples(data)
        if self.task is not None and self.restored and self.task.name in (task, getattr(task, "name", None)):
            # Loaded in the middle of this task: all that a checkpoint does not hold is the data.
            self.task = self._extended(replace(self.task, train=task.train if isinstance(task, Task) else data))
            self.restored = False
            return
        if self.task is not None:
            raise UsageError(f"task '{self.task.name}' is still open; call end_task() before the next begins")
        if not isinstance(task, Task):
            task = Task(self.tasks_begun, str(task), data, None, tuple(classes))
        check_task(self.methods, task, self.scenario)
        self.classes.open(task.index, task.classes)
        if task.classes:
            open_columns(self.parameters.module, task.index, task.classes)
        self.follow_model()
        self.task = task = self._extended(task)
        self.tasks_begun += 1
        self.progress, self.steps_per_pass, self._width_checked = 0.0, None, False
        for method in self.hooks["begin_task"]:
            method.begin_task(task)
        self.follow_model()

    def _extended(self, task: Task) -> Task:
        for method in self.hooks["training_data"]:
            task = method.training_data(task)
        return task

    def end_task(self) -> None:
        """Let every method consolidate the open task."""
        if self.task is None:
            raise UsageError("no task is open; call begin_task() first")
        if self.boundaries is not None:
            self.task = self.boundaries.with_rows(self.task)
        self.parameters.release()
        self.follow_model()
        if not bool(self.parameters.theta.isfinite().all()):
            raise DivergedError(
                f"training diverged: weights are not finite at the end of task '{self.task.name}'; look for NaN in the "
                "inputs, lower the learning rate or a method's strength, or use a penalty's solver='prox'"
            )
        for method in self.hooks["end_task"]:
            method.end_task(self.task)
        self.follow_model()
        self.task = None

    @property
    def task_index(self) -> int | None:
        """Index of the open task."""
        return None if self.task is None else self.task.index

    @property
    def shown_task(self) -> int | None:
        """The open task as far as the scenario shows it to the forward pass."""
        return self.task_index if self.scenario in ("task", None) else None

    def allowed(self, source: Source, width: int) -> Allowed:
        """Class columns, of `width` in all, that the criterion may use for a source's rows."""
        if source.allowed is not None:
            return source.allowed
        return self.classes.allowed(source.tasks, self.task_index, self.scenario, width)

    def loss_columns(self) -> slice | Tensor | None:
        """The class columns in the current task's loss: a slice, an index tensor, or None for all."""
        if self.scenario == "task" and self.task_index is not None:
            return self.classes.index(self.classes.by_task.get(self.task_index, ()))
        return self.classes.index(self.classes.seen) if self.classes.active == "seen" else None

    def task_batches(self, task: Task, batch_size: int = 256) -> Iterator[tuple[Any, Tensor]]:
        """The task's own data in order as (prepared inputs, targets) on the device: for importance passes."""
        data = own_examples(task.train)
        pairs = data.ordered(batch_size) if hasattr(data, "ordered") else data
        for pair in pairs:
            x, y = pair[0], pair[1]
            yield self.forward.inputs(x), self._on_device(y)

    def use_optimizer(self, optimizer: Factory | Optimizer) -> None:
        """Make the updates with another optimizer from here on; schedules stay those of the one before."""
        if self.optimizers.all == [optimizer]:
            return
        made = Optimizers(optimizer, list(self.parameters.members.items()))
        self.flat.leave()
        self.optimizers, self.flat = made, FlatStep(self.parameters, made)
        check_optimizers(self.methods, made.all)

    # -- the short ways -------------------------------------------------------------------------------------------

    def fit(self, stream: Stream, **options: Any) -> Any:
        """Train on every task of a stream in turn and evaluate after each.

        Options, in full at `perdure.fitting.fit`: epochs=1, batch_size=32, steps=None (updates a task instead of
        epochs), drop_last=False, evaluate_every=None, eval_future=True, reset_optimizer=False, folder=None,
        checkpoint_every=None, resume=False, on_event=None, announce=True, prequential=None.
        """
        from perdure.fitting import fit

        return fit(self, stream, **options)

    def fit_task(self, task: Task | str, data: Any = None, *, classes: Sequence[int] = (), **options: Any) -> Learner:
        """Train on one task: a task of a stream, or a name and its examples.

        Options, in full at `perdure.fitting.fit_task`: epochs=1, batch_size=32, steps=None, drop_last=False.
        """
        from perdure.fitting import fit_task

        fit_task(self, task, data, classes=classes, **options)
        return self

    def partial_fit(self, x: Any, y: Any) -> Learner:
        """One step on arrays or tensors; needs no task unless a method needs boundaries."""
        self.step(as_tensors(x), as_tensors(y))
        return self

    @torch.no_grad()
    def outputs(self, x: Any, task: int | None = None, batch_size: int | None = None) -> Tensor:
        """Raw outputs [rows, columns] in evaluation mode, for stored rows `x`."""
        x = as_tensors(x)
        with eval_mode(self.model):
            if batch_size is None:
                few = rows(x) <= 32
                batch_size = 32 if few else self.forward.batch_size(take(x, slice(0, 2)), task)
            chunks = [
                self.forward(take(x, slice(i, i + batch_size)), task) for i in range(0, max(1, rows(x)), batch_size)
            ]
        return torch.cat(chunks)

    @torch.no_grad()
    def predict(self, x: Any, task: int | None = None) -> Tensor:
        """Class columns, int64 [rows]: over the classes seen so far, or over those of `task` if it is given."""
        if self.hooks["predict"]:
            return self.hooks["predict"][0].predict(as_tensors(x), task)
        return self.classes.argmax(self.outputs(x, task), task)

    def evaluate(self, stream: Stream) -> Any:
        """Accuracies on the test set of every task of a stream: see `perdure.evaluation.Evaluation`."""
        from perdure.evaluation import evaluate

        before = self.stream, self.forward.prepare, self.scenario, self.prequential
        self.adopt(stream)
        try:
            return evaluate(self, stream)
        finally:
            if self.task is not None or before[0] is not None:  # training goes on as it was
                self.stream, self.forward.prepare, self.scenario, self.prequential = before

    def save(self, folder: str | Path) -> None:
        """Write model, optimizer, methods and generators into `folder`, atomically, without pickle."""
        from perdure.saving import save_learner

        save_learner(self, folder)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module, **options: Any) -> Learner:
        """A learner as it was saved, around a freshly built `model`. Options are those of `Learner`."""
        from perdure.saving import load_learner

        return load_learner(cls, folder, model, **options)

    # -- scenario and structure -----------------------------------------------------------------------------------

    def adopt(self, stream: Stream) -> None:
        """Take scenario and input preparation from a stream."""
        self.stream = stream
        self.forward.prepare = getattr(stream, "prepare", None) or default_prepare
        self.set_scenario(stream.scenario)

    def set_scenario(self, scenario: str) -> None:
        """Check the methods against a scenario, once."""
        if scenario != self.scenario:
            check_scenario(self.methods, scenario, self.boundaries is not None)
            if scenario in HIDDEN:
                self._find_activators()
                check_task_parts(self.forward.heads, scenario)
            self.scenario = scenario
            self.prequential = Prequential(self.classes) if scenario in HIDDEN else None

    def _see(self, y: Any) -> None:
        """Where nobody announces tasks, a class begins with its first label: a head that grows does so then."""
        new = self.classes.see(y, wait=self._grows)
        if new and self._grows:
            open_columns(self.parameters.module, self.tasks_begun, tuple(new))
            self.follow_model()

    def _find_starter(self) -> Method | None:
        """The first `add_gradient`, if the gradient may start as what it adds: one backward pass, seen by nobody."""
        seen = self.hooks["observe_gradient"] or self.parameters.keeps_arrivals
        alone = not seen and self.scaler is None and self.micro_batches == 1
        wrapped = self.parameters.module is not self.model and not hasattr(self.model, "_orig_mod")
        return self.hooks["add_gradient"][0] if alone and not wrapped and self.hooks["add_gradient"] else None

    def _may_pull(self) -> bool:
        """Whether all that is added to the gradient are penalties, and nobody limits or reads their sum."""
        adders = self.hooks["add_gradient"]
        limited = self.clip_norm is not None or self.clip_value is not None
        owned = self.hooks["step"] or self.hooks["project_gradient"]
        return bool(adders) and all(method.pulls for method in adders) and not limited and not owned

    def _find_activators(self) -> None:
        modules = list(self.parameters.module.modules())
        self.forward.heads = [module for module in modules if callable(getattr(module, "activate", None))]
        self._grows = any(callable(getattr(module, "grow", None)) for module in modules)
        self.forward.activators = [method.activate for method in self.hooks["activate"]]

    def follow_model(self) -> None:
        """Notice parameters that were added, replaced, resized, thawed or moved, and move everything along."""
        if not self.parameters.changed():
            return
        self.flat.leave()
        known = {id(p) for p in self.parameters.members.values()}
        remap = self.parameters.rebind()
        wrapped = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in self.model.modules())
        if wrapped and not {id(p) for p in self.parameters.members.values()} <= known:
            raise ModelError(
                "the model has new parameters, and DistributedDataParallel averages only those that it wrapped; build "
                "the head at its full width, or wrap a model that has all its parameters"
            )
        theta = self.parameters.theta
        self.device = self.forward.device = self.classes.device = theta.device
        self.forward.dtype = theta.dtype
        self.optimizers.rebind(list(self.parameters.members.items()))
        self.flat = FlatStep(self.parameters, self.optimizers)
        if remap is not None:
            self.resize(remap)
        self._find_activators()

    def resize(self, remap: Remap) -> None:
        """Move every method's aligned state to the new layout."""
        for method in self.methods:
            method.resize(remap)
        if self.boundaries is not None:
            self.boundaries.resize(remap)

    def _start_without_task(self) -> None:
        if self.boundaries is not None:
            self.boundaries.open()
            return
        blocked = [method.name for method in self.methods if method.needs_boundaries and method.acts]
        if blocked or self.scenario == "task":
            who = f"'{blocked[0]}'" if blocked else "the task-incremental scenario"
            raise UsageError(
                f"{who} needs to know where tasks begin; call begin_task() before the first step, or let "
                "a detector find out: Learner(..., boundaries='page_hinkley')"
            )

    def _check_width(self, outputs: Tensor) -> None:
        if outputs.shape[-1] < self.classes.width:
            raise ModelError(
                f"the model gives {outputs.shape[-1]} outputs, but the classes so far need {self.classes.width} "
                "columns; build it with more outputs or with a growing head"
            )
        self._width_checked = True

    def _on_device(self, value: Any) -> Any:
        return to_device(value, self.device)
