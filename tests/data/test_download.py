from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import synthetic_data as synthetic

from perdure.data.catalog import DataSet, Remote
from perdure.data.download import download, fetch, unpack
from perdure.data.store import load
from perdure.errors import DataError, StorageError
from perdure.registry import datasets

CONTENT = bytes(range(256)) * 4000


class Server(ThreadingHTTPServer):
    """Serves `files`; breaks off after `patience` bytes of an answer while there are `breaks` left."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/file": CONTENT}
        self.breaks = 0
        self.patience = 300_000
        self.ranges = True
        self.asked: list[str | None] = []

    def url(self, name: str = "file") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.path not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[self.path]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if self.server.breaks:
            self.server.breaks -= 1
            body = body[: self.server.patience]
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Tests print nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def remote(*urls: str, content: bytes = CONTENT, file: str = "file", members: tuple[str, ...] = ()) -> Remote:
    return Remote(file, len(content), hashlib.sha256(content).hexdigest(), urls, members)


def test_the_file_arrives_and_progress_is_told(server: Server, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    path = fetch(remote(server.url()), tmp_path / "new", progress=lambda *event: told.append(event))
    assert path.read_bytes() == CONTENT
    assert told[-1] == ("file", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    asked = len(server.asked)
    assert fetch(remote(server.url()), tmp_path / "new") == path
    assert len(server.asked) == asked


def test_a_broken_connection_is_resumed_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.breaks = 2
    assert fetch(remote(server.url()), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=600000-"]


def test_a_killed_download_goes_on_from_its_part(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    assert fetch(remote(server.url()), tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-"]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    assert fetch(remote(server.url()), tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-"]


def test_the_next_mirror_continues_what_another_began(server: Server, tmp_path: Path) -> None:
    server.files["/short"] = CONTENT[:5000]
    urls = (server.url("nothing"), server.url("short"), server.url())
    assert fetch(remote(*urls), tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=5000-"


def test_a_part_with_wrong_bytes_costs_one_more_try(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"<html>sign in</html>")
    assert fetch(remote(server.url()), tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=20-", None]


def test_a_wrong_checksum_is_refused_and_nothing_is_left(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT[:-1] + b"x"
    with pytest.raises(DataError, match=r"'file' could not be downloaded .*another checksum than the published one"):
        fetch(remote(server.url()), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_everywhere_says_why(server: Server, tmp_path: Path) -> None:
    closed = Server()
    closed.server_close()
    with pytest.raises(StorageError) as caught:
        fetch(remote(server.url("nothing"), closed.url()), tmp_path)
    assert f"{server.url('nothing')}: 404 Not Found" in str(caught.value)
    assert "refused" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot write '.*taken/file': .*; free some room or choose another folder"):
        fetch(remote(server.url()), tmp_path / "taken")


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_only_the_named_members_are_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(tar({"set/train.bin": b"train", "../outside": b"no", "set/readme": b"no"}))
    unpack(archive, ("set/train.bin",), tmp_path / "data")
    assert (tmp_path / "data" / "set" / "train.bin").read_bytes() == b"train"
    assert not (tmp_path / "outside").exists()
    assert not archive.exists()
    archive.write_bytes(tar({"set/readme": b"no"}))
    with pytest.raises(DataError, match=r"is damaged or lacks a file .*set/train\.bin"):
        unpack(archive, ("set/train.bin",), tmp_path / "data")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_downloaded_set_loads(name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = synthetic.write_all(tmp_path / "source") / name
    entry: DataSet = datasets.get(name)
    if name == "mnist":
        remotes = []
        for file in entry.files:
            path = source / file
            content = (path if path.exists() else path.with_suffix("")).read_bytes()
            server.files["/" + file] = content
            remotes.append(remote(server.url(file), content=content, file=file))
    else:
        content = tar({member: (source / member).read_bytes() for member in entry.files})
        server.files["/set.tar.gz"] = content
        remotes = [remote(server.url("set.tar.gz"), content=content, file="set.tar.gz", members=entry.files)]
    monkeypatch.setitem(datasets._entries, name, DataSet(**{**vars(entry), "remotes": tuple(remotes)}))
    root = tmp_path / "root"
    assert download(name, root) == root / name
    ours, theirs = load(name, root), load(name, tmp_path / "source")
    assert ours.x.equal(theirs.x)
    assert ours.y.equal(theirs.y)
    asked = len(server.asked)
    assert download(name, root) == root / name
    assert len(server.asked) == asked
