"""`make bench`: what a step, an importance pass and an evaluation cost against a loop written by hand.

Every row is a ratio to a hand-written loop that does the same arithmetic, interleaved in one process on one thread.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from benchmarks.timing import interleave, ratio
from perdure.errors import PerdureWarning
from perdure.methods import AGEM, EWC, L2, SI, DERpp, LwF, Method, Replay

STEPS = {"MLP100": 400, "MLP400": 60, "slim ResNet": 6}


@dataclass
class Case:
    """A model, a batch size, and data to train on."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    x: Tensor
    y: Tensor

    def plan(self) -> list[Tensor]:
        """Row numbers of every batch of a timed run."""
        draw = torch.Generator().manual_seed(0)
        return [torch.randperm(len(self.x), generator=draw)[: self.batch] for _ in range(STEPS[self.name])]


def cases() -> list[Case]:
    draw = torch.Generator().manual_seed(0)
    flat, images = torch.rand(4000, 784, generator=draw), torch.rand(640, 3, 32, 32, generator=draw)
    y = torch.randint(0, 10, (4000,), generator=draw)
    return [
        Case("MLP100", partial(perdure.models.MLP, 784, [100, 100], 10, seed=0), 10, flat, y),
        Case("MLP400", partial(perdure.models.MLP, 784, [400, 400], 10, seed=0), 128, flat, y),
        Case("slim ResNet", partial(perdure.models.SlimResNet18, 3, 10, seed=0), 32, images, y[:640]),
    ]


def bare(case: Case, times: int = 1) -> Callable[[], None]:
    """The loop by hand, on batches of `times` the size."""
    model = case.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    plan = [rows.repeat(times) for rows in case.plan()]

    def run() -> None:
        for rows in plan:
            x, y = case.x.index_select(0, rows), case.y.index_select(0, rows)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return run


def learner(case: Case, methods: list[Method], finished: int = 1) -> Callable[[], None]:
    """The same loop through a learner that has `finished` tasks behind it and is inside the next."""
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


def steps(case: Case) -> list[tuple[str, str, str, float | None]]:
    """(row, variant, base, goal) of the table; the variants themselves are made in `main`."""
    small = case.name == "MLP100"
    return [
        ("no methods", "none", "bare", 0.95 if small else 1.02),
        ("L2", "l2", "none", 1.10),
        ("EWC, 10 tasks", "ewc", "none", 1.10),
        ("SI", "si", "none", 1.25),
        ("LwF", "lwf", "none", None),
        ("A-GEM", "agem", "bare", None),
        ("Replay", "replay", "bare x2", 1.06),
        ("DER++", "derpp", "bare x3", 1.08),
    ]


def variants(case: Case) -> dict[str, Callable[[], object]]:
    return {
        "bare": bare(case),
        "bare x2": bare(case, 2),
        "bare x3": bare(case, 3),
        "none": learner(case, []),
        "l2": learner(case, [L2(strength=1e-3)]),
        "ewc": learner(case, [EWC(strength=1e-3)], finished=10),
        "si": learner(case, [SI(strength=1e-3)]),
        "lwf": learner(case, [LwF(strength=1e-3)]),
        "agem": learner(case, [AGEM(per_task=256, batch_size=case.batch)]),
        "replay": learner(case, [Replay(capacity=200)]),
        "derpp": learner(case, [DERpp(capacity=200, forward="joint")]),
    }


def passes(case: Case) -> dict[str, Callable[[], object]]:
    """An importance pass and an evaluation beside the plain passes that they consist of."""
    model = case.build()
    method = EWC()
    made = perdure.Learner(model, methods=[method])
    rows = min(len(case.x), 1024)
    batches = list(zip(case.x[:rows].split(128), case.y[:rows].split(128), strict=True))

    def plain() -> None:
        for x, y in batches:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()

    def forward() -> None:
        with torch.no_grad():
            for x, _ in batches:
                model(x)

    return {
        "plain": plain,
        "fisher": lambda: method.estimate(iter(batches)),
        "forward": forward,
        "outputs": lambda: made.outputs(case.x[:rows], batch_size=128),
    }


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PerdureWarning)
    print("| model | what | ratio | rounds | to | goal |\n|---|---|---|---|---|---|")
    for case in cases():
        seconds = interleave(variants(case))
        rows = [(what, *ratio(seconds, variant, base), base, goal) for what, variant, base, goal in steps(case)]
        seconds = interleave(passes(case))
        rows.append(("Fisher (Rademacher)", *ratio(seconds, "fisher", "plain"), "plain pass", 1.6))
        rows.append(("outputs", *ratio(seconds, "outputs", "forward"), "plain forward", 1.15))
        for what, median, low, high, base, goal in rows:
            target = "" if goal is None else f"{goal:.2f}"
            print(f"| {case.name} | {what} | {median:.2f} | {low:.2f} to {high:.2f} | {base} | {target} |", flush=True)


if __name__ == "__main__":
    main()
