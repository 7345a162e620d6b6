from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure import registry
from perdure.data import download as downloads

Command = Callable[..., Any]


def test_list_says_what_is_where(perdure: Command) -> None:
    found = {entry["name"]: entry for entry in perdure("data", "list", "--json").json}
    assert set(found) == set(registry.datasets.names())
    assert found["digits"]["present"]
    assert found["mnist"] == {"name": "mnist", "present": False, "folder": None, "download_size": 11_594_722}
    assert "'perdure data get mnist' fetches 12 MB" in perdure("data", "list").out


def test_get_reports_progress_on_standard_error_and_the_folder_on_standard_output(
    perdure: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(name: str, root: str | None, *, progress: object) -> Path:
        assert (name, root) == ("mnist", "here")
        assert callable(progress)
        for done in range(0, 101, 5):
            progress("images.gz", done * 1_000_000, 100_000_000)
        return tmp_path / "here" / "mnist"

    monkeypatch.setattr(downloads, "download", download)
    outcome = perdure("data", "get", "mnist", "--data-root", "here")
    assert outcome.out == f"{tmp_path / 'here' / 'mnist'}\n"
    lines = outcome.err.splitlines()
    assert lines[0] == "images.gz: 0.0 of 100.0 MB"
    assert lines[-1] == "images.gz: 100.0 of 100.0 MB"
    assert len(lines) == 11
    assert perdure("data", "get", "mnist", "--data-root", "here", "--json").json["name"] == "mnist"


def test_what_is_there_is_not_downloaded(perdure: Command) -> None:
    assert perdure("data", "get", "digits").code == 0


def test_an_unknown_data_set(perdure: Command) -> None:
    outcome = perdure("data", "get", "minst")
    assert outcome.code == 2
    assert outcome.sentence.startswith("unknown data set 'minst'; did you mean 'mnist'?")
