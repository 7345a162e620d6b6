"""Generative replay: a generator of old inputs takes the place of remembered ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from perdure.batch import Batch, Source
from perdure.errors import DataError, UsageError
from perdure.methods.base import Method, check_choice, check_count, check_value
from perdure.methods.frozen import frozen_copy
from perdure.methods.input_generator import InputGenerator
from perdure.methods.replay import FORWARDS, draw_size
from perdure.methods.side_passes import eval_mode
from perdure.models.vae import LIKELIHOODS, NETWORKS
from perdure.registry import register
from perdure.seeding import derive, generator

if TYPE_CHECKING:
    from perdure.learner import Learner
    from perdure.streams.task import Task

CANDIDATES = 4
"""Rows drawn for each one that is kept, where the classes are balanced by choosing among them."""

PICTURES = 60


@register("generative_replay")
@dataclass
class GenerativeReplay(Method):
    """Replay inputs that a generator makes, labelled by the model as it was; generator and model learn from them alike.

    loss <- 1/t loss(current) + (1 - 1/t) loss(replayed) in the t-th task, for the model and for the generator

    The generator is a variational autoencoder. When a task begins, it and the model are copied; the frozen copies make
    and label the replayed rows of the whole task. In the first task nothing is replayed, and the model trains as if
    alone.

    Shin et al. 2017, arXiv 1705.08690; soft targets: van de Ven and Tolias 2018, arXiv 1809.10635.

    Parameters
    ----------
    ratio
        Replayed rows for each current row; 0 switches the method off.
    batch_size
        Replayed rows a step, instead of `ratio`.
    targets
        "hard": the class that the old model finds likeliest among those it has seen. "soft": all its probabilities over
        them, at `temperature`. Task-incremental, a row is scored on every past task and the losses are averaged; where
        a pass answers for one task alone (several heads), each row is of one past task, in turn.
    temperature
        Of soft targets.
    rescale
        Multiply the loss of soft targets by temperature^2, which makes its gradient independent of the temperature.
    balanced
        Draw more rows than needed and keep as many of each class, as far as there are.
    conditional
        Tell the generator the class of a row: old classes are then drawn equally often, and need no labelling.
    network
        Of the generator: "mlp", or "conv" for images.
    hidden
        Widths of its fully connected layers.
    latent
        Size of its code.
    likelihood
        "bernoulli" for inputs in [0, 1], "gaussian" for any, or "auto": by the first batch.
    lr
        Of the generator's Adam.
    generator_steps
        Updates of the generator in each step, on the step's rows: few examples a task take more.
    per_value
        Divide the generator's loss by the number of values of a row, as the reference code of 2022 does.
    forward
        "joint": one forward pass over all rows; "separate": replayed rows have their own (batch statistics differ).
    reset_optimizer
        Forget the moments of the generator's Adam when a task begins.
    snapshot_every
        Without task boundaries: copy model and generator after so many updates; t counts the copies.
    """

    ratio: float = 1.0
    batch_size: int | None = None
    targets: str = "hard"
    temperature: float = 2.0
    rescale: bool = True
    balanced: bool = False
    conditional: bool = False
    network: str = "mlp"
    hidden: Sequence[int] = (256, 256)
    latent: int = 32
    likelihood: str = "auto"
    lr: float = 1e-3
    generator_steps: int = 1
    per_value: bool = False
    forward: str = "joint"
    reset_optimizer: bool = False
    snapshot_every: int | None = None

    summary: ClassVar[str] = "train a generator of past inputs and replay what it makes"
    paper: ClassVar[str] = "Shin et al. 2017, arXiv 1705.08690"
    use_when: ClassVar[str] = "no example may be kept and inputs are simple enough to generate, such as digits"
    cost: ClassVar[str] = "time: at least 4 times a step; memory: P + 4 G"
    needs_boundaries: ClassVar[bool] = True
    transient: ClassVar[tuple[str, ...]] = ("_drawn", "_masks")

    def __post_init__(self) -> None:
        check_value(self.name, "ratio", self.ratio)
        for argument in ("batch_size", "snapshot_every"):
            if getattr(self, argument) is not None:
                check_count(self.name, argument, getattr(self, argument), int(argument == "snapshot_every"))
        check_choice(self.name, "targets", self.targets, ("hard", "soft"))
        check_value(self.name, "temperature", self.temperature, 1e-6)
        check_choice(self.name, "network", self.network, NETWORKS)
        check_choice(self.name, "likelihood", self.likelihood, ("auto", *LIKELIHOODS))
        check_choice(self.name, "forward", self.forward, FORWARDS)
        check_value(self.name, "lr", self.lr)
        check_count(self.name, "latent", self.latent, 1)
        check_count(self.name, "generator_steps", self.generator_steps, 1)
        if not self.hidden:
            raise UsageError(f"{self.name}: hidden is empty; give the width of one layer at least")
        for width in self.hidden:
            check_count(self.name, "hidden", width, 1)
        if self.snapshot_every is not None:
            vars(self)["needs_boundaries"] = False  # of this object, whatever the class declares

    def has(self, hook: str) -> bool:
        return super().has(hook) and 0 not in (self.ratio, self.batch_size)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.maker = InputGenerator(
            learner,
            derive(learner.seed, "method", self.name, "inputs"),
            network=self.network,
            hidden=self.hidden,
            latent=self.latent,
            likelihood=self.likelihood,
            lr=self.lr,
            per_value=self.per_value,
        )
        self.old_model: dict[str, Tensor] | None = None
        self.blocks: list[list[int]] = []
        self.past: list[int] = []
        self.labels: list[int] = []
        self.generation = 1
        self.checked = False
        self._drawn: tuple[Tensor, Tensor] | None = None
        self._masks: Tensor | None = None

    # -- the frozen generation --------------------------------------------------------------------------------------

    def begin_task(self, task: Task) -> None:
        self.checked = False
        if self.maker.vae is not None and self.snapshot_every is None:
            self._freeze(task.index)

    def _freeze(self, current: int | None) -> None:
        """Copy generator and model: what they know is replayed from here on."""
        learner = self.learner
        self.maker.grow(learner.classes.width)
        self.maker.freeze(self.reset_optimizer)
        self.old_model = frozen_copy(learner.parameters.module)
        by_task = {index: list(c) for index, c in learner.classes.by_task.items() if index != current}
        self.past = list(by_task)
        if learner.scenario == "task":
            self.blocks = list(by_task.values())
        else:
            self.blocks = [sorted({*self.labels, *(c for block in by_task.values() for c in block)})]
        self.generation += 1
        self._masks = None

    def _mask(self, width: int) -> Tensor:
        """Which columns the old model is asked for: boolean [blocks, width], one block or one a past task."""
        if self._masks is None or self._masks.shape[1] != width:
            masks = torch.zeros(len(self.blocks), width, dtype=torch.bool)
            for mask, block in zip(masks, self.blocks, strict=True):
                mask[block or slice(None)] = True
            self._masks = masks.to(self.learner.device)
        return self._masks

    # -- replay -----------------------------------------------------------------------------------------------------

    def on_batch(self, batch: Batch) -> Batch:
        self._drawn = None
        count = draw_size(batch, self.batch_size, self.ratio)
        if self.old_model is None or not count:
            return batch
        x, y, tasks, answers = self._replayed(count)
        self._drawn = x, y
        # Scored in `loss`: soft targets, and where one row has a label for every past task.
        aside = self.targets == "soft" or (self.learner.scenario == "task" and tasks is None)
        now = replace(batch.now, share=1 / self.generation)
        return batch.with_sources(now, *batch.sources[1:]).add(
            "generated",
            x,
            y,
            share=0.0 if aside else 1 - 1 / self.generation,
            separate=self.forward == "separate",
            prepared=True,
            tasks=tasks,
            extras={"answers": answers} if aside else {},
        )

    @torch.no_grad()
    def _replayed(self, count: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Inputs, labels, tasks (where a row has one) and the old model's outputs (where they are asked for)."""
        choosing = self.balanced and not self.conditional
        drawn = count * CANDIDATES if choosing else count
        y = self._old_labels(drawn) if self.conditional else None
        tasks = self._old_tasks(drawn, y)
        x = self.maker.draw(drawn, y)
        self.learner.passes["forward_rows"] += drawn
        answers = None
        if y is None or self.targets == "soft":
            answers = self._ask(x, tasks)
        if y is None:
            assert answers is not None
            y = answers.masked_fill(~self._own(answers, tasks).any(0), float("-inf")).argmax(1)
        if choosing:
            kept = evenly(y, count)
            x, y = x.index_select(0, kept), y.index_select(0, kept)
            tasks, answers = (None if v is None else v.index_select(0, kept) for v in (tasks, answers))
        return x, y, tasks, answers

    def _own(self, answers: Tensor, tasks: Tensor | None) -> Tensor:
        """The columns in which rows are scored: boolean [blocks or 1, rows or 1, width]."""
        if tasks is None:
            return self._mask(answers.shape[1])[:, None]
        return self.learner.classes.mask(tasks, answers.shape[1])[None]

    def _old_labels(self, count: int) -> Tensor:
        """Labels of old classes, each equally often but for the remainder, which is drawn."""
        old = torch.tensor(sorted({column for block in self.blocks for column in block}))
        order = torch.randperm(len(old), generator=self.generator)
        return old[order[torch.arange(count) % len(old)]].to(self.learner.device)

    def _old_tasks(self, count: int, y: Tensor | None) -> Tensor | None:
        """The task of every row, where it has one; None where all past tasks score it."""
        learner = self.learner
        if learner.scenario != "task" or (y is None and not learner.forward.depends_on_task):
            return None
        if y is not None:
            table = torch.zeros(learner.classes.width, dtype=torch.int64)
            for task, columns in zip(self.past, self.blocks, strict=True):
                table[columns] = task
            return table.to(y.device)[y]
        first = int(torch.randint(len(self.past), (), generator=self.generator))
        return torch.tensor(self.past)[(torch.arange(count) + first) % len(self.past)].to(learner.device)

    def _ask(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        """The old model's raw outputs [rows, columns]."""
        learner = self.learner
        module = learner.parameters.module

        def run(*args: Any, **kwargs: Any) -> Any:
            return functional_call(module, self.old_model or {}, args, kwargs)

        asked = Batch((Source("generated", x, None, prepared=True, tasks=tasks),))
        with eval_mode(module):
            answers = learner.forward.batch(asked, learner.shown_task, run)
        learner.passes["forward_rows"] += len(x)
        return answers

    # -- what the model learns from them ------------------------------------------------------------------------------

    def loss(self, batch: Batch, outputs: Tensor) -> Tensor | None:
        source = batch.find("generated")
        if source is None or "answers" not in source.extras:
            return None
        ours, answers = batch.part("generated", outputs), source.extras["answers"]
        # A head that has grown since answers for columns that the old model did not have: nothing is known of them.
        answers = F.pad(answers, (0, ours.shape[1] - answers.shape[1]))
        weight = 1 - 1 / self.generation
        if self.targets == "hard":
            terms = [self._hard(batch, source, ours, answers, columns) for columns in self._mask(answers.shape[1])]
            return torch.stack(terms).mean() * weight
        own = self._own(answers, source.tasks)
        scored = own if self.learner.scenario == "task" else self._scored(own)
        values = [divergence(ours, answers, self.temperature, to, among) for to, among in zip(own, scored, strict=True)]
        factor = self.temperature**2 if self.rescale else 1.0
        return batch.mean("generated", torch.stack(values).mean(0)) * (weight * factor)

    def _hard(self, batch: Batch, source: Source, ours: Tensor, answers: Tensor, columns: Tensor) -> Tensor:
        """The main loss of generated rows on one past task's columns."""
        labels = answers.masked_fill(~columns, float("-inf")).argmax(1)
        one = replace(source, y=labels, share=None, allowed=columns[None], extras={})
        return self.learner.criterion(ours, Batch((one,), pooled=source.whole), self.learner.allowed)

    def _scored(self, own: Tensor) -> Tensor:
        """The columns among which a soft target is spread: those of the main loss, of which new classes have none."""
        columns = self.learner.loss_columns()
        if columns is None:
            return torch.ones_like(own)
        scored = own.clone()
        scored[..., columns] = True
        return scored

    # -- what the generator learns ------------------------------------------------------------------------------------

    def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
        learner = self.learner
        x, y = learner.forward.inputs(batch.now.x), batch.now.y
        # On a GPU each look at the values would have to be waited for.
        if not self.checked or y.device.type == "cpu":
            self._check(x, y)
        if self.maker.vae is None:
            columns = 0 if learner.stream is None else learner.stream.columns
            classes = max(columns, learner.classes.width, int(y.max()) + 1) if self.conditional else 0
            self.maker.build(x, classes)
        if learner.task is None or not learner.task.classes:
            self.labels = sorted({*self.labels, *torch.unique(y).tolist()})
            self.maker.grow(self.labels[-1] + 1)
        rows = [(x, y, 1.0)]
        if self._drawn is not None:
            share = 1 / self.generation
            rows = [(x, y, share), (*self._drawn, 1 - share)]
            self._drawn = None
        for _ in range(self.generator_steps):
            self.maker.learn(rows)
        used = self.generator_steps * sum(len(x) for x, _, _ in rows)
        learner.passes["forward_rows"] += used
        learner.passes["backward_rows"] += used
        if self.snapshot_every is not None and learner.passes["steps"] % self.snapshot_every == 0:
            self._freeze(None)

    def _check(self, x: Any, y: Any) -> None:
        """Refuse what cannot be generated or labelled: at every step, on a GPU once a task."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise DataError(f"{self.name} generates inputs that are one tensor of real numbers, not {kind}; use replay")
        if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point():
            raise DataError(
                f"{self.name} labels what it generates with classes, but these targets are none; use replay"
            )
        self.maker.check(x)
        self.checked = True

    # -- what there is to see -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def pictures(self) -> Tensor | None:
        vae, learner = self.maker.vae, self.learner
        if vae is None or len(vae.shape) != 3 or vae.shape[0] not in (1, 3):
            return None
        draw = generator(learner.seed, "method", self.name, "pictures", self.generation)
        y = None
        if self.conditional:
            seen = torch.tensor(learner.classes.seen or self.labels)
            y = seen[torch.arange(PICTURES) * len(seen) // PICTURES].to(learner.device)
        images = self.maker.show(draw, PICTURES, y)
        if y is None and not learner.forward.activators:
            # In the order of their classes it is plain to see which are still there.
            with eval_mode(learner.model):
                shown = Batch((Source("pictures", images, None, prepared=True),))
                found = learner.classes.argmax(learner.forward.batch(shown, None))
            learner.forward.activate(learner.shown_task)
            images = images[found.argsort(stable=True)]
        if vae.decoder.log_variance is not None:
            low, high = images.aminmax()
            images = (images - low) / (high - low).clamp_min(torch.finfo(images.dtype).tiny)
        return images


def divergence(ours: Tensor, theirs: Tensor, temperature: float, known: Tensor, scored: Tensor) -> Tensor:
    """KL divergence [rows] of softmax(theirs / T) over the columns `known` from softmax(ours / T) over those `scored`.

    The masks are boolean [rows or 1, columns]; a column that is scored and not known has target 0.
    """
    low = float("-inf")
    p = (theirs.masked_fill(~known, low) / temperature).softmax(1)
    log_q = (ours.masked_fill(~scored, low) / temperature).log_softmax(1).masked_fill(~known, 0.0)
    return (torch.xlogy(p, p) - p * log_q).sum(1)


def evenly(labels: Tensor, count: int) -> Tensor:
    """Indices of `count` of the labels [n], int64, with as many of each class as there are, the first ones first.

    >>> evenly(torch.tensor([4, 4, 4, 4, 7]), 3).sort().values
    tensor([0, 1, 4])
    """
    order = labels.argsort(stable=True)
    ordered = labels[order]
    place = torch.arange(len(labels), device=labels.device)
    first = torch.searchsorted(ordered, ordered)
    among_its_class = torch.empty_like(place).scatter_(0, order, place - first)
    return among_its_class.argsort(stable=True)[:count]
