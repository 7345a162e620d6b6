"""Files that are there as a whole or not at all."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from perdure.errors import StorageError


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path`, creating its folder; a crash leaves the old file or the new one, never a part.

    Raises
    ------
    StorageError
        If the file cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        why = error.strerror or error
        what = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check it"
        raise StorageError(f"cannot write {target}: {why}; {what} or choose another folder") from error
    return target
