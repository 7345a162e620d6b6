"""Downloads, only when asked for: resumed where they stopped, verified, and moved into place in one step."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from http import HTTPStatus
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from perdure.data.catalog import DataSet, Remote
from perdure.data.files import reason
from perdure.data.store import data_root, locate
from perdure.errors import DataError, StorageError
from perdure.registry import datasets

Progress = Callable[[str, int, int], None]
"""Called with a file's name, its bytes so far and its size."""

CHUNK = 1 << 18
WRONG_CONTENT = "the file has another checksum than the published one"
INTERRUPTED = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def download(name: str, root: str | PathLike[str] | None = None, *, progress: Progress | None = None) -> Path:
    """Fetch the missing files of a data set into `root` (see `data_root`) and return its folder.

    Raises
    ------
    UnknownNameError
        If there is no such data set.
    DataError
        If what the servers hold is not what was published.
    StorageError
        If no server answers, or the files cannot be written; what has arrived is kept, and the next call goes on.
    """
    entry: DataSet = datasets.get(name)
    try:
        return locate(name, root)
    except DataError:
        folder = data_root(root) / entry.name
    for remote in entry.remotes:
        if not all((folder / file).is_file() for file in remote.members or (remote.file,)):
            path = fetch(remote, folder, progress=progress)
            if remote.members:
                unpack(path, remote.members, folder)
    return locate(name, root)


def fetch(remote: Remote, folder: Path, *, progress: Progress | None = None, timeout: float = 30.0) -> Path:
    """Download one file into `folder`, trying its mirrors in turn, and return its path.

    Bytes go to `FILE.part`; a call that finds one goes on from its end. Only what has the right sha256 gets its name.

    Raises
    ------
    DataError
        If the files that arrived have another sha256 than the published one.
    StorageError
        If no server answers, or the file cannot be written.
    """
    path = folder / remote.file
    if path.is_file() and _sha256(path) == remote.sha256:
        return path
    part = path.with_name(path.name + ".part")
    failures: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for url in remote.mirrors:
            outcome = _from_mirror(url, part, remote, progress, timeout)
            if outcome is None:
                os.replace(part, path)
                return path
            failures.append(f"{url}: {outcome}")
    except OSError as error:
        raise StorageError(
            f"cannot write '{path}': {reason(error)}; free some room or choose another folder"
        ) from error
    kind = DataError if any(WRONG_CONTENT in failure for failure in failures) else StorageError
    raise kind(
        f"'{remote.file}' could not be downloaded ({'; '.join(failures)}); try again later, or put it into {folder}"
    )


def unpack(archive: Path, members: tuple[str, ...], folder: Path) -> None:
    """Take `members` out of a tar archive into `folder`, each in one step, and remove the archive.

    Raises
    ------
    DataError
        If the archive is damaged or lacks a member.
    StorageError
        If a file cannot be written.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in members:
                source = tar.extractfile(member)
                if source is None:
                    raise DataError(f"'{member}' in '{archive}' should be a file but is not")
                target = folder / member
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(target.name + ".part")
                with source, part.open("wb") as file:
                    shutil.copyfileobj(source, file, CHUNK)
                os.replace(part, target)
    except (tarfile.TarError, EOFError, KeyError, zlib.error) as error:
        raise DataError(f"'{archive}' is damaged or lacks a file ({error}); remove it and try again") from error
    except OSError as error:
        raise StorageError(f"cannot unpack '{archive}': {reason(error)}") from error
    archive.unlink()


def _from_mirror(url: str, part: Path, remote: Remote, progress: Progress | None, timeout: float) -> str | None:
    """Return None if `part` is the complete right file, else why not."""
    while True:
        begun = part.exists()
        try:
            _continue(url, part, remote, progress, timeout)
        except INTERRUPTED as error:
            return _why(error)
        size = part.stat().st_size
        if size < remote.size:
            return f"stopped after {size:,} of {remote.size:,} bytes"
        if size == remote.size and _sha256(part) == remote.sha256:
            return None
        part.unlink()
        # What another mirror began may be what is wrong: this one deserves a try from the first byte.
        if not begun:
            return WRONG_CONTENT


def _continue(url: str, part: Path, remote: Remote, progress: Progress | None, timeout: float) -> None:
    # As long as bytes arrive, a broken connection is only a reason to ask for the rest.
    while True:
        before = part.stat().st_size if part.exists() else 0
        if before > remote.size:
            part.unlink()
            before = 0
        if before == remote.size:
            return
        try:
            done = _receive(url, part, before, remote, progress, timeout)
        except INTERRUPTED:
            if part.exists() and part.stat().st_size > before:
                continue
            raise
        if done <= before or done >= remote.size:
            return


def _receive(url: str, part: Path, start: int, remote: Remote, progress: Progress | None, timeout: float) -> int:
    headers = {"User-Agent": "perdure", **({"Range": f"bytes={start}-"} if start else {})}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
        resumed = response.status == HTTPStatus.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ConnectionError("the server resumed at another place than asked for")
        done = start if resumed else 0
        with part.open("ab" if resumed else "wb") as file:
            return _copy(response, file, done, remote, progress)


def _copy(response: BinaryIO, file: BinaryIO, done: int, remote: Remote, progress: Progress | None) -> int:
    while chunk := response.read(CHUNK):
        file.write(chunk)
        done += len(chunk)
        if progress is not None:
            progress(remote.file, done, remote.size)
        if done > remote.size:
            break
    return done


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _why(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.code} {error.reason}"
    return str(getattr(error, "reason", None) or error)
