"""L2 anchor: every weight is pulled back to where the last task left it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perdure.methods.base import check_choice
from perdure.methods.quadratic import AnchoredPenalty
from perdure.registry import register

if TYPE_CHECKING:
    from perdure.streams.task import Task


@register("l2")
@dataclass
class L2(AnchoredPenalty):
    """Pull every weight back to where the last task left it.

    loss += strength / 2 * ||theta - anchor||^2, theta and anchor of shape [P].

    Parameters
    ----------
    mode
        "last": the anchor is the end of the last task. "all": one term a task (their mean is the anchor).
    strength, solver, exclude
        See `AnchoredPenalty`.
    """

    mode: str = "last"

    summary: ClassVar[str] = "anchor every weight where the last task left it"
    paper: ClassVar[str] = "classical baseline; no single source"
    use_when: ClassVar[str] = "a baseline to beat: it treats every weight alike"
    cost: ClassVar[str] = "time: one vector operation a step; memory: 2 P"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "mode", self.mode, ("last", "all"))

    def end_task(self, task: Task) -> None:
        theta = self.parameters.theta
        ones = self.parameters.pack({}, fill=1.0)
        if self.mode == "all":
            self.absorb(ones, theta)
        else:
            self.replace(ones, theta.clone())
