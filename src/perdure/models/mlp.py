"""The multi-layer perceptron of most small benchmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.models.heads import make_head
from perdure.models.layers import linear, private_generator, xavier
from perdure.registry import models


class MLP(nn.Module):
    """Linear layers with ReLU between them, and a head.

    Parameters
    ----------
    inputs
        Values of one example, after flattening.
    hidden
        Widths of the hidden layers; none gives a linear model.
    outputs
        Class columns.
    head
        "wide" (default), "growing", "multi", "cosine", or a module that maps [n, hidden[-1]] to logits.
    init
        "torch" (default), or "xavier": Xavier-uniform weights and zero biases, as some published results want.
    seed
        Draw the weights from a private generator; None uses torch's global one. A wide head gets the same bits as after
        `torch.manual_seed(seed)`.

    >>> import torch
    >>> MLP(4, [8, 8], 3)(torch.zeros(2, 1, 2, 2)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        head: str | nn.Module | None = None,
        init: str = "torch",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if init not in ("torch", "xavier"):
            raise UsageError(f"MLP init is '{init}', it must be torch or xavier")
        if min([inputs, *hidden], default=1) < 1:
            raise UsageError(f"MLP has widths {[inputs, *hidden]}, each must be at least 1")
        generator = private_generator(seed)
        widths = [inputs, *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [linear(before, after, generator), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = make_head(head, widths[-1], outputs, generator)
        if init == "xavier":
            xavier(self, generator)

    def features(self, x: Tensor) -> Tensor:
        """What the head sees: [n, hidden[-1]]."""
        features: Tensor = self.body(x.flatten(1))
        return features

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


@models.register("mlp")
def mlp(
    *,
    input_shape: Sequence[int],
    outputs: int,
    seed: int | None = None,
    hidden: Sequence[int] = (400, 400),
    head: str = "wide",
    init: str = "torch",
) -> nn.Module:
    """Multi-layer perceptron with ReLU.

    >>> mlp(input_shape=(1, 28, 28), outputs=10, seed=0).head
    Linear(in_features=400, out_features=10, bias=True)
    """
    return MLP(math.prod(input_shape), hidden, outputs, head=head, init=init, seed=seed)
