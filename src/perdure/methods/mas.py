"""Memory Aware Synapses: weights that the outputs are sensitive to are pulled back harder; no labels are needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perdure.methods.measured import MeasuredPenalty
from perdure.methods.per_sample import Cotangents, mean_over_samples
from perdure.registry import register


@register("mas")
@dataclass
class MAS(MeasuredPenalty):
    """Pull weights back in proportion to how much the model's outputs depend on them.

    At a task's end: Omega_i += mean over its samples of |d ||f(x)||^2 / d theta_i|, with the raw outputs f over the
    columns of the training loss, taken sample by sample; loss += strength / 2 * sum Omega (theta - anchor)^2, so
    strength is 2 lambda of the paper.

    Aljundi et al. 2018, arXiv 1711.09601. Its published code takes the absolute value of a batch's summed gradient, in
    which signs cancel and importances depend on the batch size.

    Parameters
    ----------
    strength
        Factor of the penalty (it counts half): twice the paper's lambda.
    mode, gamma, n_samples, normalise
        See `MeasuredPenalty`. "online" (one anchor, where the last task ended) is the paper's.
    solver, exclude
        See `AnchoredPenalty`.
    """

    strength: float = 2.0
    mode: str = "online"

    summary: ClassVar[str] = "pull weights back in proportion to how much the outputs depend on them"
    paper: ClassVar[str] = "Aljundi et al. 2018, arXiv 1711.09601"
    use_when: ClassVar[str] = "like EWC, where labels are missing or the importance should follow the data in use"
    cost: ClassVar[str] = "time: one vector operation a step, one pass over the task at its end; memory: 2 P"

    def measure(
        self,
        batches: Iterable[tuple[Any, Tensor]],
        columns: slice | Tensor | None,
        names: Mapping[str, nn.Parameter],
    ) -> dict[str, Tensor]:
        return output_sensitivity(self.parameters.module, batches, samples=self.n_samples, columns=columns, names=names)


def output_sensitivity(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    *,
    samples: int | None = None,
    columns: slice | Tensor | None = None,
    names: Mapping[str, nn.Parameter],
) -> dict[str, Tensor]:
    """The mean over samples of the absolute gradient of the squared norm of a sample's outputs.

    The model is left as it was, and the size of the batches does not change the result.

    Parameters
    ----------
    model
        Maps x to outputs [n, ..., columns]. What a head did not write (-inf) does not count.
    batches
        (x, y) pairs, ready for the model; y is not used.
    samples
        Use exactly so many samples (all by default).
    columns
        The active class columns (a slice or an index tensor); all by default.
    names
        The parameters wanted, by name.

    Returns
    -------
    dict
        One float32 tensor a name, of the parameter's shape.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.fill_(1.0)
    >>> found = output_sensitivity(model, [(torch.tensor([[3.0, -1.0]]), torch.zeros(1))], names={"w": model.weight})
    >>> found["w"].tolist()  # |2 f x| with f = 2
    [[12.0, 4.0]]
    """

    def cotangents(outputs: Tensor, y: Tensor) -> Cotangents:
        slope = 2 * outputs.masked_fill(outputs == float("-inf"), 0)
        if columns is None:
            return [slope]
        chosen = torch.zeros(slope.shape[-1], dtype=torch.bool, device=slope.device)
        chosen[columns] = True
        return [slope.masked_fill(~chosen, 0)]

    return mean_over_samples(model, batches, cotangents, names=names, samples=samples, size=torch.abs)
