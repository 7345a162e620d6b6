"""The factor on losses under float16, for gradients that a method takes beside the learner's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perdure.parameters import average_over_processes

if TYPE_CHECKING:
    from perdure.learner import Learner


def loss_scale(learner: Learner) -> Tensor | None:
    """The factor on losses under float16, on the device: reading it would wait for the device."""
    return None if learner.scaler is None else learner.scaler.scale(torch.ones((), device=learner.device))


def finish_gradients(learner: Learner, gradients: Sequence[Tensor], scale: Tensor | None) -> None:
    """From gradients of a loss times `scale` to those of the loss, mean over all processes, in place.

    If any overflowed, all become zero and the loss scale is lowered, as it is where current rows overflow: the step is
    one without them, and the next attempt has more room. It is not lowered below 1 for their sake, since a pass that
    overflows by itself would else leave nothing of the current rows' gradients.
    """
    for gradient in gradients:
        average_over_processes(learner.model, gradient if scale is None else gradient.div_(scale))
    if scale is None or not gradients:
        return
    assert learner.scaler is not None
    finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
    for gradient in gradients:
        gradient.masked_fill_(~finite, 0.0)
    lower = scale * learner.scaler.get_backoff_factor()
    learner.scaler.update(torch.where(finite | (scale <= 1), scale, lower))
