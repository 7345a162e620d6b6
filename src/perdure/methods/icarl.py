"""iCaRL: exemplars by herding, distillation by sigmoids, and prediction by the nearest mean of exemplars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.batch import joined_targets
from perdure.criterion import Criterion
from perdure.data.examples import Examples
from perdure.errors import UsageError
from perdure.methods.base import check_choice, check_value
from perdure.methods.exemplar_lists import ExemplarMethod
from perdure.methods.frozen import Tensors, frozen_copy, run_frozen
from perdure.registry import register
from perdure.tree import tree_map

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner
    from perdure.streams.task import Task


@register("icarl")
@dataclass
class ICaRL(ExemplarMethod):
    """Learn features with exemplars of old classes and old answers; classify by the nearest mean of exemplars.

    loss <- mean binary cross-entropy over the outputs of all classes seen; the targets are one-hot for the task's
    classes and sigmoid(z_old / T) for older ones, exemplars included, with z_old from the model before the task. The
    task's data and all exemplars are one training set.

    prediction <- argmin over classes of ||phi(x) - mu_y||, with phi the features of length 1 and mu_y the mean of class
    y's exemplars, of length 1 again. The means follow the network. A class of the open task, which has no exemplars
    yet, has the mean of its training rows.

    Rebuffi et al. 2017, arXiv 1611.07725.

    Parameters
    ----------
    capacity
        Exemplars kept in total, capacity // classes of each; 0 switches the method off. None with `per_class`.
    per_class
        Exemplars kept of every class, however many classes there are.
    temperature
        T of the old targets.
    reduce
        Over the classes of a row: "mean" or "sum".
    normalise
        Whether features and means have length 1, in herding and in prediction.
    selection
        "herding", or "random": a uniform sample of each class, in random order, so that a smaller quota is one too.
    layer
        Name of the layer whose input are the features; by default what the model's method `features` gives, else the
        input of its last linear layer.
    use
        "both"; "prediction": the main loss and the task's data stay as they are, and only the nearest mean predicts;
        "training": the largest output predicts, to see what the nearest mean adds.
    cast_exemplars
        Train on almost black exemplars, as the code behind a published table does by mistake: to reproduce it, and for
        nothing else.
    """

    capacity: int | None = 2000
    per_class: int | None = None
    temperature: float = 1.0
    reduce: str = "mean"
    normalise: bool = True
    selection: str = "herding"
    layer: str | None = None
    use: str = "both"
    cast_exemplars: bool = False

    summary: ClassVar[str] = "exemplars by herding, distillation, and the nearest mean of exemplars as classifier"
    paper: ClassVar[str] = "Rebuffi et al. 2017, arXiv 1611.07725"
    use_when: ClassVar[str] = "new classes come unnamed and in tasks, and some examples of each may be kept"
    cost: ClassVar[str] = (
        "time: one more forward pass a step, and a pass over the data at a task's end; memory: M D + P"
    )
    scenarios: ClassVar[frozenset[str]] = frozenset({"task", "class"})
    owns: ClassVar[tuple[str, ...]] = ("criterion", "predict", "training_data")
    transient: ClassVar[tuple[str, ...]] = ("_own", "_means")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value(self.name, "temperature", self.temperature, 1e-6)
        check_choice(self.name, "reduce", self.reduce, ("mean", "sum"))
        check_choice(self.name, "selection", self.selection, ("herding", "random"))
        check_choice(self.name, "use", self.use, ("both", "training", "prediction"))

    def has(self, hook: str) -> bool:
        left_out = {"training": ("predict",), "prediction": ("criterion",)}.get(self.use, ())
        return super().has(hook) and hook not in left_out

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.teacher: Tensors | None = None
        self.old: list[int] = []
        self._own: Examples | None = None
        self._means: tuple[object, list[int], Tensor] | None = None

    # -- training -------------------------------------------------------------------------------------------------

    def training_data(self, task: Task) -> Task:
        self._own = self.own_data(task)
        if self.use == "prediction":
            return task
        kept = self.exemplars.examples()
        if kept is not None and self.cast_exemplars:
            kept = Examples(tree_map(almost_black, kept.x), kept.targets)
        return self.joined(task, self._own, kept)

    def begin_task(self, task: Task) -> None:
        if self.use != "prediction" and self.learner.tasks_begun > 1:
            self.teacher = frozen_copy(self.parameters.module)
        self.old = sorted(set(self.learner.classes.seen) - set(task.classes))

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return BY_ROW(self._row_losses(outputs, batch), batch, lambda source, width: None)

    def _row_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Binary cross-entropy of every row [rows] over the classes seen."""
        targets = self.targets(batch, outputs)
        columns = self.learner.classes.index(self.learner.classes.seen)
        values = F.binary_cross_entropy_with_logits(outputs[:, columns], targets[:, columns], reduction="none")
        return values.mean(1) if self.reduce == "mean" else values.sum(1)

    @torch.no_grad()
    def targets(self, batch: Batch, outputs: Tensor) -> Tensor:
        """What the outputs [rows, columns] should be after a sigmoid."""
        targets = torch.zeros_like(outputs).scatter_(1, joined_targets(batch.sources)[:, None], 1.0)
        if self.teacher is None or not self.old:
            return targets
        forward = self.learner.forward
        answers = run_frozen(self.learner, self.teacher, forward.inputs(*forward.joined(batch.sources)))
        self.learner.passes["forward_rows"] += len(answers)
        columns = self.learner.classes.index(self.old)
        targets[:, columns] = torch.sigmoid(answers[:, columns] / self.temperature).to(targets.dtype)
        return targets

    def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
        self._means = None

    def end_task(self, task: Task) -> None:
        if self._own is None:
            raise UsageError(f"icarl: task '{task.name}' began without its data; call begin_task(name, data, classes)")
        self.choose_exemplars(self._own)
        self._own, self._means = None, None

    # -- prediction -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, x: Any, task: int | None) -> Tensor:
        classes = self.learner.classes
        labels, means = self.class_means()
        allowed = set(labels) if task is None else set(classes.by_task.get(task, ()))
        chosen = [i for i, label in enumerate(labels) if label in allowed]
        if not chosen:
            return classes.argmax(self.learner.outputs(x, task), task)
        means = means[chosen]
        # |phi - mu|^2 without the part that is the same for all classes.
        distance = torch.addmm(means.square().sum(1), self.features(x), means.T, alpha=-2)
        return torch.tensor([labels[i] for i in chosen], device=distance.device)[distance.argmin(1)]

    def class_means(self) -> tuple[list[int], Tensor]:
        """The classes that can be predicted, and their means [classes, d] under the network as it is now."""
        now = self._fingerprint()
        if self._means is None or self._means[0] != now:
            found = {label: self.mean(self.features(x)) for label, x in self.exemplars.rows.items()}
            if self._own is not None:
                for label in sorted(set(torch.unique(self._own.targets).tolist()) - set(found)):
                    rows = (self._own.targets == label).nonzero()[:, 0]
                    found[label] = self.mean(self.features(self._own.gather(rows)[0]))
            labels = sorted(found)
            self._means = (now, labels, torch.stack([found[label] for label in labels]) if labels else torch.empty(0))
        return self._means[1:]

    def _fingerprint(self) -> object:
        """Changes whenever the weights or the running statistics do, whoever changes them."""
        module = self.parameters.module
        tensors = [self.parameters.theta, *module.parameters(), *module.buffers()]
        return [(id(tensor), tensor._version) for tensor in tensors]


BY_ROW = Criterion(lambda values, targets: values)
"""Weighs losses of single rows [rows] as the main loss of their sources."""


def almost_black(x: Tensor) -> Tensor:
    """Bytes that are scaled to [0, 1] and then cast to bytes again: 255 becomes 1, everything else 0."""
    if x.dtype != torch.uint8:
        raise UsageError(f"icarl: cast_exemplars is for images of bytes, and these are {x.dtype}; leave it out")
    return x.div(255).to(torch.uint8)
