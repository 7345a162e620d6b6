"""Training on a stream: plans, evaluations, checkpoints, and the result."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from perdure.audit import take_digests
from perdure.data.examples import as_examples
from perdure.errors import DivergedError, PerdureWarning, UsageError
from perdure.evaluation import Evaluation, evaluate
from perdure.folder import RunFolder, pack_predictions
from perdure.memory_use import peak_memory_bytes
from perdure.pictures import Pictures, grid, png, read_pictures, write_pictures
from perdure.prequential import Prequential
from perdure.results import Results
from perdure.saving import learner_state, load_learner_state
from perdure.streams.task import Stream, Task, count_batches, draw_plan
from perdure.version import versions

if TYPE_CHECKING:
    from perdure.learner import Learner

Event = dict[str, Any]
_PROGRESS_SECONDS = 0.2


@dataclass
class Position:
    """Where a fit stands: what a checkpoint adds to the learner's own state."""

    plan: dict[str, Any]
    task: int = 0
    step: int = 0
    updates: int = 0
    evaluations: list[dict[str, list[float]]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    prequential: list[list[int | None]] = field(default_factory=list)
    audit: list[dict[str, Any]] = field(default_factory=list)
    logged: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "evaluate": 0.0})


def fit(
    learner: Learner,
    stream: Stream,
    *,
    epochs: int = 1,
    batch_size: int = 32,
    steps: int | None = None,
    drop_last: bool = False,
    evaluate_every: int | None = None,
    eval_future: bool = True,
    reset_optimizer: bool = False,
    folder: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
    announce: bool = True,
    prequential: bool | None = None,
) -> Results:
    """Train on every task of `stream` in turn; evaluate before the first and after each.

    Parameters
    ----------
    epochs, steps
        Passes over each task's data, or updates a task instead.
    batch_size, drop_last
        Of the current rows; whether a shorter last batch of a pass is left out.
    evaluate_every
        Also evaluate every so many updates, which shows how far a task falls in between (the stability gap); they are
        counted from the beginning of a task, or of the stream where no tasks are announced.
    eval_future
        Whether tasks that have not come yet are evaluated too; without them there is no forward transfer.
    reset_optimizer
        Forget the optimizer's moments when a task begins.
    folder
        Where to keep log, checkpoints and results. Nothing is written without it. On a task-incremental stream a
        checkpoint also has digests of a few outputs of every task so far, taken when one ended, for `perdure audit`.
    checkpoint_every
        Updates between checkpoints inside a task; one is written after each task in any case.
    resume
        Continue from the newest intact checkpoint in `folder`, if there is one, to the identical result.
    on_event
        Called with a dictionary at every event: task_begin, step (a few times a second), evaluation, task_end, end.
    announce
        Whether the learner is told where tasks begin and end; one that finds boundaries itself never is, nor is any
        on an online or blurry stream. The order of the data and the evaluations are the same either way.
    prequential
        Whether right predictions of new rows, made before the update that uses them, are counted; by default on online
        and blurry streams. They are the outputs of the training step itself, of augmented rows if the learner augments,
        and are not counted where a method replaces the step or the prediction.

    Raises
    ------
    UsageError
        For values out of range, more than one pass over an online stream, or a folder that holds a run with other
        settings.
    """
    if not isinstance(stream, Stream):
        raise UsageError(
            f"fit needs a Stream and got a {type(stream).__name__}; make one with perdure.benchmarks or "
            "perdure.streams, or use fit_task for the data of one task"
        )
    for name, value in {"epochs": epochs, "batch_size": batch_size, "steps": steps, "evaluate_every": evaluate_every,
                        "checkpoint_every": checkpoint_every}.items():  # fmt: skip
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} is {value!r}, it must be a whole number of at least 1")
    if resume and folder is None:
        raise UsageError("resume=True needs the folder of the run to continue")
    announce = announce and learner.boundaries is None and stream.announced
    if not announce and reset_optimizer:
        raise UsageError("reset_optimizer=True resets where a task is announced, and none is here; leave it out")
    check_passes(stream, epochs, batch_size, steps, drop_last)
    learner.adopt(stream)
    counts = not stream.announced if prequential is None else prequential
    if counts != (learner.prequential is not None):
        learner.prequential = Prequential(learner.classes) if counts else None
    plan = {"epochs": epochs, "batch_size": batch_size, "steps": steps, "drop_last": drop_last}
    rules = plan | {
        "evaluate_every": evaluate_every, "eval_future": eval_future, "reset_optimizer": reset_optimizer,
        "stream": stream.fingerprint(), "hidden_boundaries": True if not announce else None,
        "prequential": counts if counts == stream.announced else None,
    }  # fmt: skip
    run = _Run(learner, stream, rules, RunFolder(folder) if folder is not None else None, on_event)
    if not (resume and run.restore()):
        run.start()
    while run.position.task < len(stream):
        run.train(plan, reset_optimizer, checkpoint_every)
    return run.finish()


def check_passes(
    stream: Stream, epochs: int = 1, batch_size: int = 32, steps: int | None = None, drop_last: bool = False
) -> None:
    """Raise a `UsageError` if the rows of an online stream would arrive more than once."""
    if stream.scenario != "online":
        return
    if steps is None and epochs > 1:
        raise UsageError(f"epochs is {epochs}, but an online stream passes once; use epochs=1, or another scenario")
    for task in stream:
        once = stream.batches_per_pass(task, batch_size, drop_last)
        if steps is not None and steps > once:
            raise UsageError(
                f"steps is {steps}, but an online stream passes once, which is {once} steps in '{task.name}'; use fewer"
            )


def fit_task(
    learner: Learner,
    task: Task | str,
    data: Any = None,
    *,
    classes: Sequence[int] = (),
    epochs: int = 1,
    batch_size: int = 32,
    steps: int | None = None,
    drop_last: bool = False,
) -> None:
    """Begin a task, train on its examples, and end it.

    Parameters
    ----------
    task
        A task of a stream, or a name; then `data` is its examples: a pair of arrays or tensors, a `Dataset`, a path.
    classes
        The task's class columns; by default those that occur in its targets (if they are integers).
    epochs, batch_size, steps, drop_last
        As in `fit`.
    """
    if not isinstance(task, Task):
        if data is None:
            raise UsageError(f"fit_task('{task}') needs the task's examples; pass arrays, a data set or a path")
        examples = as_examples(data)
        if not classes and not examples.targets.is_floating_point() and examples.targets.dim() == 1:
            classes = [label for label in torch.unique(examples.targets).tolist() if label >= 0]
        task = Task(learner.tasks_begun, task, examples, None, tuple(classes))
    learner.begin_task(task)
    assert learner.task is not None
    train = learner.task.train
    training_mode(learner.model)
    per_pass = count_batches(len(train), batch_size, drop_last)
    total = steps or epochs * per_pass
    learner.steps_per_pass = min(per_pass, total)
    seed = (learner.seed, "plan", task.index)
    plan = draw_plan(len(train), seed, epochs=epochs, batch_size=batch_size, drop_last=drop_last, steps=steps)
    for step, (x, y, index) in enumerate(train.batches(plan)):
        learner.progress = step / total
        learner.step(x, y, index=index, first_pass=step < per_pass)
    learner.end_task()


def training_mode(model: nn.Module) -> None:
    """Switch a model that is in evaluation mode as a whole; layers that somebody froze on purpose stay as they are."""
    if not model.training:
        model.train()


class _Run:
    """One call of `fit`: the learner, the stream, and where it stands."""

    def __init__(
        self,
        learner: Learner,
        stream: Stream,
        rules: dict[str, Any],
        folder: RunFolder | None,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self.learner, self.stream, self.folder, self.on_event = learner, stream, folder, on_event
        self.position = Position(rules)
        self.pictures: Pictures = {}

    def start(self) -> None:
        """Evaluate the untrained model."""
        if self.learner.tasks_begun or self.learner.passes["steps"]:
            raise UsageError(
                "this learner has been trained already; build a new one, or use fit_task for further tasks"
            )
        if self.folder is not None:
            self.folder.clear()
        self._evaluate(after=-1)

    def restore(self) -> bool:
        """Continue from the folder's newest intact checkpoint; false if there is none."""
        assert self.folder is not None
        state = self.folder.load()
        if state is None:
            if self.folder.events():
                warnings.warn(
                    f"the run in {self.folder.path} stopped before its first checkpoint; starting over",
                    PerdureWarning,
                    stacklevel=4,
                )
            return False
        saved = Position(**state["position"])
        for key, value in self.position.plan.items():
            if saved.plan.get(key) != value:
                raise UsageError(
                    f"{self.folder.path} holds a run with {key} = {saved.plan.get(key)!r}, this one has {value!r}; "
                    "resume with the same settings or choose another folder"
                )
        for method in self.learner.methods:
            was = state["learner"]["methods"].get(method.name, {"arguments": method.arguments()})["arguments"]
            if was != method.arguments():
                raise UsageError(
                    f"{self.folder.path} holds a run with {method.name} {was}, this one has {method.arguments()}; "
                    "resume with the same settings or choose another folder"
                )
        load_learner_state(self.learner, state["learner"])
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None and self.learner.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.learner.device)
        self.position = saved
        self.folder.truncate(saved.logged)
        for name, kept in read_pictures(self.folder.path).items():
            self.pictures[name] = {task: data for task, data in kept.items() if task < saved.task}
        return True

    def train(self, plan: dict[str, Any], reset_optimizer: bool, checkpoint_every: int | None) -> None:
        """Finish the current task: from its beginning, or from where a checkpoint left it."""
        learner, position = self.learner, self.position
        task = self.stream[position.task]
        resumed = learner.restored
        if reset_optimizer and not resumed:
            learner.optimizers.reset()
        announced = not position.plan["hidden_boundaries"]
        if announced:
            learner.begin_task(task)
            assert learner.task is not None
            task = learner.task
        elif learner.boundaries is None and self.stream.announced:
            learner.classes.open(task.index, task.classes)  # what may be predicted: no method asks for tasks here
        per_pass = count_batches(len(task.train), plan["batch_size"], plan["drop_last"])
        total = plan["steps"] or plan["epochs"] * per_pass
        if announced:
            learner.steps_per_pass = min(per_pass, total)
        if not (resumed or position.step):
            self._emit({"event": "task_begin", "task": task.index, "name": task.name, "steps": total})
        training_mode(learner.model)
        every = position.plan["evaluate_every"]
        batches = islice(self.stream.plan(task, **plan), position.step, None)
        clock = shown = time.perf_counter()
        loss = None
        found = 0 if learner.boundaries is None else len(learner.boundaries.found)
        for x, y, index in task.train.batches(batches, position.step):
            if announced:
                learner.progress = position.step / total
            loss = learner.step(x, y, index=index if announced else None, first_pass=position.step < per_pass)
            position.step += 1
            position.updates += 1
            if learner.boundaries is not None and len(learner.boundaries.found) > found:
                found = len(learner.boundaries.found)
                self._emit({"event": "boundary", "task": task.index, **asdict(learner.boundaries.found[-1])})
            ticks = position.step if self.stream.announced else position.updates  # no boundary sets a clock back
            if every and ticks % every == 0 and position.step < total:
                clock = self._spent("train", clock)
                self._evaluate(after=task.index, step=position.step)
                clock = time.perf_counter()
            if checkpoint_every and position.step % checkpoint_every == 0 and position.step < total:
                clock = self._spent("train", clock)
                self._save()
            if self.on_event is not None and (now := time.perf_counter()) - shown > _PROGRESS_SECONDS:
                shown = now
                value = self._finite(loss, task)
                self.on_event(
                    {"event": "step", "task": task.index, "step": position.step, "steps": total, "loss": value}
                )
        last = self._finite(loss, task)
        if announced:
            learner.progress = 1.0
            learner.end_task()
        self._count_predictions()
        clock = self._spent("train", clock)
        self._emit({"event": "task_end", "task": task.index, "steps": total, "loss": last})
        self._picture(task)
        self._evaluate(after=task.index)
        self._take_digests(task)
        position.task, position.step = position.task + 1, 0
        self._save()

    def finish(self) -> Results:
        """The result of the finished run, also written to the folder."""
        results = _results(self.learner, self.stream, self.position)
        results.pictures = self.pictures
        if self.folder is not None:
            results.save(self.folder.path)
        self._tell({"event": "end", "metrics": results.metrics()})
        return results

    # -- pieces ---------------------------------------------------------------------------------------------------

    def _finite(self, loss: Tensor | None, task: Task) -> float | None:
        value = None if loss is None else float(loss)
        if value is not None and not math.isfinite(value):
            raise DivergedError(
                f"training diverged: the loss is {value} in task '{task.name}' by update {self.position.step}; lower "
                "the learning rate or a method's strength, or use a penalty's solver='prox'"
            )
        return value

    def _count_predictions(self) -> None:
        """Of the task that ends: how many new rows were predicted rightly, and how many there were."""
        counts, parts = self.learner.prequential, self.position.prequential
        if counts is None:
            return
        before = [sum(part[k] or 0 for part in parts) for k in range(2)]
        correct = None if counts.correct is None else counts.correct - before[0]
        parts.append([correct, counts.rows - before[1]])

    def _evaluate(self, after: int, step: int | None = None) -> None:
        trained = sum(method.fit_seconds for method in self.learner.methods)
        clock = time.perf_counter()
        count = None if self.position.plan["eval_future"] else after + 1
        found = evaluate(self.learner, self.stream, count)
        row = {"class_incremental": found.class_incremental, "task_restricted": found.task_restricted}
        scores = found.scores(self.stream.scenario)
        if step is None:
            self.position.evaluations.append(row)
        else:
            self.position.history.append({"task": after, "step": step, "accuracies": scores})
        self._spent("evaluate", clock)
        # A method that trains when it is asked to predict has trained all the same.
        trained = sum(method.fit_seconds for method in self.learner.methods) - trained
        self.position.seconds["train"] += trained
        self.position.seconds["evaluate"] -= trained
        self._emit(_evaluation_event(found, scores, after, step))

    def _take_digests(self, task: Task) -> None:
        """Keep what `perdure audit` compares: digests of a few outputs of every task so far."""
        if self.folder is None or self.stream.scenario != "task":
            return
        clock = time.perf_counter()
        self.position.audit.append(take_digests(self.learner, self.stream, task.index + 1).to_dict())
        self._spent("evaluate", clock)

    def _picture(self, task: Task) -> None:
        """Keep what the methods have to show after a task."""
        clock = time.perf_counter()
        for method in self.learner.methods:
            images = method.pictures() if method.has("pictures") else None
            if images is not None:
                self.pictures.setdefault(method.name, {})[task.index] = png(grid(images))
        if self.folder is not None:
            write_pictures(self.folder.path, self.pictures)
        self._spent("evaluate", clock)

    def _emit(self, event: Event) -> None:
        """An event for the log and for whoever listens."""
        if self.folder is not None:
            self.folder.write(event)
            self.position.logged += 1
        self._tell(event)

    def _tell(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(event)

    def _save(self) -> None:
        if self.folder is None:
            return
        device = self.learner.device
        self.folder.save(
            self.position.updates,
            {
                "learner": learner_state(self.learner),
                "position": asdict(self.position),
                "rng": torch.get_rng_state(),
                "rng_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            },
        )

    def _spent(self, part: str, since: float) -> float:
        now = time.perf_counter()
        self.position.seconds[part] += now - since
        return now


def _evaluation_event(found: Evaluation, scores: list[float], after: int, step: int | None) -> Event:
    return {
        "event": "evaluation",
        "after": after,
        "step": step,
        "accuracies": [None if np.isnan(score) else score for score in scores],
        "predictions": {view: [pack_predictions(p) for p in arrays] for view, arrays in found.predictions.items()},
    }


def _results(learner: Learner, stream: Stream, position: Position) -> Results:
    views = {}
    for view in ("class_incremental", "task_restricted"):
        table = np.array([row[view] for row in position.evaluations], dtype=float)
        views[view] = {"matrix": table[1:], "untrained": table[0]}
    own = views["task_restricted" if stream.scenario == "task" else "class_incremental"]
    state_bytes = {method.name: method.memory_bytes() for method in learner.methods}
    seconds = {**position.seconds, "total": sum(position.seconds.values())}
    counted = {
        "correct": [correct for correct, _ in position.prequential],
        "rows": [n for _, n in position.prequential],
    }
    return Results(
        scenario=stream.scenario,
        task_names=[task.name for task in stream],
        benchmark=stream.name,
        methods=[method.name for method in learner.methods],
        seed=learner.seed,
        matrix=own["matrix"],
        untrained=own["untrained"],
        class_incremental=views["class_incremental"],
        task_restricted=views["task_restricted"],
        test_sizes=np.array([len(task.test) if task.test is not None else 0 for task in stream]),
        seconds=seconds,
        state_bytes=state_bytes,
        peak_memory_bytes=peak_memory_bytes(learner.device),
        passes=dict(learner.passes),
        history=position.history,
        prequential=counted if counted["rows"] and None not in counted["correct"] else None,
        versions=versions(),
    )
