"""What WA and BiC share: exemplars, and a loss divided between the labels and the old model's answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from perdure.methods.base import check_value
from perdure.methods.distillation import SnapshotDistillation, scale_shares
from perdure.methods.exemplar_lists import ExemplarMethod

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.data.examples import Examples
    from perdure.learner import Learner


class DistilledExemplars(ExemplarMethod, SnapshotDistillation):
    """loss <- (1 - alpha) * loss + alpha * T^2 * KL(softmax(z_old / T) || softmax(z / T)) over the old columns.

    `alpha` is the share of old classes among those seen, if nothing else is given. Both terms are means over the task's
    rows and the exemplars.
    """

    alpha: float | None

    regulariser: ClassVar[bool] = False
    scenarios: ClassVar[frozenset[str]] = frozenset({"class"})
    owns: ClassVar[tuple[str, ...]] = ("training_data",)
    transient: ClassVar[tuple[str, ...]] = ("_own", "_rows")

    def __post_init__(self) -> None:
        ExemplarMethod.__post_init__(self)
        SnapshotDistillation.__post_init__(self)
        if self.alpha is not None:
            check_value(self.name, "alpha", self.alpha, 0, 1)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self._own: Examples | None = None

    @property
    def weight(self) -> float:
        if self.alpha is not None:
            return self.alpha
        return len(self.old) / max(1, len(self.learner.classes.seen))

    @property
    def old(self) -> list[int]:
        """The columns that the teacher knows."""
        return self.blocks[0] if self.blocks else []

    def on_batch(self, batch: Batch) -> Batch:
        batch = super().on_batch(batch)
        return batch if self.teacher is None else scale_shares(batch, 1 - self.weight)
