"""What the wrappers of EWC, L2 and SI share: the penalty as a number, and as a loss for loops written by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from perdure.continual.wrapper import Wrapper
from perdure.methods.quadratic import AnchoredPenalty


class PenaltyWrapper(Wrapper):
    """A wrapper whose method pulls weights back: `importance / 2 * sum S (theta - mu)^2`."""

    method: AnchoredPenalty

    def _penalty_loss(self) -> Tensor:
        """The penalty as a scalar that can be added to a loss and differentiated; 0 before the first task ends.

        `train_step` adds the same gradient without a graph, so a loop that calls it must not add this.
        """
        self._follow(at_boundary=False)
        method, parameters = self.method, self.learner.parameters
        if method.importance is None or method.anchor is None or not method.strength:
            return nothing(parameters.theta)
        importance, anchor = parameters.views(method.importance), parameters.views(method.anchor)
        terms = [(importance[n] * (p - anchor[n]) ** 2).sum() for n, p in parameters.members.items()]
        return method.strength * (0.5 * torch.stack(terms).sum() + method.constant)

    @torch.no_grad()
    def _added_loss(self) -> Tensor | None:
        method = self.method
        if method.importance is None or method.anchor is None or not method.strength:
            return None
        distance = self.learner.parameters.theta - method.anchor
        return method.strength * (0.5 * torch.dot(method.importance * distance, distance) + method.constant)

    def _optimizer_changed(self) -> None:
        # A task may have ended before any optimizer was known.
        self.method.warn_if_stiff()


def nothing(like: Tensor) -> Tensor:
    """A zero that can be added to a loss, added to in place, and differentiated."""
    return torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True) * 1.0
