"""What the commands have in common: options that several take, JSON on standard output, tables of names."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

from cyclopts import Parameter

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON, and everything else to standard error.")]
DataRoot = Annotated[
    str | None,
    Parameter(name="--data-root", help="Folder of the data sets; default: PERDURE_DATA, else the user's cache folder."),
]


def print_json(content: Any) -> None:
    """Print one JSON value."""
    print(json.dumps(content, indent=1, allow_nan=False))


def say(text: str = "") -> None:
    """A line for whoever watches."""
    print(text, file=sys.stderr)


@contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """Send what models or data sets print to standard error, so that the output stays one result."""
    with redirect_stdout(sys.stderr):
        yield


def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, in two columns as wide as the terminal."""
    left = max((len(name) for name, _ in rows), default=0) + 2
    width = max(40, shutil.get_terminal_size((120, 24)).columns)
    lines = []
    for name, text in rows:
        parts = textwrap.wrap(text, width - left) or [""]
        lines += [f"{name:<{left}}{parts[0]}".rstrip(), *(" " * left + part for part in parts[1:])]
    return "\n".join(lines)
