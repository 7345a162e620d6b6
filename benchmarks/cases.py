"""The three models that stand for the whole range, and the training loops by hand that everything is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perdure


@dataclass
class Case:
    """A model, a batch size, how many steps are timed at a time, and data to train on."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    steps: int
    x: Tensor
    y: Tensor

    @property
    def layout(self) -> torch.memory_format:
        """The memory format in which a learner trains the model."""
        return torch.channels_last if self.x.dim() == 4 else torch.contiguous_format

    def plan(self) -> list[Tensor]:
        """Row numbers of every batch of a timed run."""
        draw = torch.Generator().manual_seed(0)
        return [torch.randperm(len(self.x), generator=draw)[: self.batch] for _ in range(self.steps)]


def cases() -> list[Case]:
    """Bound by overhead, by its matrix products, and by its convolutions."""
    draw = torch.Generator().manual_seed(0)
    flat, images = torch.rand(4000, 784, generator=draw), torch.rand(640, 3, 32, 32, generator=draw)
    y = torch.randint(0, 10, (4000,), generator=draw)
    return [
        Case("MLP100", partial(perdure.models.MLP, 784, [100, 100], 10, seed=0), 10, 60, flat, y),
        Case("MLP400", partial(perdure.models.MLP, 784, [400, 400], 10, seed=0), 128, 10, flat, y),
        Case("slim ResNet", partial(perdure.models.SlimResNet18, 3, 10, seed=0), 32, 1, images, y[:640]),
    ]


def bare(case: Case, times: int = 1, layout: torch.memory_format | None = None) -> Callable[[], None]:
    """The loop by hand, on batches of `times` the size, in the learner's memory format unless another is named."""
    layout = layout or case.layout
    model = case.build().to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    plan = [rows.repeat(times) for rows in case.plan()]

    def run() -> None:
        for rows in plan:
            x, y = case.x.index_select(0, rows).contiguous(memory_format=layout), case.y.index_select(0, rows)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return run


def bare_two_passes(case: Case) -> Callable[[], None]:
    """The loop by hand with a second forward and backward pass, over as many other rows, whose gradient is dropped."""
    model = case.build().to(memory_format=case.layout)  # type: ignore[call-overload]
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    plan = case.plan()

    def run() -> None:
        for rows, others in zip(plan, reversed(plan), strict=True):
            optimizer.zero_grad()
            for chosen in (others, rows):
                x, y = case.x.index_select(0, chosen), case.y.index_select(0, chosen)
                loss = F.cross_entropy(model(x.contiguous(memory_format=case.layout)), y)
                if chosen is others:
                    torch.autograd.grad(loss, parameters)
                else:
                    loss.backward()
            optimizer.step()

    return run


def bare_derpp(case: Case, capacity: int = 200, alpha: float = 0.5, beta: float = 0.5) -> Callable[[], None]:
    """DER++ by hand: two draws from a reservoir of tensors, one pass over all rows, three terms."""
    model = case.build().to(memory_format=case.layout)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    draw, plan, batch = torch.Generator().manual_seed(1), case.plan(), case.batch
    x_old, y_old = case.x[:capacity].clone(), case.y[:capacity].clone()
    z_old = torch.zeros(capacity, 10)
    seen = capacity

    def run() -> None:
        nonlocal seen
        for rows in plan:
            x, y = case.x.index_select(0, rows), case.y.index_select(0, rows)
            first = torch.randperm(capacity, generator=draw)[:batch]
            second = torch.randperm(capacity, generator=draw)[:batch]
            every = torch.cat([x, x_old.index_select(0, first), x_old.index_select(0, second)])
            optimizer.zero_grad()
            now, then, again = model(every.contiguous(memory_format=case.layout)).split(batch)
            loss = F.cross_entropy(now, y) + alpha * F.mse_loss(then, z_old.index_select(0, first))
            (loss + beta * F.cross_entropy(again, y_old.index_select(0, second))).backward()
            optimizer.step()
            slots = (torch.rand(batch, generator=draw) * torch.arange(seen + 1, seen + batch + 1)).long()
            chosen = (slots < capacity).nonzero()[:, 0]
            x_old[slots[chosen]], y_old[slots[chosen]] = x[chosen], y[chosen]
            z_old[slots[chosen]] = now.detach()[chosen]
            seen += batch

    return run
