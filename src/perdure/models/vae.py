"""Variational autoencoders: what the data look like, as a small generator of new rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.errors import UsageError
from perdure.models.layers import convolution, linear, private_generator
from perdure.models.small_cnn import image_channels
from perdure.registry import models

NETWORKS = ("mlp", "conv")
LIKELIHOODS = ("bernoulli", "gaussian")


class VAE(nn.Module):
    """An encoder q(z | x), a decoder p(x | z) and the prior z ~ N(0, I), for rows of any shape.

    Kingma and Welling 2014, arXiv 1312.6114. With `classes` it is conditional, q(z | x, y) and p(x | z, y): Sohn, Lee
    and Yan 2015.

    Parameters
    ----------
    shape
        Of one row: (features,) or (channels, height, width).
    network
        "mlp", or "conv" for images: 3 x 3 convolutions that halve the sides, and in the decoder double them again.
    hidden
        Widths of the fully connected layers of the encoder; the decoder has them in reverse.
    latent
        Size of z.
    likelihood
        "bernoulli" for values in [0, 1] (also between them: the cross-entropy), "gaussian" for any, with a variance for
        each value that is learned with the rest.
    channels
        Of the convolutions.
    classes
        Labels of a conditional model, 0 to classes - 1; 0 for a model without.
    seed
        Draw the weights from a private generator; None uses torch's global one.

    >>> vae = VAE((1, 8, 8), hidden=(32,), latent=4, seed=0)
    >>> x = torch.rand(5, 1, 8, 8)
    >>> vae(x).shape, vae.losses(x, torch.randn(5, 4)).shape
    (torch.Size([5, 1, 8, 8]), torch.Size([5]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        network: str = "mlp",
        hidden: Sequence[int] = (256, 256),
        latent: int = 32,
        likelihood: str = "bernoulli",
        channels: Sequence[int] = (32, 64),
        classes: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("network", network, NETWORKS), ("likelihood", likelihood, LIKELIHOODS)):
            if value not in allowed:
                raise UsageError(f"VAE {name} is '{value}', it must be {' or '.join(allowed)}")
        if min([latent, *shape, *hidden, *channels], default=1) < 1 or not hidden:
            raise UsageError(
                f"VAE has shape {tuple(shape)}, hidden {list(hidden)}, channels {list(channels)} and latent {latent}; "
                "each size must be at least 1, and there must be a hidden layer"
            )
        generator = private_generator(seed)
        self.shape, self.latent, self.classes = tuple(shape), latent, classes
        maps = _Maps(shape, channels) if network == "conv" else None
        self.encoder = Encoder(self.shape, hidden, latent, classes, maps, generator)
        self.decoder = Decoder(self.shape, hidden, latent, classes, maps, likelihood, generator)

    def encode(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [n, latent] of q(z | x)."""
        mean, log_variance = self.encoder(x, y)
        return mean, log_variance

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The reconstruction of `x` from the mean of its code."""
        reconstruction: Tensor = self.decoder(self.encode(x, y)[0], y)
        return reconstruction

    def losses(self, x: Tensor, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """The negative evidence lower bound of each row [n], in nats: -log p(x | z) + KL(q(z | x) || p(z)).

        z = mean + exp(log_variance / 2) * noise, with standard normal `noise` [n, latent]; the first term is summed
        over the values of a row and the second over the dimensions of z.
        """
        mean, log_variance = self.encode(x, y)
        z = mean + (0.5 * log_variance).exp() * noise
        return self.decoder.surprise(x, z, y) + divergence(mean, log_variance)

    def grow(self, classes: int, generator: torch.Generator | None = None) -> None:
        """Make room for more labels; what the others mean stays as it is."""
        for part in (self.encoder, self.decoder):
            part.labels = _grown(part.labels, classes, generator)
        self.classes = classes


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, I)) of each row: -1/2 sum (1 + log_variance - mean^2 - exp(log_variance)).

    >>> divergence(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)).item()
    0.5
    """
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)


class Encoder(nn.Module):
    """From rows to mean and log-variance of their codes."""

    def __init__(
        self,
        shape: tuple[int, ...],
        hidden: Sequence[int],
        latent: int,
        classes: int,
        maps: _Maps | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.maps = nn.Sequential() if maps is None else maps.down(generator)
        widths = [math.prod(shape) if maps is None else maps.flat, *hidden]
        self.body = _layers(widths, generator)
        self.head = linear(widths[-1], 2 * latent, generator)
        self.labels = _labels(classes, 2 * latent, generator)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        both = self.head(self.body(self.maps(x).flatten(1)))
        mean, log_variance = _labelled(both, self.labels, y).chunk(2, 1)
        return mean, log_variance


class Decoder(nn.Module):
    """From codes to rows: all that is needed to make new ones, so a frozen copy of it is a generator."""

    def __init__(
        self,
        shape: tuple[int, ...],
        hidden: Sequence[int],
        latent: int,
        classes: int,
        maps: _Maps | None,
        likelihood: str,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.shape = shape
        widths = [*reversed(hidden), math.prod(shape) if maps is None else maps.flat]
        self.first = linear(latent, widths[0], generator)
        self.labels = _labels(classes, widths[0], generator)
        self.body = nn.Sequential(*_layers(widths[:-1], generator), linear(widths[-2], widths[-1], generator))
        self.maps = nn.Sequential() if maps is None else maps.up(generator)
        self.start = shape if maps is None else maps.deepest
        self.spread = nn.Parameter(torch.zeros(shape)) if likelihood == "gaussian" else None

    @property
    def log_variance(self) -> Tensor | None:
        """Of the Gaussian likelihood, one for each value of a row; None for the Bernoulli one.

        The parameter behind it is a tenth of it: Adam moves all parameters alike, and this one has a long way to go.
        """
        return None if self.spread is None else 10 * self.spread

    @torch.no_grad()
    def scale_to(self, x: Tensor) -> None:
        """Let the Gaussian variance be that of rows `x`, as it is for a decoder that knows nothing yet."""
        if self.spread is not None:
            self.spread.copy_(x.var(0, correction=0).clamp_min(1e-4).log() / 10)

    def natural(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The mean of a row [n, *shape], or for the Bernoulli likelihood its logit."""
        values = self.body(F.relu(_labelled(self.first(z), self.labels, y)))
        rows: Tensor = self.maps(values.view(-1, *self.start))
        return rows

    def forward(self, z: Tensor, y: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """New rows [n, *shape]: the mean of p(x | z), or a draw if it is Gaussian and `noise` [n, *shape] is given.

        Without the noise, each generation that learns from the one before would take the data to be narrower. Grey
        values are no draws of black and white, so the Bernoulli likelihood has its mean.
        """
        natural, log_variance = self.natural(z, y), self.log_variance
        if log_variance is None:
            return natural.sigmoid()
        return natural if noise is None else natural + (0.5 * log_variance).exp() * noise

    def surprise(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        """-log p(x | z) of each row [n], summed over its values."""
        natural, log_variance = self.natural(z, y), self.log_variance
        if log_variance is None:
            values = F.binary_cross_entropy_with_logits(natural, x, reduction="none")
        else:
            square = (x - natural).square() * (-log_variance).exp()
            values = 0.5 * (square + log_variance + math.log(2 * math.pi))
        return values.flatten(1).sum(1)


class _Maps:
    """The convolutions between an image and its deepest maps; sides are halved, rounded up, at each."""

    def __init__(self, shape: Sequence[int], channels: Sequence[int]) -> None:
        self.channels = [image_channels("VAE network 'conv'", shape), *channels]
        self.sides = [(shape[1], shape[2])]
        for _ in channels:
            height, width = self.sides[-1]
            self.sides.append((-(-height // 2), -(-width // 2)))
        self.deepest = (self.channels[-1], *self.sides[-1])
        self.flat = math.prod(self.deepest)

    def down(self, generator: torch.Generator | None) -> nn.Sequential:
        layers: list[nn.Module] = []
        for before, after in pairwise(self.channels):
            layers += [convolution(before, after, 3, generator, stride=2, padding=1), nn.ReLU()]
        return nn.Sequential(*layers)

    def up(self, generator: torch.Generator | None) -> nn.Sequential:
        layers: list[nn.Module] = []
        for k in range(len(self.channels) - 1, 0, -1):
            layers += [
                nn.ReLU(),
                nn.Upsample(self.sides[k - 1]),
                convolution(self.channels[k], self.channels[k - 1], 3, generator, padding=1),
            ]
        return nn.Sequential(*layers)


def _layers(widths: Sequence[int], generator: torch.Generator | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [linear(before, after, generator), nn.ReLU()]
    return nn.Sequential(*layers)


def _labels(classes: int, width: int, generator: torch.Generator | None) -> nn.Parameter | None:
    """One row a label, added to what a layer gives: the same as the label's one-hot code beside the layer's input."""
    return nn.Parameter(_rows(classes, width, generator)) if classes else None


def _rows(count: int, width: int, generator: torch.Generator | None) -> Tensor:
    return nn.init.uniform_(torch.empty(count, width), -1.0, 1.0, generator=generator)


def _grown(labels: nn.Parameter | None, classes: int, generator: torch.Generator | None) -> nn.Parameter | None:
    if labels is None or classes <= len(labels):
        return labels
    new = _rows(classes - len(labels), labels.shape[1], generator).to(labels)
    return nn.Parameter(torch.cat([labels.detach(), new]))


def _labelled(values: Tensor, labels: nn.Parameter | None, y: Tensor | None) -> Tensor:
    if labels is None:
        return values
    if y is None:
        raise UsageError("this VAE is conditional; give the labels y")
    return values + labels.index_select(0, y)


@models.register("vae")
def vae(
    *,
    input_shape: Sequence[int],
    outputs: int = 0,
    seed: int | None = None,
    network: str = "mlp",
    hidden: Sequence[int] = (256, 256),
    latent: int = 32,
    likelihood: str = "bernoulli",
    conditional: bool = False,
) -> nn.Module:
    """Variational autoencoder: a generator, which gives inputs and no class scores.

    >>> vae(input_shape=(3, 32, 32), network="conv", seed=0).decoder.start
    (64, 8, 8)
    """
    return VAE(
        input_shape,
        network=network,
        hidden=hidden,
        latent=latent,
        likelihood=likelihood,
        classes=outputs if conditional else 0,
        seed=seed,
    )
