"""Variational Continual Learning: what was learned is a distribution over weights, and the prior of what comes next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from perdure.batch import Batch, Source
from perdure.data.examples import Examples
from perdure.errors import ModelError, UsageError
from perdure.methods.base import Method, check_choice, check_value
from perdure.methods.projection import private_dropout
from perdure.methods.side_passes import frozen_statistics
from perdure.models.bayesian import MeanField, gaussian_kl, mean_field_layers
from perdure.registry import register
from perdure.seeding import generator
from perdure.tree import cat, leaves, rows, take, to_device

if TYPE_CHECKING:
    from perdure.learner import Learner
    from perdure.streams.task import Task

SELECTIONS = ("random", "k_center")


@register("vcl")
@dataclass
class VCL(Method):
    """Keep the posterior over the weights close to the one after the last task, which is the prior of this one.

    loss += strength * KL(q || q_old) / N with Gaussian q over every weight, q_old = N(0, prior_variance) before the
    first task, and N training rows of the task. Training draws one output a row (local reparameterisation); prediction
    is the mean of softmax over `samples` drawn networks, the same for every batch. The model needs mean-field layers:
    `bayesian_mlp`, or any network through `perdure.models.mean_field`.

    Nguyen et al. 2018, arXiv 1710.10628.

    Parameters
    ----------
    strength
        Weight of the divergence, 1 in the paper; 0 switches the method off, prediction included.
    prior_variance
        Of every weight before the first task; more than 0.
    samples
        Networks drawn for a prediction, at least 1.
    coreset
        Rows of each task that are kept, and left out of training: a copy of the weights is refined on those of all
        tasks before prediction, and training goes on from the weights without it. This keeps raw examples.
    selection
        Of these rows: "random" or "k_center" (each as far as possible from those before it, on the raw inputs).
    coreset_steps, coreset_lr
        Updates of the refinement, with Adam, on batches of at most 256 rows.
    """

    strength: float = 1.0
    prior_variance: float = 1.0
    samples: int = 10
    coreset: int = 0
    selection: str = "random"
    coreset_steps: int = 100
    coreset_lr: float = 1e-3

    summary: ClassVar[str] = "a Gaussian over every weight; the posterior of a task is the prior of the next"
    paper: ClassVar[str] = "Nguyen et al. 2018, arXiv 1710.10628"
    use_when: ClassVar[str] = "uncertainty matters and the task is known at test time, or inputs change"
    cost: ClassVar[str] = "time: twice a step, `samples` passes a prediction; memory: 4 P + M D"
    regulariser: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True
    needs_task_data: ClassVar[bool] = True
    scenarios: ClassVar[frozenset[str]] = frozenset({"task", "domain", "class"})
    owns: ClassVar[tuple[str, ...]] = ("predict", "training_data")
    aligned: ClassVar[dict[str, float | str]] = {"prior": "theta", "refined": "theta"}

    def __post_init__(self) -> None:
        check_value(self.name, "strength", self.strength)
        check_value(self.name, "samples", self.samples, 1)
        check_value(self.name, "coreset", self.coreset)
        check_value(self.name, "coreset_steps", self.coreset_steps, 1)
        check_value(self.name, "coreset_lr", self.coreset_lr)
        check_choice(self.name, "selection", self.selection, SELECTIONS)
        if not self.prior_variance > 0:
            raise UsageError(f"vcl: prior_variance is {self.prior_variance!r}, it must be more than 0")

    def has(self, hook: str) -> bool:
        return super().has(hook) and bool(self.strength) and (hook != "training_data" or self.coreset > 0)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        layers = self._layers()
        if not layers:
            raise ModelError(
                "'vcl' needs mean-field layers, and the model has none; use the model 'bayesian_mlp', or change "
                "yours with perdure.models.mean_field(model)"
            )
        self.prior = torch.zeros_like(self.parameters.theta)
        views = self.parameters.views(self.prior)
        for _, log_variance in self._gaussians():
            views[log_variance].fill_(math.log(self.prior_variance))
        self.refined: Tensor | None = None
        self.rows = 0
        self.coresets: dict[str, dict[str, Any]] = {}

    def _layers(self) -> dict[str, MeanField]:
        return mean_field_layers(self.parameters.module)

    def _gaussians(self) -> list[tuple[str, str]]:
        """Names of the means and log-variances that belong together."""
        pairs = [
            (f"{name}.{mean}" if name else mean, f"{name}.{spread}" if name else spread)
            for name, layer in self._layers().items()
            for mean, spread in layer.gaussians()
        ]
        return [pair for pair in pairs if pair[0] in self.parameters.members and pair[1] in self.parameters.members]

    # -- training -------------------------------------------------------------------------------------------------

    def training_data(self, task: Task) -> Task:
        data = task.train
        if not isinstance(data, Examples):
            raise UsageError("vcl: a coreset is chosen among the task's examples; pass arrays or a data set")
        if len(data) <= self.coreset:
            raise UsageError(f"vcl: coreset is {self.coreset}, but task '{task.name}' has only {len(data)} rows")
        # Drawn from what names the task, so that a run resumed inside it leaves out the same rows.
        chosen = choose(data, self.coreset, self.selection, generator(self.learner.seed, self.name, task.index))
        left = torch.ones(len(data), dtype=torch.bool)
        left[chosen] = False
        x, y = data.gather(chosen)
        self.coresets[str(task.index)] = {"x": x, "y": y}
        return replace(task, train=data.subset(left.nonzero()[:, 0]))

    def begin_task(self, task: Task) -> None:
        self.rows, self.refined = _count(task.train), None

    def divergence(self) -> float:
        """KL(q || q_old) now, summed over all Gaussian weights."""
        q, p = self.parameters.views(self.parameters.theta), self.parameters.views(self.prior)
        return sum(float(gaussian_kl(q[m], q[s], p[m], p[s])) for m, s in self._gaussians())

    def add_gradient(self, grad: Tensor) -> None:
        self._pull(self.parameters.views(grad), self.prior, self.strength / self.rows)

    @torch.no_grad()
    def _pull(self, gradients: Mapping[str, Tensor | None], prior: Tensor, factor: float) -> None:
        """Add `factor` times the gradient of the divergence from `prior` [P], in closed form."""
        now, old = self.parameters.views(self.parameters.theta), self.parameters.views(prior)
        for mean, spread in self._gaussians():
            into_mean, into_spread = gradients[mean], gradients[spread]
            if into_mean is not None:
                into_mean.add_((now[mean] - old[mean]).mul_((-old[spread]).exp_()), alpha=factor)
            if into_spread is not None:
                into_spread.add_((now[spread] - old[spread]).expm1_(), alpha=0.5 * factor)

    def end_task(self, task: Task) -> None:
        self.prior = self.parameters.theta.clone()
        if self.coreset:
            self._refine()

    def _refine(self) -> None:
        """Train a copy of the weights on all coresets, with the posterior as prior; leave no other trace."""
        learner, parameters = self.learner, self.parameters
        # Those of a loaded state are on the device already.
        x = cat([to_device(kept["x"], learner.device) for kept in self.coresets.values()])
        y = torch.cat([to_device(kept["y"], learner.device) for kept in self.coresets.values()])
        tasks = torch.cat([torch.full((rows(kept["x"]),), int(i)) for i, kept in self.coresets.items()])
        draws = {name: layer.draws for name, layer in self._layers().items()}
        trained = {name: p for name, p in parameters.members.items() if p.requires_grad}
        optimizer = torch.optim.Adam(trained.values(), lr=self.coreset_lr)
        modes = [(module, module.training) for module in learner.model.modules()]
        if not learner.model.training:
            learner.model.train()
        with self._as(self.prior), frozen_statistics(learner.model), private_dropout(learner.model, learner.device):
            for _ in range(self.coreset_steps):
                part = torch.randperm(len(y), generator=self.generator)[:256]
                batch = Batch((Source("current", take(x, part), y[part.to(y.device)], tasks=tasks[part]),))
                optimizer.zero_grad()
                outputs = learner.forward.batch(batch, learner.shown_task)
                torch.autograd.backward(learner.criterion(outputs, batch, learner.allowed))
                self._pull({name: p.grad for name, p in parameters.members.items()}, self.prior, 1 / len(y))
                optimizer.step()
                learner.passes["forward_rows"] += len(part)
                learner.passes["backward_rows"] += len(part)
            self.refined = parameters.theta.clone()
        for module, training in modes:
            module.training = training
        for name, layer in self._layers().items():
            layer.draws = draws[name]
        parameters.release()

    @contextmanager
    def _as(self, weights: Tensor | None) -> Iterator[None]:
        """The model with other weights [P] (None: its own) for a while."""
        theta = self.parameters.theta
        own = None if weights is None else theta.clone()
        with torch.no_grad():
            if weights is not None:
                theta.copy_(weights)
        try:
            yield
        finally:
            if own is not None:
                with torch.no_grad():
                    theta.copy_(own)

    # -- prediction -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def probabilities(self, x: Any, task: int | None = None) -> Tensor:
        """Mean of softmax over drawn networks [rows, columns], over a task's classes or those seen so far.

        The networks are the same at every call, so it does not matter how rows are batched.
        """
        learner, total = self.learner, None
        classes = learner.classes
        block = classes.index(classes.by_task.get(task, ()) if task is not None else classes.seen)
        noise = generator(learner.seed, self.name, "predict")
        layers = self._layers().values()
        try:
            with self._as(self.refined):
                for _ in range(self.samples):
                    for layer in layers:
                        layer.sample(noise)
                    outputs = learner.outputs(x, task, batch_size=learner.forward.widest_batch)
                    if block is not None:
                        outside = torch.ones(outputs.shape[-1], dtype=torch.bool, device=outputs.device)
                        outside[block] = False
                        outputs = outputs.masked_fill(outside, float("-inf"))
                    each = outputs.softmax(-1)
                    total = each if total is None else total + each
        finally:
            for layer in layers:
                layer.sample(None)
        assert total is not None
        return total / self.samples

    def predict(self, x: Any, task: int | None) -> Tensor:
        return self.learner.classes.argmax(self.probabilities(x, task), task)


def choose(data: Examples, count: int, selection: str, draw: torch.Generator) -> Tensor:
    """`count` different rows, sorted, int64: at random, or greedily each the farthest from those chosen before."""
    if selection == "random":
        return torch.randperm(len(data), generator=draw)[:count].sort().values
    x = torch.cat([leaf.flatten(1).float() for leaf in leaves(data.gather(torch.arange(len(data)))[0])], 1)
    chosen = [int(torch.randint(len(data), (), generator=draw))]
    nearest = torch.full((len(data),), float("inf"))
    while len(chosen) < count:
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
        nearest[chosen] = -1.0  # of equal rows none is taken twice
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen).sort().values


def _count(data: Any) -> int:
    """Training rows of a task."""
    if isinstance(data, Examples):
        return len(data)
    whole = getattr(data, "dataset", None)
    return len(whole) if isinstance(whole, Sized) else sum(rows(pair[0]) for pair in data)
