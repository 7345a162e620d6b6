"""Knowledge distillation with one number that divides the loss between the new task and the old model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perdure.methods.base import check_value
from perdure.methods.distillation import SnapshotDistillation, scale_shares
from perdure.registry import register

if TYPE_CHECKING:
    from perdure.batch import Batch


@register("kd")
@dataclass
class KD(SnapshotDistillation):
    """Divide the loss between the task and the answers of the model as it was before the task.

    loss <- (1 - alpha) * loss + alpha * T^2 * KL(softmax(z_old / T) || softmax(z / T)), from the second task on; a
    higher alpha keeps more of the old answers. The columns of z_old are those of `LwF`, which is the same method with a
    main loss of weight 1: an alpha of a is a strength of a / (1 - a) and a learning rate smaller by the factor 1 - a.

    Hinton et al. 2015, arXiv 1503.02531; as continual learning: Li and Hoiem 2016, arXiv 1606.09282.

    Parameters
    ----------
    alpha
        Weight of the distillation, 0 to 1; 0 switches the method off, 1 leaves nothing of the task's own loss (nor of
        the loss of remembered rows).
    temperature, reduce, rescale, columns, replayed
        See `LwF`.
    """

    alpha: float = 0.5
    temperature: float = 2.0
    reduce: str = "mean"
    rescale: bool = True
    columns: str = "old"
    replayed: bool = False

    summary: ClassVar[str] = "divide the loss between the task and the old model's answers (distillation)"
    paper: ClassVar[str] = "Hinton et al. 2015, arXiv 1503.02531"
    use_when: ClassVar[str] = "as lwf, where one number should say how much of the loss is the past's"
    cost: ClassVar[str] = "time: one more forward pass a step; memory: P"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value(self.name, "alpha", self.alpha, 0, 1)

    @property
    def weight(self) -> float:
        return self.alpha

    def on_batch(self, batch: Batch) -> Batch:
        batch = super().on_batch(batch)
        return batch if self.teacher is None else scale_shares(batch, 1 - self.alpha)
