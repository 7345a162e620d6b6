"""Elastic Weight Consolidation: weights that the old tasks depend on are pulled back harder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from perdure.methods.base import check_choice
from perdure.methods.fisher import ESTIMATORS, diagonal_fisher
from perdure.methods.measured import MeasuredPenalty
from perdure.registry import register


@register("ewc")
@dataclass
class EWC(MeasuredPenalty):
    """Pull weights back in proportion to their Fisher information on the old tasks.

    loss += strength / 2 * sum_k sum_i F_k,i (theta_i - theta_k,i)^2, where F_k,i is the mean over the samples of task
    k of the squared derivative of log p(y|x) with respect to weight i, taken sample by sample.

    Kirkpatrick et al. 2017, arXiv 1612.00796; online form: Schwarz et al. 2018, arXiv 1805.06370.

    Parameters
    ----------
    strength
        Factor of the penalty (it counts half). 1000 is a place to start; tune it.
    fisher
        "rademacher" (unbiased, one backward pass), "exact" (one a class), "sample" (a drawn label), "empirical" (the
        true label) or "predicted". They differ by orders of magnitude on a converged network.
    mode, gamma, n_samples, normalise
        See `MeasuredPenalty`.
    solver, exclude
        See `AnchoredPenalty`.
    """

    strength: float = 1000.0
    fisher: str = "rademacher"

    summary: ClassVar[str] = "pull weights back in proportion to their Fisher information on old tasks"
    paper: ClassVar[str] = "Kirkpatrick et al. 2017, arXiv 1612.00796"
    use_when: ClassVar[str] = (
        "no old data may be kept and the task is known at test time, or inputs change under fixed labels; alone it "
        "fails on class-incremental streams"
    )
    cost: ClassVar[str] = "time: one vector operation a step, one pass over the task at its end; memory: 2 P"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "fisher", self.fisher, tuple(ESTIMATORS))

    def measure(
        self,
        batches: Iterable[tuple[Any, Tensor]],
        columns: slice | Tensor | None,
        names: Mapping[str, nn.Parameter],
    ) -> dict[str, Tensor]:
        return diagonal_fisher(
            self.parameters.module,
            batches,
            estimator=self.fisher,
            samples=self.n_samples,
            columns=columns,
            generator=self.generator,
            names=names,
        )
