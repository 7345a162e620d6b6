"""Running statistics for methods whose own passes are at weights that are not kept, or of single rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from perdure.methods.projection import private_dropout
from perdure.methods.side_passes import running_statistics

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner


def learn_statistics(learner: Learner, batch: Batch) -> None:
    """One training pass at the present weights, for running statistics alone; none where no layer keeps any.

    Dropout draws from the step's numbers put aside: the rest of the step is the same with this pass and without it.
    """
    with running_statistics(learner.model) as any_layer:
        pass
    if any_layer:
        with torch.no_grad(), private_dropout(learner.model, learner.device):
            learner.forward.batch(batch, learner.shown_task)
        learner.passes["forward_rows"] += batch.size
