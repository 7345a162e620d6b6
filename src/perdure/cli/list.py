"""`perdure list`: everything that has a name."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from perdure.cli.describe import FINETUNE, LETTERS, described_method, needs, streams
from perdure.cli.output import Json, aligned, print_json

NOT_SET_BY_HAND = ("input_shape", "outputs", "seed", "root")
Kind = Literal["methods", "benchmarks", "models", "datasets", "detectors", "scenarios"]


def list_names(
    kind: Annotated[Kind, Parameter(help="What to list.")],
    /,
    *,
    json: Json = False,
) -> None:
    """List the methods, benchmarks, models, data sets, detectors of task boundaries or scenarios of streams."""
    from perdure import registry

    if kind == "scenarios":
        entries = _scenarios()
    else:
        known = getattr(registry, kind)
        entries = [_described(kind, name, known.get(name)) for name in known.names()]
    if kind == "methods":
        entries.insert(0, FINETUNE)
    if json:
        print_json(entries)
    elif kind == "methods":
        print(aligned([row for entry in entries for row in _rows(entry)]))
        print(f"\n{textwrap.fill(LETTERS, 110)}")
    else:
        print(aligned([(entry["name"], entry["description"]) for entry in entries]))


def _rows(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """A method's lines: what it does, where it works and what it needs, what it costs, who found it."""
    lines = [
        entry["description"],
        f"streams: {streams(entry)}",
        f"needs: {needs(entry)}",
        f"memory: {entry['memory']}; time: {entry['time']}",
        entry["paper"],
    ]
    return [(entry["name"] if number == 0 else "", line) for number, line in enumerate(lines)]


def _scenarios() -> list[dict[str, Any]]:
    from perdure.streams.shaping import NOTES, OWN_KEYWORDS

    return [
        {"name": name, "description": note, "arguments": list(OWN_KEYWORDS.get(name, ()))}
        for name, note in NOTES.items()
    ]


def first_sentence(entry: Any) -> str:
    """The first sentence of an object's docstring, on one line."""
    text = " ".join((inspect.getdoc(entry) or "").split("\n\n")[0].split())
    return re.split(r"(?<!\.)\.(?:\s|$)", text)[0]


def _described(kind: Kind, name: str, entry: Any) -> dict[str, Any]:
    if kind == "methods":
        return {"name": name, "description": entry.summary or first_sentence(entry), **described_method(entry)}
    if kind == "datasets":
        keys = ("description", "shape", "classes", "train", "test", "licence", "citation", "homepage", "download_size")
        return {"name": name, **{key: getattr(entry, key) for key in keys}}
    from perdure.experiments.typed import arguments

    takes = list(arguments(entry, leave_out=NOT_SET_BY_HAND))
    return {"name": name, "description": first_sentence(entry), "arguments": takes}
