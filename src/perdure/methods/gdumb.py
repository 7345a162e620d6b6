"""GDumb: store examples while they come, and train a fresh model on them when somebody asks."""

from __future__ import annotations

import math
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from perdure.classes import among
from perdure.errors import DivergedError, IncompatibleError, UsageError
from perdure.learner import Learner
from perdure.methods.base import Method, check_count, check_value
from perdure.methods.frozen import Tensors, frozen_copy, run_frozen
from perdure.methods.replay import check_buffer, columns_of, make_buffer
from perdure.registry import register
from perdure.seeding import derive
from perdure.streams.task import Task, count_batches, draw_plan
from perdure.tree import rows, take

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from perdure.batch import Batch
    from perdure.optimizers import Named


@register("gdumb")
@dataclass
class GDumb(Method):
    """Learn nothing from the stream but a balanced buffer; train a fresh model on the buffer alone to predict.

    While the stream runs, the model stays as it is and the buffer takes rows as long as their class has less than its
    share. The first prediction after the buffer has changed trains a copy of the untouched model: prediction <-
    argmax over the classes in the buffer. It depends on the buffer and the seed alone.

    The optimizer is made anew by the learner's factory; the paper's is `partial(torch.optim.SGD, lr=0.05, momentum=0.9,
    weight_decay=1e-6)`. Its learning rate is a tenth in the first pass, and then falls from all of it to a hundredth
    along half a cosine over 1, 2, 4, 8, ... passes. The time of training is counted where the prediction is asked for.

    Prabhu et al. 2020, GDumb: A Simple Approach that Questions Our Progress in Continual Learning (ECCV).

    Parameters
    ----------
    capacity
        Examples kept in total; 0 switches the method off. None with `bytes_budget`.
    epochs
        Passes over the buffer in a training: 256 in the paper; 8 or 16 do for small problems on a CPU.
    batch_size
        Rows of a step in that training.
    cutmix, cutmix_alpha
        Probability with which a batch of images gets boxes cut from other rows and mixed targets, and the parameter of
        the law of the boxes' sizes. Other inputs are left alone.
    clip_norm
        Largest norm of a gradient.
    writing, bytes_budget
        See `Replay`; the paper's writing policy is "greedy_balanced".
    """

    capacity: int | None = 1000
    epochs: int = 256
    batch_size: int = 16
    cutmix: float = 0.5
    cutmix_alpha: float = 1.0
    clip_norm: float = 10.0
    writing: str = "greedy_balanced"
    bytes_budget: int | None = None

    summary: ClassVar[str] = "only fill a balanced buffer; train a fresh model on it when asked to predict"
    paper: ClassVar[str] = "Prabhu et al. 2020, ECCV"
    use_when: ClassVar[str] = "as a baseline: a method that keeps as many examples should beat it"
    cost: ClassVar[str] = "time: nothing a step, a training on the buffer at each query; memory: M D"
    stores_examples: ClassVar[bool] = True
    attachable: ClassVar[bool] = False
    owns: ClassVar[tuple[str, ...]] = ("step", "predict")
    reading: ClassVar[str] = "uniform"
    forward: ClassVar[str] = "joint"
    transient: ClassVar[tuple[str, ...]] = ("fits", "fit_seconds")

    def __post_init__(self) -> None:
        check_buffer(self)
        check_count(self.name, "epochs", self.epochs, 1)
        check_count(self.name, "batch_size", self.batch_size, 1)
        check_value(self.name, "cutmix", self.cutmix, 0, 1)
        check_value(self.name, "cutmix_alpha", self.cutmix_alpha, 1e-6)
        check_value(self.name, "clip_norm", self.clip_norm, 1e-12)

    def has(self, hook: str) -> bool:
        return super().has(hook) and self.capacity != 0

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        if self.capacity != 0 and learner.optimizers.factory is None:
            raise IncompatibleError(
                "'gdumb' trains a fresh model whenever it is asked, and an optimizer that is built already belongs to "
                "one model; pass a factory instead, such as functools.partial(torch.optim.SGD, lr=0.05)"
            )
        self.buffer = make_buffer(self)
        self.fitted: Tensors | None = None
        self.resting: list[str] = []
        self.fits, self.fit_seconds = 0, 0.0

    def step(self, batch: Batch) -> Tensor:
        module = self.parameters.module
        if module.training:  # a prediction is made in evaluation mode, which hides what somebody has put there himself
            self.resting = [name for name, each in module.named_modules() if not each.training]
        return self.parameters.theta.new_zeros(())

    def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
        if not batch.first_pass:
            return
        before = self._written()
        self.buffer.add(columns_of(batch.now, batch.task))
        if self._written() != before:
            self.fitted = None

    def _written(self) -> tuple[int, int]:
        """Something that changes whenever the buffer takes a row."""
        labels = self.buffer.columns.get("y")
        return (id(labels), 0 if labels is None else labels._version)

    # -- prediction -----------------------------------------------------------------------------------------------

    def predict(self, x: Any, task: int | None) -> Tensor:
        learner = self.learner
        if not len(self.buffer):
            return learner.classes.argmax(learner.outputs(x, task), task)
        known, own = set(self.classes()), learner.classes.seen
        if task is not None:
            if task not in learner.classes.by_task:
                begun = sorted(learner.classes.by_task) or "none"
                raise UsageError(f"task {task} has not begun; there are {begun}")
            own = learner.classes.by_task[task]
        return among(self.outputs(x, task), sorted(known & set(own)) or own or sorted(known))

    def classes(self) -> list[int]:
        """The classes in the buffer."""
        found: list[int] = torch.unique(self.buffer.view("y")).tolist()
        return found

    @torch.no_grad()
    def outputs(self, x: Any, task: int | None = None) -> Tensor:
        """Raw outputs [rows, columns] of the model that was trained on the buffer as it is now."""
        if self.fitted is None:
            start = time.perf_counter()
            self.fitted = self.fit()
            self.fits, self.fit_seconds = self.fits + 1, self.fit_seconds + time.perf_counter() - start
        forward, found = self.learner.forward, []
        size = forward.widest_batch
        for i in range(0, max(1, rows(x)), size):
            forward.activate(task)
            found.append(run_frozen(self.learner, self.fitted, forward.inputs(take(x, slice(i, i + size)))))
        return torch.cat(found)

    def fit(self) -> Tensors:
        """Train a copy of the untouched model on the buffer; its parameters and buffers by name."""
        outer = self.learner
        module = deepcopy(outer.parameters.module).train()
        for name, each in module.named_modules():
            each.training = name not in self.resting
        size = len(self.buffer)
        per_pass = count_batches(size, self.batch_size, drop_last=False)
        seed = derive(outer.seed, self.name, "fit")
        inner = Learner(
            module,
            self._optimizer,
            [BufferRows(self)],
            criterion=outer.criterion.function,
            scheduler=lambda made: LambdaLR(made, lambda update: rate(update // per_pass)),
            scenario=outer.scenario,
            seed=seed,
            precision=outer.forward.precision,
            clip_norm=self.clip_norm,
            channels_last=outer.forward.channels_last,
            active_classes="seen",
            augment=outer.augment,
        )
        inner.forward.prepare = outer.forward.prepare
        inner.task = Task(0, "buffer", None, None, ())  # type: ignore[arg-type]
        known = outer.classes.by_task if outer.scenario == "task" else {0: tuple(self.classes())}
        for index, classes in known.items():
            inner.classes.open(index, classes)
        x, y = self.buffer.view("x"), self.buffer.view("y")
        # What dropout draws here is the same at every call, and nobody else's.
        with torch.enable_grad(), torch.random.fork_rng([outer.device] if outer.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for chosen in draw_plan(size, (seed, "plan"), epochs=self.epochs, batch_size=self.batch_size):
                inner.step(take(x, chosen), take(y, chosen), index=chosen)
        for count in ("forward_rows", "backward_rows"):
            outer.passes[count] += inner.passes[count]
        if not bool(inner.parameters.theta.isfinite().all()):
            raise DivergedError("gdumb: the training on the buffer diverged; lower the optimizer's learning rate")
        return frozen_copy(module)

    def _optimizer(self, named: Named) -> list[Optimizer]:
        """A fresh optimizer with the options that the learner's has."""
        factory = self.learner.optimizers.factory
        assert factory is not None
        made = factory(named)
        made = [made] if isinstance(made, torch.optim.Optimizer) else list(made)
        fresh = (group for optimizer in made for group in optimizer.param_groups)
        for group, own in zip(fresh, self.learner.optimizers.groups(), strict=True):
            options = {**own, "lr": own.get("initial_lr", own["lr"])}
            group.update({k: v for k, v in options.items() if k in group and k not in ("params", "param_names")})
        return made


def rate(epoch: int) -> float:
    """The learning rate of a pass as a share of the largest: a tenth, then half cosines over 1, 2, 4, ... passes.

    >>> [round(rate(epoch), 3) for epoch in range(8)]
    [0.1, 1.0, 1.0, 0.505, 1.0, 0.855, 0.505, 0.155]
    """
    if epoch == 0:
        return 0.1
    length = 1 << (epoch.bit_length() - 1)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (epoch - length) / length)) / 2


class BufferRows(Method):
    """What tells the training on a buffer the task of each row, and mixes images."""

    name = "gdumb_rows"
    owns: ClassVar[tuple[str, ...]] = ("criterion",)

    def __init__(self, owner: GDumb) -> None:
        self.owner = owner
        self._mixed: tuple[float, Tensor] | None = None
        self._draw = np.random.default_rng(derive(owner.learner.seed, owner.name, "cutmix"))

    def on_batch(self, batch: Batch) -> Batch:
        now = batch.now
        if self.owner.learner.scenario in ("task", None) and batch.index is not None:
            tasks = self.owner.buffer.view("task").index_select(0, batch.index)
            now = replace(now, tasks=None if bool((tasks < 0).any()) else tasks)
        self._mixed = None
        if is_images(now.x) and self._draw.random() < self.owner.cutmix:
            other = torch.from_numpy(self._draw.permutation(now.size)).to(now.x.device)
            x, share = cut_and_mix(now.x, other, self._draw.beta(*2 * (self.owner.cutmix_alpha,)), self._draw)
            now, self._mixed = replace(now, x=x), (share, other)
        return batch.with_sources(now)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        usual, allowed = self.owner.learner.criterion, self.learner.allowed
        loss = usual(outputs, batch, allowed)
        if self._mixed is None:
            return loss
        share, other = self._mixed
        now = batch.now
        tasks = None if now.tasks is None else now.tasks[other.cpu()]
        mixed = batch.with_sources(replace(now, y=now.y[other], tasks=tasks))
        return share * loss + (1 - share) * usual(outputs, mixed, allowed)


def is_images(x: Any) -> bool:
    """Whether the last two sides are height and width: [n, channels, h, w], or bytes [n, h, w]."""
    return isinstance(x, Tensor) and (x.dim() == 4 or (x.dim() == 3 and x.dtype == torch.uint8))


def cut_and_mix(x: Tensor, other: Tensor, keep: float, draw: np.random.Generator) -> tuple[Tensor, float]:
    """`x` with one box, about 1 - keep of the area, taken from the rows `other`; and the share that is really kept.

    Yun et al. 2019, CutMix, arXiv 1905.04899.
    """
    height, width = x.shape[-2:]
    cut = math.sqrt(1 - keep)
    bounds = []
    for side in (height, width):
        middle, half = int(draw.integers(side)), int(side * cut) // 2
        bounds.append(slice(max(0, middle - half), min(side, middle + half)))
    rows_of, columns = bounds
    x = x.clone()
    x[..., rows_of, columns] = x[other][..., rows_of, columns]
    cut_out = (rows_of.stop - rows_of.start) * (columns.stop - columns.start)
    return x, 1 - cut_out / (height * width)
