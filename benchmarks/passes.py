"""What a pass over data costs beside training: importances, and the evaluation of many tasks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

import perdure
from benchmarks.cases import Case
from benchmarks.rows import Row
from benchmarks.timing import interleave
from perdure.data.examples import Examples
from perdure.methods import EWC
from perdure.streams.task import Stream, Task


def fisher(case: Case) -> Iterator[Row]:
    """The Fisher diagonal of every sample's own gradient, against a plain forward and backward pass."""
    estimators = {"Rademacher": "rademacher", "sampled label": "sample", "true label": "empirical"}
    made = {what: EWC(fisher=kind) for what, kind in estimators.items()}
    for method in made.values():
        perdure.Learner(case.build(), methods=[method])
    model = case.build()
    x = case.x.contiguous(memory_format=case.layout)
    batches = list(zip(x.split(128), case.y.split(128), strict=True))

    def plain() -> None:
        for x, y in batches:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()

    runs = {what: lambda method=method: method.estimate(iter(batches)) for what, method in made.items()}
    seconds = interleave({"plain": plain, **runs}, rounds=15)
    goal = 1.6 if case.name.startswith("MLP") else None
    for what in estimators:
        yield Row.of(case.name, f"Fisher, {what}", "a plain pass", seconds, (what, "plain"), goal)


def evaluation(case: Case, tasks: int = 20, size: int = 500, classes: int = 5) -> Iterator[Row]:
    """Both views of every task's accuracy, against gathering the same rows and sending them through the model."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(tasks * size, 784, generator=draw)
    made = []
    for task in range(tasks):
        rows = torch.arange(task * size, (task + 1) * size)
        y = torch.randint(task * classes, (task + 1) * classes, (size,), generator=draw)
        part = Examples(x, y, rows=rows)
        made.append(Task(task, str(task), part, part, tuple(range(task * classes, (task + 1) * classes))))
    stream = Stream(made, scenario="class")
    model = perdure.models.MLP(784, [100, 100], tasks * classes, seed=0)
    learner = perdure.Learner(model)
    learner.adopt(stream)
    for task in stream:
        learner.classes.open(task.index, task.classes)

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            for rows in torch.arange(len(x)).split(256):
                model(x.index_select(0, rows))

    seconds = interleave({"forward": forward, "evaluate": lambda: learner.evaluate(stream)}, rounds=49)
    yield Row.of(case.name, "evaluation of 20 tasks", "the forward pass", seconds, ("evaluate", "forward"), 1.15)
