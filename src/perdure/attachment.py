"""The same methods inside a training loop that somebody else owns: plain PyTorch, accelerate, a trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from perdure.batch import Batch, Source
from perdure.criterion import RowLoss
from perdure.errors import IncompatibleError, UsageError
from perdure.flat import FlatStep
from perdure.learner import Learner
from perdure.methods.base import Method
from perdure.methods.projection import private_dropout
from perdure.methods.side_passes import frozen_statistics
from perdure.tree import as_tensors, cat, rows, to_device


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    methods: Sequence[Method] = (),
    *,
    criterion: RowLoss | None = None,
    scenario: str | None = None,
    seed: int = 0,
) -> Guard:
    """Let methods act on every `optimizer.step()` of a loop that stays as it is.

    The loop computes the loss of the current rows; what methods remember or distil gets forward and backward passes
    of its own, just before the optimizer steps. Gradient clipping of the loop's own happens before that, so penalties
    and projections are not clipped. With methods that use gradients and updates alone (EWC, SI, L2, GEM, A-GEM), and
    with replay of separate forward passes that are summed (`forward="separate"`, `weighting="sum"`, DER, DER++), the
    weights are those of `Learner` bit for bit; a pooled mean and LwF are equal to rounding.

    Parameters
    ----------
    model, optimizer
        The loop's own. The parameters become views of one vector; the optimizer stays the object it is.
    methods
        Those that can work from outside: not the ones that own the step, the main loss or the task's data.
    criterion
        The loop's loss of remembered rows, with one value a row or their mean; softmax cross-entropy if left out.
    scenario, seed
        As for `Learner`.

    Raises
    ------
    IncompatibleError
        If a method has to own a part of the loop.
    UsageError
        When the loop calls `optimizer.step(closure)`: the hook would run before the backward pass.

    >>> model = nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> from perdure.methods import Replay
    >>> guard = attach(model, optimizer, methods=[Replay(20)])
    >>> x, y = torch.randn(8, 4), torch.arange(8) % 2
    >>> with guard.task("2026-11"):
    ...     guard.see(x, y)
    ...     optimizer.zero_grad()
    ...     nn.functional.cross_entropy(model(x), y).backward()
    ...     _ = optimizer.step()
    >>> len(guard.learner.methods[0].buffer)
    8
    """
    return Guard(outside_learner(model, optimizer, methods, criterion, scenario, seed), optimizer)


def outside_learner(
    model: nn.Module,
    optimizer: Optimizer,
    methods: Sequence[Method],
    criterion: RowLoss | None,
    scenario: str | None,
    seed: int,
) -> Learner:
    """A learner that never takes a step of its own; raises IncompatibleError for methods that have to."""
    for method in methods:
        if not method.attachable or method.owns or method.has("criterion") or method.has("step"):
            raise IncompatibleError(
                f"'{method.name}' has to own a part of the training loop, so it cannot be attached; use perdure.Learner"
            )
    return Learner(
        model,
        optimizer,
        methods,
        criterion=criterion,
        scenario=scenario,
        seed=seed,
        channels_last=False,
    )


class Guard:
    """What `attach` returns: `task(...)` around a task's loop, `see(x, y)` before each batch, `detach()` at the end.

    `guard.learner` has the methods, and predicts, evaluates and saves. With `closures`, the loop may call
    `optimizer.step(closure)`, and whoever runs the closure calls `before_update()` when the gradient is complete.
    """

    def __init__(self, learner: Learner, optimizer: Optimizer, closures: bool = False) -> None:
        self.learner = learner
        self.optimizer = optimizer
        self.busy = False  # passes through the model are now our own, not the loop's
        self._closures = closures
        self._before = learner.parameters.theta
        self._skipped = False
        self._listener = learner.model.register_forward_hook(self._listen, with_kwargs=True)
        self._handles: list[RemovableHandle] = []
        self.forget()
        self._hook_into(optimizer)

    def _hook_into(self, optimizer: Optimizer) -> None:
        for handle in self._handles:
            handle.remove()
        self.optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self.learner.flat = FlatStep(self.learner.parameters, self.learner.optimizers)

    def follow(self, optimizer: Optimizer) -> None:
        """Act on the steps of another optimizer from here on; the model may have changed in between as well."""
        learner = self.learner
        if optimizer is not self.optimizer:
            # Parameters that are new need a place in the new optimizer alone.
            learner.use_optimizer(partial(torch.optim.SGD, lr=0.0))
        learner.follow_model()
        learner.use_optimizer(optimizer)
        self._hook_into(optimizer)

    def begin(self, name: str, data: Any = None, classes: Sequence[int] = ()) -> None:
        """Begin a task, or go on with the open one that a checkpoint was loaded into."""
        self.busy = True
        try:
            self.learner.begin_task(name, data, classes)
        finally:
            self.busy = False
        self.learner.forward.activate(self.learner.shown_task)

    def end(self) -> None:
        """End the open task."""
        self.forget()
        self.busy = True
        try:
            self.learner.end_task()
        finally:
            self.busy = False

    @contextmanager
    def task(self, name: str, data: Any = None, classes: Sequence[int] = ()) -> Iterator[Guard]:
        """A task: begins it, and ends it unless the loop raised. Arguments as for `Learner.begin_task`."""
        self.begin(name, data, classes)
        yield self
        self.end()

    def see(self, x: Any, y: Any, outputs: Tensor | None = None) -> None:
        """Say which rows the next step is for; once for each batch that the loop accumulates.

        The loop's own `outputs` [rows, columns] are noticed when it calls the model on this very `x`, else given here.
        """
        self._seen.append((x, as_tensors(y)))
        if outputs is not None:
            self._hear(outputs)

    def unsee(self) -> None:
        """Take the last `see` back: its rows went into no backward pass."""
        self._seen.pop()
        del self._answers[len(self._seen) :]

    def forget(self) -> None:
        """Forget what was seen for a step that is not going to be."""
        self._seen: list[tuple[Any, Any]] = []
        self._answers: list[Tensor] = []
        self._batch: Batch | None = None
        self._outputs: Tensor | None = None
        self._begun = False

    def detach(self) -> None:
        """Take every hook off; the loop goes on as if nothing had been attached."""
        for handle in (*self._handles, self._listener):
            handle.remove()

    # -- hooks ----------------------------------------------------------------------------------------------------

    def _listen(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], answer: Any) -> None:
        """Keep the loop's own outputs of the rows it has announced: what DER stores."""
        if self.busy or not self._seen or not torch.is_grad_enabled():
            return
        x = self._seen[-1][0]
        if (inputs and inputs[0] is x) or (
            isinstance(x, dict) and keywords and all(keywords.get(key) is part for key, part in x.items())
        ):
            self._hear(getattr(answer, "logits", answer))

    def _hear(self, outputs: Tensor) -> None:
        if len(self._answers) == len(self._seen) - 1:
            self._answers.append(outputs.detach().to(self.learner.forward.dtype))

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure") is not None or any(callable(argument) for argument in args):
            if self._closures:
                return
            raise UsageError(
                "optimizer.step(closure) runs the backward pass after this hook and would wipe what it adds; call "
                "backward() and then step() without a closure"
            )
        if not self._begun:
            # Nobody clips any more, so penalties may stay out of the gradient; our own hook does not read it.
            self.learner.own_hooks = 1
            try:
                self.before_update()
            finally:
                self.learner.own_hooks = 0

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        learner, batch = self.learner, self._batch
        if self._begun and not self._skipped:
            learner.finish_update(self._before)
        if batch is not None:
            learner.passes["steps"] += 1
            self.busy = True
            try:
                for method in learner.hooks["after_step"]:
                    method.after_step(batch, self._outputs)
            finally:
                self.busy = False
        self.forget()

    def before_update(self) -> None:
        """Let the methods add to the complete, unscaled gradient, and change it."""
        learner = self.learner
        if not learner.parameters.intact():
            learner.follow_model()
        self._begun = True
        self._skipped = self._unscale()
        if self._skipped:
            return
        self.busy = True
        try:
            self._batch = self._current()
            if self._batch is not None:
                self._add_remembered(self._batch)
            self._before = learner.transform_gradient()
        finally:
            self.busy = False

    # -- pieces ---------------------------------------------------------------------------------------------------

    def _unscale(self) -> bool:
        """Undo the scale that a fused optimizer would undo inside its step; true if that step will be skipped."""
        scale = getattr(self.optimizer, "grad_scale", None)
        overflow = getattr(self.optimizer, "found_inf", None)
        if isinstance(overflow, Tensor) and bool(overflow):
            return True
        if isinstance(scale, Tensor):
            gradients = [p.grad for p in self.learner.parameters.members.values() if p.grad is not None]
            torch._foreach_div_(gradients, scale.to(gradients[0].device))
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        return False

    def _current(self) -> Batch | None:
        """The rows that the loop announced since the last step, and the outputs that it had for them."""
        if not self._seen:
            return None
        learner = self.learner
        x = to_device(cat([x for x, _ in self._seen]), learner.device)
        y = to_device(cat([y for _, y in self._seen]), learner.device)
        if len(self._answers) == len(self._seen):
            self._outputs = torch.cat(self._answers)
        elif learner.hooks["after_step"]:
            with torch.no_grad(), frozen_statistics(learner.model), private_dropout(learner.model, learner.device):
                self._outputs = learner.forward(x, learner.shown_task)
        return Batch.current(x, y, learner.task_index)

    def _add_remembered(self, batch: Batch) -> None:
        """Weigh the current rows' gradient, and add that of every other row and term to it."""
        learner = self.learner
        for method in learner.hooks["on_batch"]:
            batch = method.on_batch(batch)
        share = batch.now.share
        pooled = sum(source.size for source in batch.sources if source.share is None)
        weight = batch.now.size / pooled if share is None else share
        gradients = [p.grad for p in learner.parameters.members.values() if p.grad is not None]
        if weight != 1.0 and gradients:
            torch._foreach_mul_(gradients, weight)
        added = [self._weighted(source, pooled) for source in batch.sources[1:]]
        if any(method.distils_current for method in learner.hooks["loss"]):
            added.insert(0, replace(batch.now, share=0.0))
        if not added:
            return
        extra = batch.with_sources(*added)
        outputs = learner.forward.batch(extra, learner.shown_task)
        terms = [learner.criterion(outputs, extra, learner.allowed)] if any(s.share for s in added) else []
        terms += [term for m in learner.hooks["loss"] if (term := m.loss(extra, outputs)) is not None]
        if terms:
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            torch.autograd.backward(total)
        learner.passes["forward_rows"] += rows(outputs)
        learner.passes["backward_rows"] += rows(outputs)
        learner.forward.activate(learner.shown_task)

    @staticmethod
    def _weighted(source: Source, pooled: int) -> Source:
        """A pooled source as one with the share of the mean that its rows make up."""
        return source if source.share is not None else replace(source, share=source.size / pooled)
