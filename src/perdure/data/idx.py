"""The idx format of MNIST and its kin: two zero bytes, a type, the number of dimensions, the sizes, the values."""

from __future__ import annotations

from os import PathLike, fspath

import numpy as np
import torch
from torch import Tensor

from perdure.data.files import read_bytes
from perdure.errors import DataError

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
"""The values' type by the third byte of the file; multi-byte values are big-endian."""


def read_idx(path: str | PathLike[str], dimensions: int | None = None) -> Tensor:
    """Return the tensor stored in an idx file, gzipped or not, in its stored dtype.

    Parameters
    ----------
    path
        For example `train-images-idx3-ubyte.gz`, which gives uint8 [60000, 28, 28].
    dimensions
        If given, the number of dimensions the file must have: 3 for images, 1 for labels.

    Raises
    ------
    DataError
        If the file cannot be read, has another magic number, or is shorter or longer than its header says.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "labels-idx1-ubyte"
    >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
    >>> read_idx(path)
    tensor([7, 2, 1], dtype=torch.uint8)
    """
    name = fspath(path)
    content = read_bytes(path)
    magic = content[:4]
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in TYPES or magic[3] == 0:
        raise DataError(
            f"'{name}' is not an idx file: it should start with 00 00, a type (08 for bytes) and the number of "
            f"dimensions, but starts with {magic.hex(' ') or 'nothing'}"
        )
    if dimensions is not None and magic[3] != dimensions:
        raise DataError(
            f"'{name}' should have {dimensions} dimension{'s' * (dimensions > 1)} "
            f"(magic number 00 00 {magic[2]:02x} {dimensions:02x}) but has {magic[3]} ({magic.hex(' ')})"
        )
    header = 4 + 4 * magic[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:header].ljust(header - 4, b"\0"), ">u4"))
    dtype = np.dtype(TYPES[magic[2]])
    expected = header + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if len(content) < header or len(content) != expected:
        raise DataError(
            f"'{name}' should hold {expected:,} bytes for its shape {list(shape)} but holds {len(content):,}; "
            "it is cut off or damaged, fetch it again"
        )
    values = np.frombuffer(content, dtype, offset=header).reshape(shape)
    return torch.from_numpy(values.astype(dtype.newbyteorder("=")))
