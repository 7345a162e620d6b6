"""Learning without Forgetting: the new model keeps the old model's answers on the new inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from perdure.methods.base import check_value
from perdure.methods.distillation import SnapshotDistillation
from perdure.registry import register


@register("lwf")
@dataclass
class LwF(SnapshotDistillation):
    """Distil the model as it was before the task, on the task's own inputs and the old classes.

    loss += strength * T^2 * KL(softmax(z_old / T) || softmax(z / T)), mean over the current rows; z_old are the
    teacher's outputs over the old columns: one block a past task in the task-incremental scenario, one block in all
    otherwise.

    Li and Hoiem 2016, arXiv 1606.09282; distillation: Hinton et al. 2015, arXiv 1503.02531.

    Parameters
    ----------
    strength
        Weight of the term, beside a main loss of weight 1. (`KD` has one number for both.)
    temperature
        T: flattens both distributions.
    reduce
        Over past tasks in the task-incremental scenario: "mean" or "sum".
    rescale
        Whether the factor T^2 is there, which keeps the gradient's size comparable for every T.
    columns
        Outside that scenario: "old", or "all" that the teacher has, also those of classes that had not come.
    replayed
        Whether remembered rows of other methods (replay, der, ...) are distilled too; the mean is then over all rows.
    """

    strength: float = 1.0
    temperature: float = 2.0
    reduce: str = "mean"
    rescale: bool = True
    columns: str = "old"
    replayed: bool = False

    summary: ClassVar[str] = "keep the old model's answers on new inputs (distillation)"
    paper: ClassVar[str] = "Li and Hoiem 2016, arXiv 1606.09282"
    use_when: ClassVar[str] = (
        "no old data may be kept and new inputs resemble old ones; weak alone on class-incremental streams"
    )
    cost: ClassVar[str] = "time: one more forward pass a step; memory: P"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value(self.name, "strength", self.strength)

    @property
    def weight(self) -> float:
        return self.strength
