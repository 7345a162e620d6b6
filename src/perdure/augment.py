"""Random changes of training inputs, drawn anew in every step for current and remembered rows alike, never stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.errors import DataError, UsageError
from perdure.registry import nearest

Augment = Callable[[Any, torch.Generator], Any]
"""From stored rows [n, ...] and a CPU generator to other rows of the same shapes and dtypes."""


@dataclass(frozen=True)
class RandomFlip:
    """Every second image, on average, from right to left. Takes [n, h, w] or [n, c, h, w] of any dtype.

    >>> RandomFlip()(torch.tensor([[[1, 2]]] * 3), torch.Generator().manual_seed(0)).squeeze(1).tolist()
    [[2, 1], [1, 2], [2, 1]]
    """

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        images = _images(x)
        turned = (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
        return torch.where(turned.view(-1, 1, 1, 1), images.flip(-1), images).view(x.shape)


@dataclass(frozen=True)
class RandomCrop:
    """Every image moved by up to `padding` pixels up or down, left or right, with zeros where nothing was.

    Takes [n, h, w] or [n, c, h, w] of any dtype.
    """

    padding: int = 4

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        images = _images(x)
        count, channels, height, width = images.shape
        padded = F.pad(images, (self.padding,) * 4)
        down, right = torch.randint(2 * self.padding + 1, (2, count, 1), generator=generator).to(x.device)
        rows, columns = (down + torch.arange(height, device=x.device), right + torch.arange(width, device=x.device))
        index = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
        picked = padded.flatten(2).gather(2, index.view(count, 1, -1).expand(-1, channels, -1))
        return picked.view(x.shape)


@dataclass(frozen=True)
class Both:
    """One change after another."""

    changes: tuple[Augment, ...]

    def __call__(self, x: Any, generator: torch.Generator) -> Any:
        for change in self.changes:
            x = change(x, generator)
        return x


AUGMENTS: dict[str, Augment] = {
    "flip": RandomFlip(),
    "crop": RandomCrop(),
    "crop_flip": Both((RandomCrop(), RandomFlip())),
}


def as_augment(augment: Augment | str | None) -> Augment | None:
    """A function of rows and generator, from itself or its name.

    Raises
    ------
    UsageError
        For anything else.
    """
    if isinstance(augment, str) and augment in AUGMENTS:
        return AUGMENTS[augment]
    if augment is None or callable(augment):
        return augment
    hint = nearest(str(augment), AUGMENTS) or ";"
    raise UsageError(
        f"unknown augment {augment!r}{hint} there are {', '.join(AUGMENTS)}, or give a function (x, generator) -> x"
    )


def name_of(augment: Augment | None) -> str | None:
    """The name under which `as_augment` finds it again, else that of the function."""
    if augment is None:
        return None
    known = next((name for name, each in AUGMENTS.items() if each == augment), None)
    return known or getattr(augment, "__qualname__", type(augment).__qualname__)


def _images(x: Any) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim not in (3, 4):
        shape = f"of shape {list(x.shape)}" if isinstance(x, Tensor) else "that are a tree of tensors"
        raise DataError(
            f"images [n, h, w] or [n, c, h, w] can be cropped and flipped, not inputs {shape}; give augment= a "
            "function (x, generator) -> x of your own"
        )
    return x if x.ndim == 4 else x.unsqueeze(1)
