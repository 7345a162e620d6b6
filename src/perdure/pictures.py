"""Images as PNG, written with nothing but zlib, and a grid of many as one."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perdure.files import write_atomically

Pixels = npt.NDArray[np.uint8]
Pictures = dict[str, dict[int, bytes]]
"""By the method that offers them, and by the index of the task after which they were made: PNG files."""

FOLDER = "pictures"


def grid(images: Tensor, columns: int = 10) -> Pixels:
    """Images [n, channels, height, width] in [0, 1] side by side, a grey pixel apart: [height, width] or [.., .., 3].

    >>> grid(torch.ones(3, 1, 2, 2), columns=2).tolist()
    [[255, 255, 128, 255, 255], [255, 255, 128, 255, 255], [128, 128, 128, 128, 128], [255, 255, 128, 128, 128], \
[255, 255, 128, 128, 128]]
    """
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), 128, dtype=torch.uint8)
    pixels = images.detach().to("cpu", torch.float32).nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    for k, image in enumerate(pixels):
        top, left = k // columns * (height + 1), k % columns * (width + 1)
        sheet[:, top : top + height, left : left + width] = image
    found: Pixels = sheet[0].numpy() if channels == 1 else sheet.permute(1, 2, 0).contiguous().numpy()
    return found


def png(pixels: Pixels) -> bytes:
    """A PNG file of grey values [height, width] or colours [height, width, 3]."""
    height, width = pixels.shape[:2]
    colour = 0 if pixels.ndim == 2 else 2
    # Each line begins with the number of its filter; 0 is none.
    lines = np.zeros((height, 1 + pixels[0].size), dtype=np.uint8)
    lines[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG file."""
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def write_pictures(folder: Path, pictures: Pictures) -> None:
    """Write `pictures/METHOD-TASK.png` into a run's folder, those that are not there yet, counting tasks from 1."""
    for method, task, data in _each(pictures):
        path = folder / FOLDER / f"{method}-{task + 1}.png"
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)


def read_pictures(folder: Path) -> Pictures:
    """The pictures in a run's folder."""
    found: Pictures = {}
    for path in (folder / FOLDER).glob("*-*.png"):
        method, _, task = path.stem.rpartition("-")
        if task.isdigit():
            found.setdefault(method, {})[int(task) - 1] = path.read_bytes()
    return {method: dict(sorted(found[method].items())) for method in sorted(found)}


def _each(pictures: Pictures) -> Iterable[tuple[str, int, bytes]]:
    return ((method, task, data) for method, by_task in pictures.items() for task, data in by_task.items())


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
