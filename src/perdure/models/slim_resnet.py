"""The reduced ResNet-18 of the GEM paper, the usual network of the field for 32 x 32 images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.models.heads import make_head
from perdure.models.layers import convolution, private_generator
from perdure.models.small_cnn import image_channels
from perdure.registry import models


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3, generator, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3, generator, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            projection = convolution(inputs, outputs, 1, generator, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class SlimResNet18(nn.Module):
    """ResNet-18 with `filters` instead of 64 base filters, for small images: 3 x 3 stem, no max-pooling.

    With 20 filters, three input channels and 10 classes it has 1.09 M parameters.

    Parameters
    ----------
    channels
        Input channels.
    outputs
        Class columns.
    filters
        Channels of the first stage; the features are 8 times as wide.
    head, seed
        As for `MLP`.

    Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840.

    >>> sum(p.numel() for p in SlimResNet18(3, 10).parameters())
    1094750
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        filters: int = 20,
        head: str | nn.Module | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        generator = private_generator(seed)
        self.conv = convolution(channels, filters, 3, generator, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(filters)
        blocks = []
        before = filters
        for stage in range(4):
            width = filters * 2**stage
            blocks += [Block(before, width, 1 if stage == 0 else 2, generator), Block(width, width, 1, generator)]
            before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = make_head(head, before, outputs, generator)

    def features(self, x: Tensor) -> Tensor:
        """What the head sees: [n, 8 * filters], the mean over the last 4 x 4 map (of a 32 x 32 image)."""
        maps: Tensor = self.blocks(F.relu(self.bn(self.conv(x))))
        return maps.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


@models.register("slim_resnet18")
def slim_resnet18(
    *,
    input_shape: Sequence[int],
    outputs: int,
    seed: int | None = None,
    filters: int = 20,
    head: str = "wide",
) -> nn.Module:
    """ResNet-18 with 20 base filters, 1.09 M parameters.

    >>> slim_resnet18(input_shape=(3, 32, 32), outputs=10, seed=0).head.in_features
    160
    """
    channels = image_channels("slim_resnet18", input_shape)
    return SlimResNet18(channels, outputs, filters=filters, head=head, seed=seed)
