"""A small convolutional network for images of any size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.models.heads import make_head
from perdure.models.layers import convolution, private_generator
from perdure.registry import models


class SmallCNN(nn.Module):
    """Three 3 x 3 convolutions, each followed by ReLU and, but for the last, by 2 x 2 max-pooling; then the mean.

    The second and third have batch normalisation. With the default 80 channels and three input channels it has 0.12 M
    parameters: the small network of Ramesh and Chaudhari 2022 (Model Zoo, arXiv 2106.03027), with a global mean in
    place of its flattening so that any image size works.

    Parameters
    ----------
    channels
        Input channels.
    outputs
        Class columns.
    width
        Channels of every convolution, and of the features.
    head, seed
        As for `MLP`.

    >>> import torch
    >>> SmallCNN(1, 10)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int = 80,
        head: str | nn.Module | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        generator = private_generator(seed)
        self.body = nn.Sequential(
            convolution(channels, width, 3, generator, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            convolution(width, width, 3, generator, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            convolution(width, width, 3, generator, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.head = make_head(head, width, outputs, generator)

    def features(self, x: Tensor) -> Tensor:
        """What the head sees: [n, width]."""
        features: Tensor = self.body(x)
        return features.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


@models.register("small_cnn")
def small_cnn(
    *,
    input_shape: Sequence[int],
    outputs: int,
    seed: int | None = None,
    width: int = 80,
    head: str = "wide",
) -> nn.Module:
    """Three convolutions, about 0.12 M parameters.

    >>> small_cnn(input_shape=(3, 32, 32), outputs=10, seed=0).head.in_features
    80
    """
    return SmallCNN(image_channels("small_cnn", input_shape), outputs, width=width, head=head, seed=seed)


def image_channels(model: str, input_shape: Sequence[int]) -> int:
    """The channels of an image shape (channels, height, width); anything else raises UsageError."""
    if len(input_shape) != 3:
        raise UsageError(f"{model} needs images (channels, height, width), not {tuple(input_shape)}; use mlp")
    return input_shape[0]
