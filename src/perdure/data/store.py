"""Where data sets lie on disk: finding, loading and verifying them by name."""

from __future__ import annotations

import hashlib
import os
from os import PathLike
from pathlib import Path

from torch import Tensor

from perdure.data.arrays import Arrays
from perdure.data.catalog import DataSet
from perdure.data.files import find_file
from perdure.errors import DataError
from perdure.registry import datasets


def data_root(root: str | PathLike[str] | None = None) -> Path:
    """Return the folder of all data sets: `root`, else `PERDURE_DATA`, else the user's cache folder."""
    if root is not None:
        return Path(root)
    if os.environ.get("PERDURE_DATA"):
        return Path(os.environ["PERDURE_DATA"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perdure"


def locate(name: str, root: str | PathLike[str] | None = None) -> Path:
    """Return the folder that holds the files of a data set.

    Parameters
    ----------
    name
        A name of `perdure list datasets`.
    root
        The folder of all data sets (`ROOT/mnist/...`), or that of this one; default: `PERDURE_DATA`, else the user's
        cache folder.

    Raises
    ------
    UnknownNameError
        If there is no such data set.
    DataError
        If a file is missing.
    """
    entry: DataSet = datasets.get(name)
    if not entry.files:
        return Path(__file__).parent
    folder = data_root(root)
    candidates = [folder / entry.name, folder]
    if entry.other_layout:
        candidates.insert(1, folder / entry.other_layout)
    for candidate in candidates:
        # MNIST and its descendants have the same file names, so a folder by another name may hold another data set.
        ambiguous = (
            candidate == folder and candidate.name != entry.name and any("/" not in file for file in entry.files)
        )
        if not ambiguous and all(find_file(candidate, file) for file in entry.files):
            return candidate
    raise DataError(
        f"data set '{entry.name}' is not in {folder}; run 'perdure data get {entry.name}' "
        "or pass --data-root / set PERDURE_DATA"
    )


def load(name: str, root: str | PathLike[str] | None = None) -> Arrays:
    """Return a data set as arrays in their stored dtype; see `locate` for where it is looked for.

    Raises
    ------
    UnknownNameError
        If there is no such data set.
    DataError
        If it is not there or a file is damaged.

    >>> load("digits").x.shape
    torch.Size([1297, 8, 8])
    """
    arrays: Arrays = datasets.get(name).read(locate(name, root))
    return arrays


def verify(name: str, root: str | PathLike[str] | None = None) -> Path:
    """Return the folder of a data set whose content is exactly what was published, in whatever order of rows.

    Raises
    ------
    UnknownNameError
        If there is no such data set.
    DataError
        If it is not there, a file is damaged, or an image or label differs from what was published.
    """
    folder = locate(name, root)
    entry: DataSet = datasets.get(name)
    arrays = entry.read(folder)
    assert arrays.x_test is not None
    assert arrays.y_test is not None
    parts = (("training", arrays.x, arrays.y, entry.train), ("test", arrays.x_test, arrays.y_test, entry.test))
    for (part, x, y, count), expected in zip(parts, entry.content, strict=True):
        if len(y) != count:
            raise DataError(
                f"the {part} part of '{entry.name}' in {folder} should have {count:,} rows but has {len(y):,}"
            )
        if content_checksum(x, y) != expected:
            raise DataError(
                f"the {part} part of '{entry.name}' in {folder} differs from what was published; "
                f"run 'perdure data get {entry.name}' into an empty folder"
            )
    return folder


def content_checksum(x: Tensor, y: Tensor) -> str:
    """Return the sha256 of the sorted sha256s of all rows, each its label byte followed by its uint8 values."""
    labels = y.numpy().astype("u1")
    rows = x.reshape(len(x), -1).numpy()
    digests = sorted(
        hashlib.sha256(label.tobytes() + row.tobytes()).digest() for label, row in zip(labels, rows, strict=True)
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()
