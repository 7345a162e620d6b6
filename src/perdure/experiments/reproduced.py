"""A reproduction for people: a table for the terminal, and a page with sources, seeds and notes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from perdure.experiments.protocol import Protocol, Verdict
from perdure.experiments.reproduce import Difference, Outcome, Reproduction
from perdure.version import versions

RULE = (
    "A mean of n seeds is accepted if it is within max(floor, 2.5 sqrt(sd² / n_pub + sd² / n)) points of the "
    "published mean of n_pub seeds; too good is a failure like too bad. Where three seeds miss, three more are run and "
    "all six are judged. Bands, seeds and hyper-parameters are part of the protocol and were never changed after a run."
)
GRADES = (
    "Grades: A, a plausible bug moves the result out of the band; B, weaker; C, proves nothing about the method. Two "
    "fifths of real bugs do not move an accuracy enough, so every method is also tested against its formulas."
)


def as_text(found: Reproduction) -> str:
    """One line a row, under the title of each protocol.

    >>> from perdure.experiments.reproduce import Reproduction
    >>> as_text(Reproduction([], []))
    ''
    """
    parts = []
    for protocol, rows, checks in _by_protocol(found):
        table = [("row", "published", "ours", "band", "seeds", "verdict", "time")]
        for outcome in rows:
            if outcome.first is not None:
                table.append((outcome.name, f"{outcome.row.published:.2f}", *_cells(outcome.first), ""))
            name = outcome.name if outcome.first is None else ""
            published = f"{outcome.row.published:.2f}" if outcome.first is None else ""
            table.append((name, published, *_cells(outcome.verdict), f"{outcome.seconds:.0f} s"))
        lines = [protocol.title, "", *_aligned(table)]
        for check in checks:
            lines.append(f"{_pair(check)}: {check.ours:.2f}, at least {check.check.at_least:g}: {_word(check.inside)}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def as_markdown(found: Reproduction, command: str) -> str:
    """The page that `--out` writes; `command` is what made it."""
    made = versions()
    with_verdict = [outcome for outcome in found.rows if outcome.verdict.inside is not None]
    inside = sum(bool(outcome.verdict.inside) for outcome in with_verdict)
    lines = [
        "# Published numbers, run again",
        "",
        *_wrapped(
            f"Written by `{command}` with perdure {made['perdure']}, torch {made['torch']}, Python {made['python']} on "
            f"{made['platform']}. {inside} of {len(with_verdict)} rows are inside their bands. Numbers are percent, "
            "times are seconds on one thread of this machine, summed over the seeds."
        ),
        "",
        *_wrapped(RULE),
        "",
        *_wrapped(GRADES),
    ]
    for protocol, rows, checks in _by_protocol(found):
        lines += ["", f"## {protocol.title}", ""]
        lines += [*_wrapped(f"`perdure reproduce {protocol.name.replace('_', '-')}`. {protocol.source}."), ""]
        for origin in protocol.provenance:
            lines += _wrapped(f"- {origin}")
        lines += [
            "",
            "| row | grade | published | ours | band | verdict | seeds | each seed | seconds |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for outcome in rows:
            lines += _rows(outcome)
        if checks:
            lines += ["", "| check | at least | ours | verdict | each seed |", "|---|---|---|---|---|"]
        for check in checks:
            cells = (_pair(check), f"{check.check.at_least:g}", f"{check.ours:.2f}", _word(check.inside))
            lines.append(f"| {' | '.join(cells)} | {_each(check.values)} |")
        findings = [(outcome.name, outcome.row.finding) for outcome in rows if outcome.row.finding]
        lines += [""] if findings or protocol.notes else []
        for name, finding in findings:
            lines += _wrapped(f"- **{name}**: {finding}")
        for note in protocol.notes:
            lines += _wrapped(f"- {note}")
    return "\n".join(lines) + "\n"


def _by_protocol(found: Reproduction) -> list[tuple[Protocol, list[Outcome], list[Difference]]]:
    parts = [
        (
            protocol,
            [outcome for outcome in found.rows if outcome.protocol == protocol.name],
            [check for check in found.checks if check.protocol == protocol.name],
        )
        for protocol in found.protocols
    ]
    return [part for part in parts if part[1]]


def _cells(verdict: Verdict) -> tuple[str, str, str, str]:
    return f"{verdict.ours:.2f}", _band(verdict), _seeds(verdict), _word(verdict.inside)


def _rows(outcome: Outcome) -> list[str]:
    lines = []
    for verdict in (outcome.first, outcome.verdict):
        if verdict is not None:
            word = _word(verdict.inside) if verdict.inside is not False else "**outside**"
            seconds = "" if verdict is outcome.first else f"{outcome.seconds:.0f}"
            cells = [outcome.name, outcome.row.grade, f"{outcome.row.published:.2f}", f"{verdict.ours:.2f}"]
            cells += [_band(verdict), word, _seeds(verdict), _each(verdict.values), seconds]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _word(inside: bool | None) -> str:
    return {True: "inside", False: "outside", None: "reported only"}[inside]


def _band(verdict: Verdict) -> str:
    return f"{verdict.low:.1f} – {verdict.high:.1f}"


def _seeds(verdict: Verdict) -> str:
    seeds = list(verdict.values)
    return f"{seeds[0]} – {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])


def _each(values: dict[int, float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values.values())


def _pair(check: Difference) -> str:
    return f"{check.check.better} minus {check.check.than}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _wrapped(text: str) -> list[str]:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.wrap(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
