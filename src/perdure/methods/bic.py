"""BiC: exemplars and distillation, and two numbers that take back the preference for the newest classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.data.joined import JoinedExamples
from perdure.errors import UsageError
from perdure.methods.base import check_value
from perdure.methods.distilled_exemplars import DistilledExemplars
from perdure.methods.frozen import Tensors
from perdure.registry import register
from perdure.seeding import generator
from perdure.tree import rows

if TYPE_CHECKING:
    from perdure.data.examples import Examples
    from perdure.learner import Learner
    from perdure.streams.task import Task


@register("bic")
@dataclass
class BiC(DistilledExemplars):
    """Train on exemplars and old answers, then correct the outputs of the newest classes by a factor and an offset.

    loss <- (1 - alpha) * loss + alpha * T^2 * KL(softmax(z_old / T) || softmax(z / T)), over the old columns and all
    rows, exemplars included. When the task ends, z_new <- a * z_new + b for its classes, with (a, b) <- argmin of the
    cross-entropy on a few rows of every class, as many of new as of old ones, that were not trained on. The old model
    whose answers are distilled is corrected, so the next one learns its correction.

    With two numbers the cross-entropy is convex; it is minimised exactly, by Newton's method.

    Wu et al. 2019, Large Scale Incremental Learning, arXiv 1905.13260.

    Parameters
    ----------
    capacity, per_class, normalise, layer
        See `ICaRL`; `normalise` is for herding alone.
    alpha
        Share of the distillation; by default that of the old classes among all seen.
    temperature, rescale, replayed
        See `LwF`.
    holdout
        Share of the exemplars that are kept from the training, and with as many new rows find the correction: at least
        one of every class. 0: none are, and nothing is corrected.
    decay
        Pull of the correction towards none: decay / 2 * ((a - 1)^2 + b^2) is added to the mean cross-entropy.
    """

    capacity: int | None = 2000
    per_class: int | None = None
    alpha: float | None = None
    temperature: float = 2.0
    rescale: bool = True
    replayed: bool = False
    holdout: float = 0.1
    decay: float = 2e-4
    normalise: bool = True
    layer: str | None = None
    reduce: str = field(default="mean", init=False, repr=False)
    columns: str = field(default="old", init=False, repr=False)

    summary: ClassVar[str] = "exemplars and distillation, then a correction of the newest classes' outputs"
    paper: ClassVar[str] = "Wu et al. 2019, arXiv 1905.13260"
    use_when: ClassVar[str] = "as icarl, where the network's own outputs should predict and there are many exemplars"
    cost: ClassVar[str] = (
        "time: one more forward pass a step, and a pass over the data at a task's end; memory: M D + P"
    )
    owns: ClassVar[tuple[str, ...]] = ("training_data", "predict")
    transient: ClassVar[tuple[str, ...]] = ("_own", "_rows", "_held_out")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value(self.name, "holdout", self.holdout, 0, 0.9)
        check_value(self.name, "decay", self.decay, 1e-12)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.correction = Correction()
        self.taught = Correction()
        self._held_out: Examples | None = None

    # -- training -------------------------------------------------------------------------------------------------

    def training_data(self, task: Task) -> Task:
        own = self._own = self.own_data(task)
        self._held_out = None
        if not len(self.exemplars) or not self.holdout:
            return self.joined(task, own, self.exemplars.examples())
        per_class = min(rows(x) for x in self.exemplars.rows.values())
        count = max(1, round(self.holdout * per_class))
        if count >= per_class:
            raise UsageError(
                f"bic: {per_class} exemplars a class cannot be divided between training and correction; give a larger "
                "capacity"
            )
        trained, held = {}, {}
        for label, x in self.exemplars.rows.items():
            held[label], trained[label] = self._divided(rows(x), count, task, label)
        kept, away = [], []
        for label in torch.unique(own.targets).tolist():
            of_class = (own.targets == label).nonzero()[:, 0]
            first, rest = self._divided(len(of_class), min(count, len(of_class) - 1), task, label)
            away.append(of_class[first])
            kept.append(of_class[rest])
        old = self.exemplars.examples(held)
        assert old is not None
        self._held_out = JoinedExamples([own.subset(torch.cat(away)), old])
        return self.joined(task, own.subset(torch.cat(kept).sort().values), self.exemplars.examples(trained))

    def _divided(self, size: int, count: int, task: Task, label: int) -> tuple[Tensor, Tensor]:
        """`count` rows of `size` at random, and the others; the same for a run that is resumed inside the task."""
        order = torch.randperm(size, generator=generator(self.learner.seed, self.name, task.index, label))
        return order[:count].sort().values, order[count:].sort().values

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.taught, self.correction = self.correction, Correction()

    def teach(self, inputs: Any, teacher: Tensors | None = None) -> Tensor:
        return self.taught(super().teach(inputs, teacher))

    def end_task(self, task: Task) -> None:
        if self._own is None:
            raise UsageError(f"bic: task '{task.name}' began without its data; call begin_task(name, data, classes)")
        new = sorted(set(task.classes) - set(self.old))
        if self._held_out is not None and self.old and new:
            x, y = self._held_out.gather(torch.arange(len(self._held_out)))
            seen = list(self.learner.classes.seen)
            outputs = self.learner.outputs(x).double().cpu()[:, seen]
            targets = torch.tensor([seen.index(label) for label in y.tolist()])
            newest = torch.tensor([column in new for column in seen])
            self.correction = Correction(*fit_correction(outputs, targets, newest, self.decay), new)
        self.choose_exemplars(self._own)
        self._own = self._held_out = None

    # -- prediction -----------------------------------------------------------------------------------------------

    def outputs(self, x: Any, task: int | None = None) -> Tensor:
        """The corrected outputs [rows, columns] of stored rows."""
        return self.correction(self.learner.outputs(x, task))

    def predict(self, x: Any, task: int | None) -> Tensor:
        return self.learner.classes.argmax(self.outputs(x, task), task)


class Correction:
    """z -> factor * z + offset in some columns."""

    def __init__(self, factor: float = 1.0, offset: float = 0.0, columns: list[int] | None = None) -> None:
        self.factor, self.offset, self.columns = factor, offset, columns or []

    def __call__(self, outputs: Tensor) -> Tensor:
        if not self.columns:
            return outputs
        columns = torch.tensor(self.columns, device=outputs.device)
        return outputs.index_copy(1, columns, self.factor * outputs[:, columns] + self.offset)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor, self.offset = float(state["factor"]), float(state["offset"])
        self.columns = [int(column) for column in state["columns"]]


def fit_correction(outputs: Tensor, targets: Tensor, new: Tensor, decay: float) -> tuple[float, float]:
    """The (a, b) that minimise the mean cross-entropy of `outputs` [rows, columns] with a z + b in the columns `new`.

    `decay` / 2 ((a - 1)^2 + b^2) is added, so that there is one minimum even where all rows are right. Newton's method
    with halved steps, on float64.
    """
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    parts = torch.stack([outputs.masked_fill(~new, 0.0), new.double().expand_as(outputs)])  # what a and b multiply
    fixed = outputs.masked_fill(new, 0.0)

    def loss(values: Tensor) -> Tensor:
        logits = fixed + torch.einsum("k,krc->rc", values, parts)
        return F.cross_entropy(logits, targets) + decay / 2 * (values - start).square().sum()

    values = start
    for _ in range(100):
        probability = (fixed + torch.einsum("k,krc->rc", values, parts)).softmax(1)
        mean = torch.einsum("rc,krc->kr", probability, parts)
        gradient = (mean - parts.gather(2, targets.expand(2, -1)[..., None])[..., 0]).mean(1)
        gradient = gradient + decay * (values - start)
        second = torch.einsum("rc,krc,lrc->kl", probability, parts, parts) / len(targets) - mean @ mean.T / len(targets)
        step = torch.linalg.solve(second + decay * torch.eye(2, dtype=torch.float64), gradient)
        size, now = 1.0, loss(values)
        while size > 1e-10 and loss(values - size * step) > now - 1e-4 * size * (gradient @ step):
            size /= 2
        if size <= 1e-10 or float(step.abs().max()) < 1e-12:
            break
        values = values - size * step
    return float(values[0]), float(values[1])
