"""Two small tasks, and what they are compared with: the learner, which trains by its own loop."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import perdure
from perdure.methods import AGEM, EWC, L2, MAS, SI, DERpp, LwF, Method, Replay

# With momentum: under plain SGD a learner's penalties pull the weights, and a trainer's stay in the gradient.
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5)
ADAMW = partial(torch.optim.AdamW, lr=0.01)
OPTIMIZERS = {"sgd": SGD, "adamw": ADAMW}

Rows = tuple[Any, Tensor]

EXACT: dict[str, Callable[[], list[Method]]] = {
    "nothing": list,
    "ewc": lambda: [EWC(strength=1)],
    "si": lambda: [SI(strength=1)],
    "l2": lambda: [L2(strength=0.1)],
    "mas": lambda: [MAS(strength=0.1)],
    "agem": lambda: [AGEM(per_task=10)],
    "replay": lambda: [Replay(20, weighting="sum", forward="separate")],
    "derpp": lambda: [DERpp(20)],
}
ROUNDED: dict[str, Callable[[], list[Method]]] = {
    "lwf": lambda: [LwF()],
    "pooled": lambda: [Replay(20)],
    "lwf and replay": lambda: [LwF(replayed=True), Replay(20)],
}
BOTH = EXACT | ROUNDED
OFF: dict[str, Callable[[], list[Method]]] = {
    "ewc": lambda: [EWC(strength=0)],
    "si": lambda: [SI(strength=0)],
    "lwf": lambda: [LwF(strength=0)],
    "replay": lambda: [Replay(0)],
    "several": lambda: [EWC(strength=0), LwF(strength=0), Replay(0)],
}
RESUMED: dict[str, Callable[[], list[Method]]] = {
    "ewc and derpp": lambda: [EWC(strength=1), DERpp(10)],
    "si and replay": lambda: [SI(strength=1), Replay(10)],
    "lwf": lambda: [LwF()],
}


def batches(task: Rows, size: int) -> list[Rows]:
    """A task in order, as both trainers read it here."""
    x, y = task
    return [
        ({k: v[i : i + size] for k, v in x.items()} if isinstance(x, dict) else x[i : i + size], y[i : i + size])
        for i in range(0, len(y), size)
    ]


def by_learner(
    model: nn.Module,
    tasks: list[Rows],
    methods: list[Method],
    optimizer: Any,
    size: int = 8,
    epochs: int = 1,
    fresh: bool = True,
    **options: Any,
) -> perdure.Learner:
    """The tasks by the learner's own loop, with a new optimizer a task as a new training has one."""
    learner = perdure.Learner(model, optimizer, methods, channels_last=False, **options)
    for number, task in enumerate(tasks):
        if fresh and number:
            learner.optimizers.reset()
        learner.begin_task(f"task {number}", batches(task, size))
        for _ in range(epochs):
            for x, y in batches(task, size):
                learner.step(x, y)
        learner.end_task()
    return learner


def theta(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).clone()
