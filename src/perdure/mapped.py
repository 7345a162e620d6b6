"""Tensors whose bytes are in a file and come into memory page by page, when they are touched."""

from __future__ import annotations

import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from perdure.errors import StorageError

BLOCK_BYTES = 1 << 24
"""Rows are copied in blocks of about so many bytes, so that a copy never needs the memory of the whole."""


def mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """A tensor of zeros in a new file in `folder`.

    The space is claimed at once: a full disk is an error here, not a crash at some later write. The file has no name
    any more when this returns (where the system allows that), so nothing is left over, however the process ends.

    Raises
    ------
    StorageError
        If the folder cannot be written or has not enough room.
    """
    count = math.prod(shape)
    if not count:
        return torch.zeros(shape, dtype=dtype)
    size = count * dtype.itemsize
    name: str | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="perdure-", suffix=".rows", dir=folder)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
            else:
                os.truncate(handle, size)
        finally:
            os.close(handle)
        return torch.from_file(name, shared=True, size=count, dtype=dtype).view(shape)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise StorageError(
            f"cannot keep {size:,} bytes of rows in {folder}: {why}; free space or choose another folder"
        ) from error
    finally:
        if name is not None:
            with suppress(OSError):
                os.unlink(name)


def is_mapped(tensor: Tensor) -> bool:
    """Whether the bytes are those of a file that is written through."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None


def blocks(rows: int, row_bytes: int) -> list[slice]:
    """`rows` rows cut into blocks of about `BLOCK_BYTES`."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def row_bytes(leaf: Tensor) -> int:
    """Bytes of one row."""
    return leaf.shape[1:].numel() * leaf.element_size()
