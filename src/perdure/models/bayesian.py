"""Layers whose every weight is a Gaussian of its own (mean field), and networks made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.errors import ModelError
from perdure.models.mlp import MLP
from perdure.registry import models
from perdure.seeding import derive
from perdure.seeding import generator as private


class MeanField(nn.Module):
    """Base of the layers: weight and bias have the law N(mean, exp(log_variance)), each entry by itself.

    In training mode every row has noise of its own: the output is drawn from its Gaussian, whose mean and variance are
    two passes of the plain layer (local reparameterisation: Kingma et al. 2015, arXiv 1506.02557). In evaluation mode
    the layer is the plain one with the means, unless `sample` has drawn weights.

    Parameters
    ----------
    weight, bias
        The means to begin with; a layer may have no bias.
    log_variance
        Of every entry to begin with.
    seed
        Of the private noise. How often it was drawn is part of the state, so a run that is resumed has the same noise.
    """

    bias_mean: nn.Parameter | None
    bias_log_variance: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None, log_variance: float, seed: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(weight.detach().clone())
        self.log_variance = nn.Parameter(torch.full_like(self.mean, log_variance))
        self.register_parameter("bias_mean", None if bias is None else nn.Parameter(bias.detach().clone()))
        spread = None if bias is None else nn.Parameter(torch.full_like(bias.detach(), log_variance))
        self.register_parameter("bias_log_variance", spread)
        self.seed, self.draws = seed, 0
        self._drawn: tuple[Tensor, Tensor | None] | None = None

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with given weights."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self._drawn is not None:
            return self.plain(x, *self._drawn)
        mean = self.plain(x, self.mean, self.bias_mean)
        if not self.training:
            return mean
        spread = None if self.bias_log_variance is None else self.bias_log_variance.exp()
        variance = self.plain(x * x, self.log_variance.exp(), spread)
        noise = private(self.seed, "noise", self.draws, device=mean.device)
        self.draws += 1
        # The root of zero has no slope: an input of zeros to a layer without a bias.
        deviation = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
        return mean + deviation * torch.randn(mean.shape, generator=noise, device=mean.device, dtype=mean.dtype)

    @torch.no_grad()
    def sample(self, noise: torch.Generator | None) -> None:
        """Draw one set of weights with a CPU generator, which every pass uses until the next; None ends it."""
        if noise is None:
            self._drawn = None
            return
        bias = None
        weight = _drawn(self.mean, self.log_variance, noise)
        if self.bias_mean is not None and self.bias_log_variance is not None:
            bias = _drawn(self.bias_mean, self.bias_log_variance, noise)
        self._drawn = weight, bias

    def gaussians(self) -> list[tuple[str, str]]:
        """Names of the means and log-variances that belong together."""
        pairs = [("mean", "log_variance")]
        return pairs if self.bias_mean is None else [*pairs, ("bias_mean", "bias_log_variance")]

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.seed, self.draws])

    def set_extra_state(self, state: Tensor) -> None:
        self.seed, self.draws = state.tolist()


def _drawn(mean: Tensor, log_variance: Tensor, noise: torch.Generator) -> Tensor:
    epsilon = torch.randn(mean.shape, generator=noise).to(mean.device, mean.dtype)
    return mean + (0.5 * log_variance).exp() * epsilon


class MeanFieldLinear(MeanField):
    """`nn.Linear` with Gaussian weights; `mean` and `log_variance` are [outputs, inputs].

    >>> layer = MeanFieldLinear.of(nn.Linear(3, 2))
    >>> layer.eval()(torch.ones(4, 3)).shape
    torch.Size([4, 2])
    """

    @classmethod
    def of(cls, layer: nn.Linear, log_variance: float = -6.0, seed: int = 0) -> MeanFieldLinear:
        """Around the weights of a plain layer."""
        return cls(layer.weight, layer.bias, log_variance, seed)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class MeanFieldConv2d(MeanField):
    """`nn.Conv2d` (padded with zeros) with Gaussian weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None, log_variance: float, seed: int, **options: Any) -> None:
        super().__init__(weight, bias, log_variance, seed)
        self.options = options

    @classmethod
    def of(cls, layer: nn.Conv2d, log_variance: float = -6.0, seed: int = 0) -> MeanFieldConv2d:
        """Around the weights of a plain layer."""
        if layer.padding_mode != "zeros":
            raise ModelError(f"a mean-field convolution pads with zeros, not '{layer.padding_mode}'")
        options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        return cls(layer.weight, layer.bias, log_variance, seed, **options)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, **self.options)


def mean_field(module: nn.Module, log_variance: float = -6.0, seed: int = 0) -> nn.Module:
    """Give every `nn.Linear` and `nn.Conv2d` of a module Gaussian weights around those that it has.

    The module is changed in place and returned (a single layer comes back as a new one). Heads that grow or belong to a
    task keep plain weights. A trained network makes a better beginning than a random one.

    Parameters
    ----------
    log_variance
        Of every weight to begin with; -6 is a standard deviation of 0.05.
    seed
        Of the private noise.

    >>> mean_field(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    Sequential(
      (0): MeanFieldLinear()
      (1): ReLU()
    )
    """
    made = _of(module, log_variance, derive(seed, "mean field", ""))
    if made is not None:
        return made
    for name, layer in list(module.named_modules()):
        for key, child in list(layer.named_children()):
            made = _of(child, log_variance, derive(seed, "mean field", f"{name}.{key}"))
            if made is not None:
                setattr(layer, key, made)
    return module


def _of(layer: nn.Module, log_variance: float, seed: int) -> nn.Module | None:
    if type(layer) is nn.Linear:
        return MeanFieldLinear.of(layer, log_variance, seed).train(layer.training)
    if type(layer) is nn.Conv2d:
        return MeanFieldConv2d.of(layer, log_variance, seed).train(layer.training)
    return None


def mean_field_layers(module: nn.Module) -> dict[str, MeanField]:
    """The layers with Gaussian weights, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, MeanField)}


def gaussian_kl(mean: Tensor, log_variance: Tensor, prior_mean: Tensor, prior_log_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_variance)) from the prior, summed over independent entries; a scalar.

    >>> one = torch.ones(1)
    >>> float(gaussian_kl(one, 0 * one, 0 * one, 0 * one))
    0.5
    """
    ratio = log_variance - prior_log_variance
    distance = (mean - prior_mean).square() * (-prior_log_variance).exp()
    return 0.5 * (ratio.expm1() - ratio + distance).sum()


@models.register("bayesian_mlp")
def bayesian_mlp(
    *,
    input_shape: Sequence[int],
    outputs: int,
    seed: int | None = None,
    hidden: Sequence[int] = (400, 400),
    head: str = "wide",
    log_variance: float = -6.0,
) -> nn.Module:
    """Multi-layer perceptron with Gaussian weights (a growing or multi head has plain ones): what `vcl` trains.

    >>> bayesian_mlp(input_shape=(8, 8), outputs=10, seed=0).head
    MeanFieldLinear()
    """
    noise = int(torch.randint(2**62, ())) if seed is None else seed
    return mean_field(MLP(math.prod(input_shape), hidden, outputs, head=head, seed=seed), log_variance, noise)
