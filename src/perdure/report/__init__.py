"""A report of several methods as one HTML file that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perdure.files import write_atomically
from perdure.report.page import page
from perdure.results import Results

__all__ = ["write"]


def write(
    groups: Mapping[str, Sequence[Results]],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write the report of `groups` (runs by label) and return the paths written.

    Parameters
    ----------
    path
        An `.html` file, or a folder that gets `report.html`.
    title
        The heading; the benchmark and scenario if left out.
    settings
        What the runs were made with, shown as it is; dictionaries in it are flattened to `train.epochs` and the like.

    Raises
    ------
    UsageError
        If the runs cannot stand in one table.
    StorageError
        If the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        target = target / "report.html"
    return [write_atomically(target, page(groups, title=title, settings=settings).encode())]
