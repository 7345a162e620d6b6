"""Streams, models and plain-PyTorch arithmetic that are small enough to check every method by hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.batch import Batch
from perdure.data.examples import Examples
from perdure.methods import Method
from perdure.models.heads import GrowingHead, MultiHead
from perdure.parameters import ParameterVector
from perdure.streams.task import Stream, Task

FEATURES = 5
sgd = partial(torch.optim.SGD, lr=0.1)
momentum = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def toy_stream(scenario: str = "class", tasks: int = 3, rows: int = 40, dtype: torch.dtype = torch.float32) -> Stream:
    """Two noisy classes a task; the same two in every task if the scenario is "domain". No row occurs twice."""
    made = []
    for index in range(tasks):
        draw = torch.Generator().manual_seed(100 + index)
        y = torch.arange(rows) % 2
        x = torch.randn(rows, FEATURES, generator=draw)
        x[:, index % FEATURES] += 2.0 * y
        if dtype == torch.uint8:
            x = (x * 20 + 128).clamp(0, 255).to(dtype)
        if scenario != "domain":
            y = y + 2 * index
        classes = (0, 1) if scenario == "domain" else (2 * index, 2 * index + 1)
        made.append(Task(index, f"t{index}", Examples(x, y), Examples(x[:10], y[:10]), classes))
    return Stream(made, scenario=scenario, seed=0)


def toy_model(outputs: int = 6, head: str | None = None, norm: bool = False, seed: int = 1) -> Any:
    """One hidden layer of 7, with dropout-free batch normalisation if asked for; `body` and `head` are its parts."""
    heads = {None: None, "growing": GrowingHead(7, seed=3), "multi": MultiHead(7, seed=3)}
    model: Any = perdure.models.MLP(FEATURES, [7], outputs, head=heads[head], seed=seed)
    if norm:
        model.body.insert(1, nn.BatchNorm1d(7))
    return model


def weights(model: nn.Module) -> Tensor:
    """All parameters as one new vector, in the order of the module."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def values(parameters: ParameterVector, vector: Tensor) -> Tensor:
    """A vector [P] without the gaps between parameters, which must be zero: as `weights` and `gradient_of` give it."""
    real = parameters.mask()
    assert not vector[~real].any(), "something was written between two parameters"
    return vector[real]


def spread(parameters: ParameterVector, values: Tensor) -> Tensor:
    """The opposite of `values`: a vector [P]."""
    vector = torch.zeros_like(parameters.theta, dtype=values.dtype)
    vector[parameters.mask()] = values
    return vector


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def batches(stream: Stream, index: int, epochs: int = 1, batch_size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """The batches that `fit` gives, as (inputs, targets)."""
    task = stream[index]
    pairs = [task.train.gather(rows) for rows in stream.plan(task, epochs=epochs, batch_size=batch_size)]
    return [(stream.prepare(x), y) for x, y in pairs]


def masked_cross_entropy(logits: Tensor, y: Tensor, columns: Sequence[Sequence[int]]) -> Tensor:
    """Mean over rows of the cross-entropy over each row's own columns, row by row."""
    terms = []
    for row, target, own in zip(logits, y.tolist(), columns, strict=True):
        terms.append(torch.logsumexp(row[list(own)], 0) - row[target])
    return torch.stack(terms).mean()


def current_loss(logits: Tensor, y: Tensor, task: Task, scenario: str) -> Tensor:
    """The plain loss of current rows: over the task's columns if it is known, else over all."""
    if scenario == "task":
        return masked_cross_entropy(logits, y, [task.classes] * len(y))
    return F.cross_entropy(logits, y)


def gradient_of(loss: Tensor, model: nn.Module) -> Tensor:
    """Plain autograd's gradient as one vector, zero where a parameter took no part."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def sgd_step(model: nn.Module, gradient: Tensor, lr: float = 0.1) -> None:
    """Plain gradient descent with one flat gradient."""
    with torch.no_grad():
        start = 0
        for p in model.parameters():
            p.sub_(lr * gradient[start : start + p.numel()].view_as(p))
            start += p.numel()


class Watcher(Method):
    """Keeps what every step looked like: its batch, raw gradient, final gradient and weights before and after."""

    name = "zz_watcher"
    needs_update = True
    ranks = {"on_batch": 99, "observe_gradient": 99, "project_gradient": 99, "on_update": 99}  # noqa: RUF012

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_batch(self, batch: Batch) -> Batch:
        self.steps.append({"batch": batch})
        return batch

    def arguments(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def observe_gradient(self, grad: Tensor) -> None:
        self.steps[-1]["raw"] = grad.clone()

    def project_gradient(self, grad: Tensor) -> None:
        self.steps[-1]["final"] = grad.clone()

    def on_update(self, before: Tensor, theta: Tensor) -> None:
        self.steps[-1] |= {"before": before.clone(), "after": theta.clone()}
