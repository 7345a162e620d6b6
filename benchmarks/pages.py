"""What the pages under docs/ that a script writes have in common."""

from __future__ import annotations

import subprocess
import textwrap
from collections.abc import Sequence


def commit_of(path: str = "src/perdure") -> str:
    """The commit that last changed the library, with a + if it has changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    return git("log", "-1", "--format=%h", "--", path) + ("+" if git("status", "--porcelain", "--", path) else "")


def wrapped(text: str) -> list[str]:
    """Lines of a paragraph, or of a point of a list."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.wrap(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return [first, "|" + "---|" * len(head), *others]


def by_seed(values: Sequence[float], digits: int = 2) -> str:
    """One number a seed."""
    return " / ".join(f"{value:.{digits}f}" for value in values)
