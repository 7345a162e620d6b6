"""`perdure explain`: what something is, its equation, when to use it, what it costs, its paper and its arguments."""

from __future__ import annotations

import inspect
import re
import textwrap
from json import dumps as json_text
from typing import Annotated, Any

from cyclopts import Parameter

from perdure.cli import describe
from perdure.cli.output import Json, aligned, print_json

EQUATION = re.compile(r"[+-]=|<-|argmin")
FINETUNE = {
    **describe.FINETUNE,
    "kind": "method",
    "summary": "train on each task in turn and do nothing else",
    "description": "No method at all: the loss of the current task is all there is, and old tasks are forgotten.",
    "equation": "loss = loss of the current task",
    "arguments": [],
}


def explain(
    name: Annotated[str, Parameter(help="A name of 'perdure list methods', benchmarks, models or detectors.")],
    /,
    *,
    json: Json = False,
) -> None:
    """Explain a method, benchmark, model or detector."""
    entry = _explanation(name)
    if json:
        print_json(entry)
    else:
        print(_text(entry))


def _explanation(name: str) -> dict[str, Any]:
    from perdure import registry

    key = name.replace("-", "_")
    if key == FINETUNE["name"]:
        return FINETUNE
    for kind in (registry.benchmarks, registry.models, registry.detectors):
        if key in kind.names():
            return _described(key, kind.kind, kind.get(key))
    method = registry.methods.get(name)
    found = _described(key, "method", method)
    found["summary"] = method.summary or found["summary"]
    found |= describe.described_method(method)
    return found


def _described(name: str, kind: str, target: Any) -> dict[str, Any]:
    from perdure.cli.list import NOT_SET_BY_HAND, first_sentence
    from perdure.experiments.typed import REQUIRED, arguments

    body = _sections(target)[0]
    paragraphs = [" ".join(p.split()) for p in body.split("\n\n") if not p.lstrip().startswith(">>>")]
    paper = getattr(target, "paper", "")
    prose = [p for p in paragraphs if p and not EQUATION.search(p) and p.rstrip(".") != paper]
    equation = next((p for p in paragraphs if EQUATION.search(p)), None)
    docs = _parameter_docs(target)
    takes = [
        {
            "name": argument.name,
            "default": None if argument.default is REQUIRED else argument.default,
            "allowed": argument.allowed,
            "description": docs.get(argument.name, ""),
        }
        for argument in arguments(target, leave_out=NOT_SET_BY_HAND).values()
    ]
    return {
        "name": name,
        "kind": kind,
        "summary": first_sentence(target),
        "description": "\n\n".join(prose),
        "equation": equation,
        "arguments": takes,
    }


def _sections(target: Any) -> tuple[str, str]:
    """The text of a docstring before its list of parameters, and that list."""
    text = inspect.getdoc(target) or ""
    body, _, rest = text.partition("Parameters\n----------\n")
    return body.strip(), re.split(r"\n\n(?=\w+\n-+\n|>>>)", rest)[0]


def _parameter_docs(target: Any) -> dict[str, str]:
    """What the docstring says of each parameter; "See `X`" is followed where X is a base class or another method."""
    docs: dict[str, str] = {}
    names: list[str] = []
    for line in _sections(target)[1].splitlines():
        if line and not line[0].isspace():
            names = [name.strip() for name in line.split(",")]
        else:
            for name in names:
                docs[name] = f"{docs.get(name, '')} {line.strip()}".strip()
    for name, text in docs.items():
        reference = re.match(r"See `(\w+)`", text)
        other = _find(target, reference[1]) if reference else None
        if other is not None and other is not target:
            docs[name] = _parameter_docs(other).get(name, text)
    return docs


def _find(target: Any, name: str) -> Any:
    bases = {base.__name__: base for base in getattr(target, "__mro__", ())}
    if name in bases:
        return bases[name]
    from perdure import methods

    return getattr(methods, name, None)


def _text(entry: dict[str, Any]) -> str:
    paragraphs = [p for p in entry["description"].split("\n\n") if p.rstrip(".") != entry["summary"]]
    parts = [f"{entry['name']}: {entry['summary']}", *map(_wrapped, paragraphs)]
    titles = {"equation": "Equation", "use_when": "When to use it", "cost": "What it costs", "paper": "Paper"}
    parts += [f"{title}\n{_wrapped(entry[key], '  ')}" for key, title in titles.items() if entry.get(key)]
    if "scenarios" in entry:
        parts.append(f"Needs\n{_wrapped(_needs(entry), '  ')}")
    if entry["arguments"]:
        rows = [(f"  {a['name']} = {_shown(a['default'])}", _what_it_is(a)) for a in entry["arguments"]]
        parts.append(f"Arguments\n{aligned(rows)}")
    return "\n\n".join(parts)


def _shown(default: Any) -> str:
    """A default as `--set` takes it."""
    return json_text(list(default) if isinstance(default, tuple) else default).strip('"')


def _what_it_is(argument: dict[str, Any]) -> str:
    return f"{argument['allowed']}. {argument['description']}".rstrip()


def _needs(entry: dict[str, Any]) -> str:
    return f"{describe.needs(entry)}; works on streams: {describe.streams(entry)}"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 110, initial_indent=indent, subsequent_indent=indent)
