"""Experience replay: examples of the past are trained on again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from perdure.errors import UsageError
from perdure.memory.buffer import Buffer
from perdure.memory.ranked import SELECTIONS
from perdure.memory.task_memory import TaskMemory
from perdure.methods.base import Method, check_choice, check_count, check_value
from perdure.methods.exemplars import choose_examples
from perdure.registry import register
from perdure.seeding import derive
from perdure.tree import leaves, to_device

if TYPE_CHECKING:
    from perdure.batch import Batch, Source
    from perdure.learner import Learner
    from perdure.streams.task import Task

FORWARDS = ("joint", "separate")


class Remembering(Method):
    """What methods with one buffer share: how it is filled, by any writing policy.

    Rows are stored once, after the step in which they are new. A policy that chooses by features (`SELECTIONS`) gets
    them when their task ends instead; "loss_aware" is told the loss of every row that a step has seen.
    """

    capacity: int | None
    ratio: float
    batch_size: int | None
    writing: str
    bytes_budget: int | None

    stores_examples: ClassVar[bool] = True
    stores_logits: ClassVar[bool] = False
    draws: ClassVar[tuple[str, ...]] = ()  # names of the sources that come from the buffer
    transient: ClassVar[tuple[str, ...]] = ("needs_boundaries", "needs_task_data")

    def __post_init__(self) -> None:
        check_buffer(self)
        check_value(self.name, "ratio", self.ratio)
        if self.selects:
            self.needs_boundaries = self.needs_task_data = True  # type: ignore[misc]

    @property
    def selects(self) -> bool:
        """Whether rows are chosen by their features when a task ends."""
        return self.writing in SELECTIONS

    def has(self, hook: str) -> bool:
        off = 0 in (self.capacity, self.ratio, self.batch_size)
        if hook == ("after_step" if self.selects else "end_task"):
            return False
        own = type(self).loss is not Remembering.loss or self.writing == "loss_aware"
        return super().has(hook) and (hook != "loss" or own) and not off

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.buffer = make_buffer(self)

    def loss(self, batch: Batch, outputs: Tensor) -> Tensor | None:
        if self.writing == "loss_aware":
            for name in self.draws:
                source = batch.find(name)
                if source is not None:
                    losses = self._losses(source, batch.part(name, outputs))
                    self.buffer.update(source.extras["slot"], {"loss": losses})
        return None

    def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
        if batch.first_pass:
            self.buffer.add(self.columns(batch, outputs))

    def columns(self, batch: Batch, outputs: Tensor | None) -> dict[str, Any]:
        """What is stored of the current rows."""
        found = columns_of(batch.now, batch.task)
        if outputs is not None and self.stores_logits:
            found["logits"] = batch.now.only_new(outputs[: batch.now.size])
        if outputs is not None and self.writing == "loss_aware":
            found["loss"] = batch.now.only_new(self._losses(batch.now, outputs[: batch.now.size]))
        return found

    def end_task(self, task: Task) -> None:
        choose_examples(self.learner, self.buffer, task, with_logits=self.stores_logits)

    @torch.no_grad()
    def _losses(self, source: Source, outputs: Tensor) -> Tensor:
        allowed = self.learner.allowed(source, outputs.shape[-1])
        return self.learner.criterion.rows(outputs, source.y, allowed)


@register("replay")
@dataclass
class Replay(Remembering):
    """Add rows drawn from a buffer of the past to every batch, and keep the buffer a fair sample of the stream.

    "pooled": one mean loss over current and remembered rows. "sum": mean over current rows plus `weight` times the
    mean over remembered rows. "1/t": shares 1/t and 1 - 1/t in the t-th task. New rows are stored after the step, once.

    Chaudhry et al. 2019, arXiv 1902.10486.

    Parameters
    ----------
    capacity
        Examples kept in total; 0 switches the method off. None with `bytes_budget` or `per_class`.
    ratio
        Remembered rows for each current row; 0 switches the method off.
    batch_size
        Remembered rows a step, instead of `ratio`.
    weighting
        "pooled", "sum" or "1/t".
    weight
        Factor of the remembered rows' mean with "sum".
    writing
        "reservoir": every example of the stream is kept with the same probability. "class_balanced" and
        "task_balanced": a reservoir for each class or task. "greedy_balanced": the first of every class. "ring" and
        "class_ring": the newest of every task or class. "loss_aware": what is learned already makes room. "herding",
        "nearest_mean" and "k_center": chosen by the model's features when a task ends, as many of every class; these
        three need task boundaries.
    reading
        "uniform" without replacement, "class_balanced" or "task_balanced".
    forward
        "joint": one forward pass over all rows; "separate": remembered rows have their own (batch statistics differ).
    bytes_budget
        The buffer's size in bytes instead of examples.
    per_class
        With `capacity=None`: the buffer grows when a task ends, by so many examples of each of its classes, instead of
        being a sample of the whole stream at any moment. They are random, or chosen as `writing` says.
    folder
        Keep the examples in files without a name in this folder instead of in memory, for buffers that do not fit
        there. Results are the same; every checkpoint copies what is stored.
    """

    capacity: int | None = 1000
    ratio: float = 1.0
    batch_size: int | None = None
    weighting: str = "pooled"
    weight: float = 1.0
    writing: str = "reservoir"
    reading: str = "uniform"
    forward: str = "joint"
    bytes_budget: int | None = None
    per_class: int | None = None
    folder: str | None = None

    summary: ClassVar[str] = "train again on a bounded sample of past examples"
    paper: ClassVar[str] = "Chaudhry et al. 2019, arXiv 1902.10486"
    use_when: ClassVar[str] = "some old examples may be kept: the strong baseline in every scenario"
    cost: ClassVar[str] = "time: 1 + ratio times a step; memory: M D"
    draws: ClassVar[tuple[str, ...]] = ("replay",)

    def __post_init__(self) -> None:
        if self.per_class is not None:
            check_count(self.name, "per_class", self.per_class)
            for other in ("capacity", "bytes_budget"):
                if getattr(self, other) is not None:
                    raise UsageError(f"{self.name}: {other} and per_class are both given; set {other} to None (null)")
            check_choice(
                self.name, "writing with per_class", self.writing, ("reservoir", "class_balanced", *SELECTIONS)
            )
        super().__post_init__()
        check_value(self.name, "weight", self.weight)
        check_choice(self.name, "weighting", self.weighting, ("pooled", "sum", "1/t"))

    def has(self, hook: str) -> bool:
        grows = self.per_class is not None and not self.selects
        if hook in ("begin_task", "end_task") and grows:
            return self.per_class != 0 and self.ratio != 0 and self.batch_size != 0
        return super().has(hook) and hook != "begin_task" and self.per_class != 0

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        if self.per_class is not None:
            self.incoming = TaskMemory(derive(learner.seed, "buffer", self.name, "incoming"), "class_balanced")

    def begin_task(self, task: Task) -> None:
        assert self.per_class is not None
        self.incoming.open(task.index, class_quota(self.name, task, self.per_class))

    def on_batch(self, batch: Batch) -> Batch:
        share: float | None = None
        if self.weighting == "sum":
            share = self.weight
        elif self.weighting == "1/t":
            t = max(1, self.learner.tasks_begun)
            share = 1 - 1 / t
        if share == 0 or not len(self.buffer):
            return batch
        drawn = self.buffer.sample(draw_size(batch, self.batch_size, self.ratio))
        if self.weighting == "1/t" and len(drawn["slot"]):
            batch = batch.with_sources(replace(batch.now, share=1 / t), *batch.sources[1:])
        return add_drawn(batch, "replay", drawn, self.forward, share)

    def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
        if self.per_class is None:
            super().after_step(batch, outputs)
        elif self.incoming.current is None:
            raise UsageError(
                f"{self.name}: per_class needs to know where tasks begin; call begin_task(), or use capacity"
            )
        elif batch.first_pass:
            self.incoming.add(columns_of(batch.now, batch.task))

    def end_task(self, task: Task) -> None:
        if self.selects:
            choose_examples(self.learner, self.buffer, task, per_class=self.per_class)
            return
        self.incoming.close()
        while self.incoming.finished:
            rows = self.incoming.finished.pop()
            self.buffer.resize(len(self.buffer) + len(rows["task"]))
            self.buffer.add(rows)


# -- what every method with a buffer does the same way ----------------------------------------------------------------


def check_buffer(method: Any) -> None:
    """Validate the arguments that describe a buffer."""
    if method.capacity is not None:
        check_count(method.name, "capacity", method.capacity)
    if method.batch_size is not None:
        check_count(method.name, "batch_size", method.batch_size)
    check_choice(method.name, "forward", method.forward, FORWARDS)
    if method.writing in (*SELECTIONS, "loss_aware") and not isinstance(method, Remembering):
        raise UsageError(f"{method.name}: writing='{method.writing}' works with replay, der and derpp; use 'reservoir'")
    Buffer(_capacity(method), bytes_budget=method.bytes_budget, writing=method.writing, reading=method.reading)


def make_buffer(method: Any) -> Buffer:
    """The buffer that a method's arguments describe, with generators of the method's own."""
    folder = getattr(method, "folder", None)
    return Buffer(
        _capacity(method),
        writing=method.writing,
        reading=method.reading,
        seed=derive(method.learner.seed, "buffer", method.name),
        bytes_budget=method.bytes_budget,
        storage="memory" if folder is None else "mapped",
        folder=folder,
    )


def _capacity(method: Any) -> int | None:
    """Of a new buffer; one that grows with the classes begins empty."""
    grows = getattr(method, "per_class", None) is not None
    return 0 if grows else method.capacity


def class_quota(method: str, task: Task, per_class: int) -> int:
    """Examples of a task that make `per_class` of each of its classes; raises UsageError if it does not name them."""
    if not task.classes:
        raise UsageError(f"{method}: per_class needs the classes of task '{task.name}'; give begin_task() classes=")
    return per_class * len(task.classes)


def draw_size(batch: Batch, batch_size: int | None, ratio: float) -> int:
    """How many rows to draw for a batch."""
    return round(ratio * batch.now.size) if batch_size is None else batch_size


def add_drawn(batch: Batch, name: str, drawn: dict[str, Any], forward: str, share: float | None) -> Batch:
    """Drawn rows, if there are any, as a source of the batch; further columns become its extras."""
    slots, tasks = drawn.pop("slot"), drawn.pop("task", None)
    if not slots.shape[0]:
        return batch
    # The buffer may live elsewhere: loaded on another machine, or the model has moved since.
    now = batch.now.x
    device = (now if isinstance(now, Tensor) else leaves(now)[0]).device
    x, y = batch.augmented(to_device(drawn.pop("x"), device)), to_device(drawn.pop("y"), device)
    extras = {key: to_device(value, device) for key, value in drawn.items()}
    if extras.pop("loss", None) is not None:
        extras["slot"] = slots  # where the loss of this step will be stored
    return batch.add(name, x, y, share=share, separate=forward == "separate", tasks=tasks, extras=extras)


def columns_of(source: Source, task: int | None) -> dict[str, Any]:
    """The columns under which a source's new rows are stored; a task of -1 means that none was known."""
    return {"x": source.only_new(source.stored), "y": source.only_new(source.y), "task": -1 if task is None else task}
