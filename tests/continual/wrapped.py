"""A small problem, a loop by hand and the five wrappers, for the tests of `perdure.continual`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.continual import EWC, ExperienceReplay, KnowledgeDistillation, L2Regularization, SynapticIntelligence

Batches = list[tuple[Tensor, Tensor]]
loss_fn = nn.CrossEntropyLoss()

WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "ewc": lambda model: EWC(model, importance=5.0, fisher_sample_size=40),
    "replay": lambda model: ExperienceReplay(model, memory_size=20),
    "l2": lambda model: L2Regularization(model, importance=0.5),
    "kd": KnowledgeDistillation,
    "si": lambda model: SynapticIntelligence(model, importance=2.0),
}
OFF: dict[str, Callable[[nn.Module], Any]] = {
    "ewc": lambda model: EWC(model, importance=0),
    "replay": lambda model: ExperienceReplay(model, replay_ratio=0),
    "l2": lambda model: L2Regularization(model, importance=0),
    "kd": lambda model: KnowledgeDistillation(model, alpha=0),
    "si": lambda model: SynapticIntelligence(model, importance=0),
}


def build(seed: int = 0, **options: Any) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)).to(**options)


def batches(task: int, count: int = 5, rows: int = 8) -> Batches:
    """Three classes whose inputs move with the task; no row occurs twice."""
    draw = torch.Generator().manual_seed(100 + task)
    made = []
    for _ in range(count):
        y = torch.randint(3, (rows,), generator=draw)
        x = torch.randn(rows, 5, generator=draw)
        x[torch.arange(rows), (y + task) % 5] += 2.0
        made.append((x, y))
    return made


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def by_hand(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Batches, extra: Callable[[], Tensor] | None = None
) -> None:
    """The loop that everybody writes."""
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if extra is not None:
            loss = loss + extra()
        loss.backward()
        optimizer.step()


def train(wrapper: Any, optimizer: torch.optim.Optimizer, data: Batches, task_id: Any) -> list[float]:
    """The wrapper's loop; a replay wrapper is shown every batch."""
    losses = []
    for x, y in data:
        losses.append(wrapper.train_step(optimizer, loss_fn, x, y, task_id).item())
        if isinstance(wrapper, ExperienceReplay):
            wrapper.add_to_memory(x, y, task_id)
    return losses


def register(wrapper: Any, task_id: Any, data: Batches) -> None:
    """Name a task in the way of the class; replay has none but its steps."""
    if isinstance(wrapper, (EWC, KnowledgeDistillation)):
        wrapper.register_task(task_id, data)
    elif not isinstance(wrapper, ExperienceReplay):
        wrapper.register_task(task_id)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def two_tasks(make: Callable[[nn.Module], Any] | None) -> Tensor:
    """Weights after two tasks of train_step, or of the loop by hand without a wrapper."""
    model = build()
    optimizer = adam(model)
    if make is None:
        by_hand(model, optimizer, batches(1) + batches(2))
        return weights(model)
    wrapper = make(model)
    for task in (1, 2):
        register(wrapper, task, batches(task))
        train(wrapper, optimizer, batches(task), task)
    return weights(model)
