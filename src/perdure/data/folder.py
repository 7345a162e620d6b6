"""Image folders: root/CLASS/*.png, or root/train/CLASS/*.png beside root/test/CLASS/*.png."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perdure.data.arrays import Arrays
from perdure.data.files import reason
from perdure.errors import DataError, MissingExtraError

SUFFIXES = (".png", ".jpg", ".jpeg")
GREY_MODES = ("1", "L", "LA")
BROKEN = (OSError, SyntaxError, ValueError, EOFError)
"""What Pillow raises for a file that is not the image it claims to be."""


def read_folder(root: str | PathLike[str], *, size: int | tuple[int, int] | None = None) -> Arrays:
    """Return a folder of images as uint8 [N, H, W] if all are grey, else [N, 3, H, W], labelled by its subfolders.

    The subfolders' names in alphabetical order are the classes. If root holds `train` and `test`, those hold the
    classes. Needs Pillow (the extra `images`).

    Parameters
    ----------
    size
        (height, width), or one number for both: every image is resized (bilinear) to it. Needed if sizes differ.

    Raises
    ------
    DataError
        If a folder or image cannot be read, there are no images, sizes differ and `size` is not given, or the test
        part has a class that the training part lacks.
    MissingExtraError
        If Pillow is not installed.
    """
    root = Path(root)
    split = [root / "train", root / "test"]
    parts = split if set(split) <= set(_folders(root)) else [root]
    names = [folder.name for folder in _folders(parts[0])]
    found = [list(_images(part, names)) for part in parts]
    for part, images in zip(parts, found, strict=True):
        if not images:
            raise DataError(f"'{part}' should hold one folder a class with .png or .jpg images but holds none")
    shape, grey = _common_shape([path for images in found for path, _ in images], size)
    tensors = [_decode([path for path, _ in images], shape, grey) for images in found]
    labels = [torch.tensor([label for _, label in images]) for images in found]
    x_test, y_test = (tensors[1], labels[1]) if len(parts) == 2 else (None, None)
    return Arrays(tensors[0], labels[0], x_test, y_test, class_names=tuple(names))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read the image folder '{folder}': {reason(error)}") from error


def _folders(folder: Path) -> list[Path]:
    entries = _entries(folder)
    try:
        return [entry for entry in entries if entry.is_dir()]
    except OSError as error:
        raise DataError(f"cannot read the image folder '{folder}': {reason(error)}") from error


def _images(part: Path, names: list[str]) -> Iterator[tuple[Path, int]]:
    for folder in _folders(part):
        if folder.name not in names:
            raise DataError(
                f"'{folder}' is a class that the training images lack; their classes are {', '.join(names)}"
            )
        paths = [path for path in _entries(folder) if path.suffix.lower() in SUFFIXES]
        if not paths:
            raise DataError(f"'{folder}' should hold .png or .jpg images but holds none; fill it or remove it")
        for path in paths:
            yield path, names.index(folder.name)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError(
            "reading images needs Pillow, which is not installed; run: pip install 'perdure[images]'"
        ) from error
    return Image


def _common_shape(paths: list[Path], size: int | tuple[int, int] | None) -> tuple[tuple[int, int], bool]:
    # Headers only: sizes are checked, and the tensor allocated, before anything is decoded.
    image_module = _pillow()
    grey = True
    first: tuple[int, int] | None = None
    for path in paths:
        try:
            with image_module.open(path) as image:
                grey = grey and image.mode in GREY_MODES
                shape = (image.height, image.width)
        except BROKEN as error:
            raise DataError(f"'{path}' is not an image that can be read; mend or remove it") from error
        first = first or shape
        if size is None and shape != first:
            raise DataError(
                f"'{path}' is {shape[0]} x {shape[1]} pixels but '{paths[0].name}' is {first[0]} x {first[1]}; "
                f"pass size=(height, width) to resize all"
            )
    if size is not None:
        first = (size, size) if isinstance(size, int) else (size[0], size[1])
        if min(first) < 1:
            raise DataError(f"size={size} should be at least one pixel each way")
    assert first is not None
    return first, grey


def _decode(paths: list[Path], shape: tuple[int, int], grey: bool) -> Tensor:
    image_module = _pillow()
    pixels = np.empty((len(paths), *shape) if grey else (len(paths), *shape, 3), np.uint8)
    for row, path in enumerate(paths):
        try:
            with image_module.open(path) as opened:
                image = opened.convert("L" if grey else "RGB")
        except BROKEN as error:
            raise DataError(f"the image '{path}' is damaged or cut off ({error}); mend or remove it") from error
        if (image.height, image.width) != shape:
            image = image.resize((shape[1], shape[0]), image_module.Resampling.BILINEAR)
        pixels[row] = np.asarray(image)
    tensor = torch.from_numpy(pixels)
    return tensor if grey else tensor.permute(0, 3, 1, 2).contiguous()
