"""A user's own data by its path: a csv or tsv file, or a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from perdure.data.arrays import Arrays
from perdure.errors import DataError

TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


def read_path(
    path: str | PathLike[str],
    *,
    target: str | None = None,
    domain: str | None = None,
    ignore: Sequence[str] = (),
    size: int | tuple[int, int] | None = None,
) -> Arrays:
    """Return the examples at `path`: see `read_table` for .csv and .tsv files and `read_folder` for image folders.

    Raises
    ------
    DataError
        If there is nothing at `path`, it is neither, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        from perdure.data.folder import read_folder

        return read_folder(path, size=size)
    if not path.exists():
        raise DataError(
            f"'{path}' does not exist; give a .csv or .tsv file or a folder with one folder of images a class"
        )
    if not path.name.endswith(TABLES):
        raise DataError(f"'{path}' is neither a .csv or .tsv file nor a folder with one folder of images a class")
    from perdure.data.table import read_table

    return read_table(path, target=target, domain=domain, ignore=ignore)
