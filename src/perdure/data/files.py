"""Reading whole files, gzipped or not, with errors that name the file."""

from __future__ import annotations

import gzip
import zlib
from os import PathLike, fspath
from pathlib import Path

from perdure.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"


def read_bytes(path: str | PathLike[str]) -> bytes:
    """Return the content of a file, unpacked if it starts like a gzip file.

    Raises
    ------
    DataError
        If the file cannot be read, or is gzipped and damaged.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read '{fspath(path)}': {reason(error)}") from error
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"'{fspath(path)}' should be a complete gzip file but its {len(content):,} bytes are damaged or cut off "
            f"({error}); fetch it again"
        ) from error


def read_text(path: str | PathLike[str]) -> str:
    """Return the content of a UTF-8 text file, gzipped or not, without a byte order mark.

    Raises
    ------
    DataError
        If the file cannot be read or is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"'{fspath(path)}' should be UTF-8 text but byte {error.start:,} is not; convert it") from error


def find_file(folder: Path, file: str) -> Path | None:
    """Return the path of `file` in `folder`, or of its unpacked form (without `.gz`), or None.

    Raises
    ------
    DataError
        If the folder may not be looked into.
    """
    for path in (folder / file, folder / file.removesuffix(".gz")):
        try:
            if path.is_file():
                return path
        except OSError as error:
            raise DataError(f"cannot look into '{folder}': {reason(error)}") from error
    return None


def reason(error: OSError) -> str:
    """Return why the system refused, in words: "no such file or directory", "permission denied"."""
    return (error.strerror or str(error)).lower()
