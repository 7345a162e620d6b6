"""The binary version of CIFAR-10 and CIFAR-100: records of one or two label bytes and 3,072 pixel bytes."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from perdure.data.files import read_bytes, read_text
from perdure.errors import DataError

PIXELS = 3 * 32 * 32


def read_cifar(paths: Sequence[str | PathLike[str]], *, limits: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the images uint8 [N, 3, 32, 32] (red, green, blue) and label bytes int64 [N, L] of CIFAR binary files.

    Parameters
    ----------
    paths
        The files, joined in this order.
    limits
        The number of classes of each label byte: (10,) for CIFAR-10, (20, 100) (coarse, fine) for CIFAR-100.

    Raises
    ------
    DataError
        If a file cannot be read, is not a whole number of records, or has a label outside its classes.
    """
    record = len(limits) + PIXELS
    parts = []
    for path in paths:
        content = np.frombuffer(read_bytes(path), np.uint8)
        if len(content) == 0 or len(content) % record:
            raise DataError(
                f"'{fspath(path)}' should hold records of {record:,} bytes but its {len(content):,} bytes are "
                f"{len(content) // record:,} records and {len(content) % record:,} bytes; fetch it again"
            )
        rows = content.reshape(-1, record)
        for byte, limit in enumerate(limits):
            highest = int(rows[:, byte].max())
            if highest >= limit:
                raise DataError(
                    f"'{fspath(path)}' should have labels from 0 to {limit - 1} in byte {byte} of its records but has "
                    f"{highest}; it is damaged or not a CIFAR binary file"
                )
        parts.append(rows)
    images = np.empty((sum(map(len, parts)), PIXELS), np.uint8)
    labels = np.empty((len(images), len(limits)), np.int64)
    start = 0
    for rows in parts:
        images[start : start + len(rows)] = rows[:, len(limits) :]
        labels[start : start + len(rows)] = rows[:, : len(limits)]
        start += len(rows)
    return torch.from_numpy(images).view(-1, 3, 32, 32), torch.from_numpy(labels)


def read_names(path: str | PathLike[str], count: int) -> tuple[str, ...]:
    """Return the class names of a CIFAR names file (one a line), or the numbers if there is no such file.

    Raises
    ------
    DataError
        If the file has another number of names than `count`.
    """
    if not Path(path).exists():
        return tuple(map(str, range(count)))
    names = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    if len(names) != count:
        raise DataError(f"'{fspath(path)}' should hold {count} class names but holds {len(names)}")
    return names
