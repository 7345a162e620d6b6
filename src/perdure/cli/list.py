"""`perdure list`: everything that has a name."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any, Literal

from cyclopts import Parameter

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
    if kind == "scenarios":
        _show(_scenarios(), json)
        return
    from perdure import registry

    entries = [_described(kind, name, getattr(registry, kind).get(name)) for name in getattr(registry, kind).names()]
    if kind == "methods":
        entries.insert(0, {"name": "finetune", "description": "no method at all: the lower reference"})
    _show(entries, json)


def _show(entries: list[dict[str, Any]], json: bool) -> None:
    if json:
        print_json(entries)
    else:
        print(aligned([(entry["name"], entry["description"]) for entry in entries]))


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
        return {
            "name": name,
            "description": entry.summary or first_sentence(entry),
            "paper": getattr(entry, "paper", ""),
            "use_when": getattr(entry, "use_when", ""),
            "cost": getattr(entry, "cost", ""),
            "scenarios": sorted(entry.scenarios),
            "stores_examples": entry.stores_examples,
        }
    if kind == "datasets":
        keys = ("description", "shape", "classes", "train", "test", "licence", "citation", "homepage", "download_size")
        return {"name": name, **{key: getattr(entry, key) for key in keys}}
    from perdure.experiments.typed import arguments

    takes = list(arguments(entry, leave_out=NOT_SET_BY_HAND))
    return {"name": name, "description": first_sentence(entry), "arguments": takes}
