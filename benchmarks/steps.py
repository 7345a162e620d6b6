"""What a training step costs with each method, against loops by hand that do the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import perdure
from benchmarks.cases import Case, bare, bare_derpp, bare_two_passes
from benchmarks.rows import Row
from benchmarks.timing import interleave
from perdure.methods import AGEM, EWC, HAT, L2, MAS, SI, SPG, DERpp, LwF, Method, Replay


def learner(case: Case, methods: list[Method], finished: int = 1) -> Callable[[], None]:
    """The loop through a learner that has `finished` tasks behind it and is inside the next."""
    made = perdure.Learner(case.build(), partial(torch.optim.SGD, lr=0.01), methods)
    rows = slice(0, 256)
    for number in range(finished):
        made.fit_task(str(number), (case.x[rows], case.y[rows]), batch_size=case.batch)
    made.begin_task("now", (case.x, case.y))
    plan = case.plan()

    def run() -> None:
        for index in plan:
            made.step(case.x.index_select(0, index), case.y.index_select(0, index), index=index)

    return run


def told(case: Case, methods: list[Method]) -> Callable[[], None]:
    """The loop through a learner that is told the task, inside the second task of two columns."""
    made = perdure.Learner(case.build(), partial(torch.optim.SGD, lr=0.01), methods, scenario="task")
    first, second = case.y % 2, case.y % 2 + 2
    made.fit_task("before", (case.x[:256], first[:256]), batch_size=case.batch)
    made.begin_task("now", (case.x, second), classes=(2, 3))
    plan = case.plan()

    def run() -> None:
        for index in plan:
            made.step(case.x.index_select(0, index), second.index_select(0, index), index=index)

    return run


def variants(case: Case) -> dict[str, Callable[[], object]]:
    return {
        "bare": bare(case),
        "bare twice": bare(case, 2),
        "bare thrice": bare(case, 3),
        "bare two passes": bare_two_passes(case),
        "bare derpp": bare_derpp(case),
        "none": learner(case, []),
        "l2": learner(case, [L2(strength=1e-3)]),
        "ewc": learner(case, [EWC(strength=1e-3)], finished=10),
        "ewc online": learner(case, [EWC(strength=1e-3, mode="online", gamma=0.9)], finished=10),
        "mas": learner(case, [MAS(strength=1e-6)], finished=10),
        "ewc+mas": learner(case, [EWC(strength=1e-3), MAS(strength=1e-6)], finished=10),
        "si": learner(case, [SI(strength=1e-3)]),
        "lwf": learner(case, [LwF(strength=1e-3)]),
        "agem": learner(case, [AGEM(per_task=256, batch_size=case.batch)]),
        "replay": learner(case, [Replay(capacity=200)]),
        "derpp": learner(case, [DERpp(capacity=200, forward="joint")]),
        "told": told(case, []),
        "spg": told(case, [SPG()]),
    }


def rows(case: Case) -> Iterator[Row]:
    runs = variants(case)
    convolutional = case.layout == torch.channels_last
    if not convolutional:  # HAT refuses a network with skip connections
        runs["hat"] = told(case, [HAT()])
    if convolutional:
        runs["bare NCHW"] = bare(case, layout=torch.contiguous_format)
    seconds = interleave(runs, rounds=49)
    own, double, triple = "own fine-tuning", "by hand, twice the batch", "by hand, three times the batch"
    table = [
        ("fine-tuning (no methods)", "none", "by hand", "bare", 0.95 if case.name == "MLP100" else 1.02),
        ("L2", "l2", own, "none", 1.10),
        ("EWC, 10 tasks", "ewc", own, "none", 1.10),
        ("EWC, 10 tasks", "ewc", "by hand", "bare", None),
        ("EWC online, 10 tasks", "ewc online", own, "none", 1.10),
        ("MAS, 10 tasks", "mas", own, "none", 1.10),
        ("EWC and MAS, 10 tasks", "ewc+mas", own, "none", 1.10),
        ("SI, with its penalty", "si", own, "none", 1.25),
        ("SI, with its penalty", "si", "by hand", "bare", None),
        ("Replay", "replay", double, "bare twice", 1.06),
        ("DER++", "derpp", triple, "bare thrice", 1.08),
        ("DER++", "derpp", "DER++ by hand", "bare derpp", None),
        ("LwF", "lwf", own, "none", None),
        ("A-GEM", "agem", "by hand, two passes", "bare two passes", 1.10),
        ("SPG", "spg", "own, task told", "told", 1.30),
        ("HAT", "hat", "own, task told", "told", 1.30),
    ]
    for what, variant, base, loop, goal in table:
        if variant not in runs:
            continue
        yield Row.of(case.name, what, base, seconds, (variant, loop), goal)
    if convolutional:
        yield Row.of(case.name, "fine-tuning (no methods)", "by hand, NCHW", seconds, ("none", "bare NCHW"), 0.75)
