"""WA: exemplars and distillation, and after each task output rows of new classes as long as those of old ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from perdure.errors import UsageError
from perdure.methods.distilled_exemplars import DistilledExemplars
from perdure.methods.features import output_layer
from perdure.registry import register

if TYPE_CHECKING:
    from perdure.streams.task import Task


@register("wa")
@dataclass
class WA(DistilledExemplars):
    """Train on exemplars and old answers, then give the output rows of new classes the mean length of the old ones.

    loss <- (1 - alpha) * loss + alpha * T^2 * KL(softmax(z_old / T) || softmax(z / T)), over the old columns and all
    rows, exemplars included. When a task ends, w_new <- w_new * mean ||w_old|| / mean ||w_new||: too long rows are how
    a network that saw many new and few old examples prefers new classes. Biases stay.

    Zhao et al. 2020, Maintaining Discrimination and Fairness in Class Incremental Learning, arXiv 1911.07053. The
    paper has no factor T^2 (`rescale=False`) and also keeps the output weights positive, which is not done here.

    Parameters
    ----------
    capacity, per_class, normalise, layer
        See `ICaRL`; `normalise` is for herding alone.
    alpha
        Share of the distillation; by default that of the old classes among all seen.
    temperature, rescale, replayed
        See `LwF`.
    """

    capacity: int | None = 2000
    per_class: int | None = None
    alpha: float | None = None
    temperature: float = 2.0
    rescale: bool = True
    replayed: bool = False
    normalise: bool = True
    layer: str | None = None
    reduce: str = field(default="mean", init=False, repr=False)
    columns: str = field(default="old", init=False, repr=False)

    summary: ClassVar[str] = "exemplars and distillation, then new and old output rows of equal mean length"
    paper: ClassVar[str] = "Zhao et al. 2020, arXiv 1911.07053"
    use_when: ClassVar[str] = "as icarl, where the network's own outputs should predict"
    cost: ClassVar[str] = (
        "time: one more forward pass a step, and a pass over the data at a task's end; memory: M D + P"
    )

    def training_data(self, task: Task) -> Task:
        self._own = self.own_data(task)
        return self.joined(task, self._own, self.exemplars.examples())

    def end_task(self, task: Task) -> None:
        if self._own is None:
            raise UsageError(f"wa: task '{task.name}' began without its data; call begin_task(name, data, classes)")
        new = sorted(set(task.classes) - set(self.old))
        if self.teacher is not None and self.old and new:
            align(output_layer(self.learner).weight, self.old, new)
        self.choose_exemplars(self._own)
        self._own = None


@torch.no_grad()
def align(weight: Tensor, old: Sequence[int], new: Sequence[int]) -> None:
    """Scale the rows `new` of `weight` [classes, d], in place, so that their mean length is that of the rows `old`.

    >>> weight = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    >>> align(weight, [0], [1])
    >>> weight.tolist()
    [[3.0, 4.0], [3.0, 4.0]]
    """
    lengths = weight.norm(dim=1)
    rows = torch.tensor(list(new), device=weight.device)
    factor = lengths[list(old)].mean() / lengths[rows].mean()
    weight[rows] = weight[rows] * torch.where(factor.isfinite(), factor, 1.0)
