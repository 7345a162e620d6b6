"""`perdure choose`: from what is given to a method, with its reasons, what it was measured to keep, and a command."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Annotated, Literal

from cyclopts import Parameter

from perdure.cli.output import Json, aligned, print_json
from perdure.errors import UsageError

SHOWN = 3


def choose(
    scenario: Annotated[
        Literal["task", "domain", "class"],
        Parameter(
            help="task: named when predicting; domain: same labels, new inputs; class: new labels, no task named."
        ),
    ] = "class",
    *,
    examples: Annotated[bool, Parameter(help="Whether examples of the past may be kept.")] = True,
    boundaries: Annotated[bool, Parameter(help="Whether somebody says where a task ends.")] = True,
    memory: Annotated[str | None, Parameter(help="What a method may keep: 500k, 20M, 1G; default: no limit.")] = None,
    parameters: Annotated[str, Parameter(help="Trainable values of your model: 90k, 11M.")] = "1M",
    example_bytes: Annotated[int, Parameter(help="Bytes of one stored example: 784 for MNIST, 3072 for CIFAR.")] = 3072,
    slowdown: Annotated[float | None, Parameter(help="How many times a plain step a step may take.")] = None,
    json: Json = False,
) -> None:
    """Say which method fits, and why the others do not.

    perdure choose class --no-boundaries --memory 2M --example-bytes 784
    """
    from perdure.experiments.choose import STREAMS, Needs
    from perdure.experiments.choose import choose as fitting

    needs = Needs(
        scenario=scenario,
        examples=examples,
        boundaries=boundaries,
        memory=None if memory is None else _number("memory", memory),
        parameters=_number("parameters", parameters),
        example_bytes=example_bytes,
        slowdown=slowdown,
    )
    fits, others = fitting(needs)
    if json:
        print_json({"needs": asdict(needs), "fits": [asdict(advice) for advice in fits], "others": others})
        return
    if not fits:
        print(
            "No method here keeps what was learned under these conditions. Allow a few examples of the past "
            "(--examples), or name the task when predicting.\n"
        )
    for number, advice in enumerate(fits[:SHOWN], 1):
        if advice.accuracy is None:
            measured = "not among the reproduced numbers"
        else:
            measured = (
                f"{advice.accuracy:.1f} % ({STREAMS[scenario]}; published {advice.published:.1f}, "
                f"fine-tuning {advice.floor:.1f})"
            )
        rows = [
            ("   why", advice.why),
            ("   measured", measured),
            ("   keeps", advice.keeps),
            ("   time", f"about {advice.steps:g} plain steps a step"),
            ("   try", advice.command),
        ]
        print(f"{number}. {advice.method}\n{aligned(rows)}\n")
    if len(fits) > SHOWN:
        print(f"Also: {', '.join(advice.method for advice in fits[SHOWN:])}.\n")
    if others:
        print(f"Not here:\n{aligned([(f'   {name}', reason) for name, reason in others.items()])}")


def _number(name: str, text: str) -> int:
    """A number with an ending: k, M or G."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kKmMgG]?)[bB]?", text.strip())
    if match is None:
        raise UsageError(f"--{name} is '{text}', it must be a number such as 500000, 500k or 20M")
    return round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[match[2].lower()])
