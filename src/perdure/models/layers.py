"""Layers with torch's default initialisation, drawn from a private generator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def private_generator(seed: int | None) -> torch.Generator | None:
    """A CPU generator, or None: torch's global one. A model built with it has the bits of `torch.manual_seed(seed)`."""
    return None if seed is None else torch.Generator().manual_seed(seed)


def linear(inputs: int, outputs: int, generator: torch.Generator | None = None) -> nn.Linear:
    """`nn.Linear(inputs, outputs)`, initialised from `generator`."""
    if generator is None:
        return nn.Linear(inputs, outputs)
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    initialise(layer.weight, layer.bias, generator)
    return layer


def convolution(inputs: int, outputs: int, size: int, generator: torch.Generator | None, **options: Any) -> nn.Conv2d:
    """`nn.Conv2d(inputs, outputs, size, **options)`, initialised from `generator`."""
    if generator is None:
        return nn.Conv2d(inputs, outputs, size, **options)
    layer = nn.Conv2d(inputs, outputs, size, device="meta", **options).to_empty(device="cpu")
    initialise(layer.weight, layer.bias, generator)
    return layer


def initialise(weight: torch.Tensor, bias: torch.Tensor | None, generator: torch.Generator) -> None:
    """Torch's default law of Linear and Conv2d: uniform, bounded by 1 / sqrt(fan in)."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    if bias is not None:
        bound = 1 / math.sqrt(weight[0].numel())
        nn.init.uniform_(bias, -bound, bound, generator=generator)


def xavier(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Xavier-uniform weights (gain 1) and zero biases in every Linear and Conv2d that has rows."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.numel():
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
