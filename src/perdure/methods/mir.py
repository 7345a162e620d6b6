"""MIR: of many remembered rows, replay those whose loss the next step would raise most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from perdure.batch import Batch, Source
from perdure.methods.base import Method, check_count, check_value
from perdure.methods.loss_scale import finish_gradients, loss_scale
from perdure.methods.projection import private_dropout
from perdure.methods.replay import check_buffer, columns_of, make_buffer
from perdure.methods.side_passes import eval_mode
from perdure.registry import register
from perdure.tree import take, to_device

if TYPE_CHECKING:
    from perdure.learner import Learner


@register("mir")
@dataclass
class MIR(Method):
    """Replay the remembered rows with which the current step interferes most.

    With g the gradient of the current rows and theta_v = theta - lr * g: draw `candidates` remembered rows, score each
    by s = loss(x; theta_v) - loss(x; theta), and take the `batch_size` highest. Then g += gradient of their mean loss,
    and there is one update. The virtual step is plain gradient descent, whatever the optimizer.

    Aljundi et al. 2019, arXiv 1908.04742.

    Parameters
    ----------
    capacity
        Examples kept in total; 0 switches the method off. None with `bytes_budget`.
    candidates
        Rows drawn and scored in a step. No more than `batch_size`: nothing is scored, and this is replay with
        weighting "sum".
    batch_size
        Rows that are replayed in a step; 0 switches the method off.
    lr
        Of the virtual step; by default each parameter's own learning rate at the moment.
    compare_to_old_logits
        Score by loss(x; theta_v) - min(loss(x; theta), the smallest loss that the row was ever seen to have).
    writing, reading, bytes_budget
        See `Replay`.
    """

    capacity: int | None = 1000
    candidates: int = 50
    batch_size: int = 10
    lr: float | None = None
    compare_to_old_logits: bool = False
    writing: str = "reservoir"
    reading: str = "uniform"
    bytes_budget: int | None = None

    summary: ClassVar[str] = "replay the past examples that the step would hurt most"
    paper: ClassVar[str] = "Aljundi et al. 2019, arXiv 1908.04742"
    use_when: ClassVar[str] = "as replay, with few replayed rows a step from a buffer that is much larger"
    cost: ClassVar[str] = (
        "time: one more step over batch_size rows and two forward passes over the candidates; memory: M D"
    )
    stores_examples: ClassVar[bool] = True
    # Before penalties are added: the virtual step follows the loss of the current rows alone.
    ranks: ClassVar[dict[str, int]] = {"add_gradient": 10}
    transient: ClassVar[tuple[str, ...]] = ("_augmented",)

    forward: ClassVar[str] = "separate"

    def __post_init__(self) -> None:
        check_buffer(self)
        check_count(self.name, "candidates", self.candidates)
        if self.lr is not None:
            check_value(self.name, "lr", self.lr)

    def has(self, hook: str) -> bool:
        return super().has(hook) and 0 not in (self.capacity, self.batch_size)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.buffer = make_buffer(self)
        self._augmented: Callable[[Any], Any] = lambda x: x

    def on_batch(self, batch: Batch) -> Batch:
        self._augmented = batch.augmented
        return batch

    def add_gradient(self, grad: Tensor) -> None:
        if not len(self.buffer):
            return
        drawn = self.buffer.sample(max(self.candidates, self.batch_size))
        source = self._source(drawn)
        if source.size > self.batch_size:
            chosen = self.scores(source, grad, drawn).topk(self.batch_size).indices
            tasks = None if source.tasks is None else source.tasks[chosen.cpu()]
            source = Source("mir", take(source.x, chosen), take(source.y, chosen), tasks=tasks)
        self._replay(source, grad)

    def after_step(self, batch: Batch, outputs: Tensor | None) -> None:
        if not batch.first_pass:
            return
        columns = columns_of(batch.now, batch.task)
        if self.compare_to_old_logits:
            assert outputs is not None
            with torch.no_grad():
                columns["least"] = batch.now.only_new(self._rows_loss(batch.now, outputs[: batch.now.size]))
        self.buffer.add(columns)

    # -- pieces ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scores(self, source: Source, grad: Tensor, drawn: dict[str, Any]) -> Tensor:
        """How much a plain step along `grad` [P] would raise each row's loss [rows]; the model stays as it is."""
        before = self._losses(source)
        with self._stepped(grad):
            after = self._losses(source)
        if self.compare_to_old_logits:
            before = torch.minimum(before, to_device(drawn["least"], before.device))
            self.buffer.update(drawn["slot"], {"least": before})
        return after - before

    def _source(self, drawn: dict[str, Any]) -> Source:
        device = self.learner.device
        x = self._augmented(to_device(drawn["x"], device))
        return Source("mir", x, to_device(drawn["y"], device), tasks=drawn["task"])

    def _losses(self, source: Source) -> Tensor:
        """Each row's loss in evaluation mode, so that no running statistics and no dropout take part."""
        learner = self.learner
        with eval_mode(learner.model):
            outputs = learner.forward.batch(Batch((source,), learner.task_index), learner.shown_task)
        learner.passes["forward_rows"] += source.size
        return self._rows_loss(source, outputs)

    def _rows_loss(self, source: Source, outputs: Tensor) -> Tensor:
        learner = self.learner
        return learner.criterion.rows(outputs, source.y, learner.allowed(source, outputs.shape[-1]))

    @contextmanager
    def _stepped(self, grad: Tensor) -> Iterator[None]:
        """The model after a plain step along `grad` [P], and afterwards the same bits as before."""
        theta, own = self.parameters.theta, self.parameters.scratch
        own.copy_(theta)
        try:
            theta.sub_(self._rates() * grad)
            yield
        finally:
            theta.copy_(own)

    def _rates(self) -> Tensor | float:
        """The virtual step's learning rate: one for all, or a vector [P]."""
        if self.lr is not None:
            return self.lr
        rates = self.learner.optimizers.learning_rates()
        if len(set(rates.values())) == 1:
            return next(iter(rates.values()))
        return self.parameters.pack({name: torch.tensor(rate) for name, rate in rates.items()})

    def _replay(self, source: Source, grad: Tensor) -> None:
        """Add the gradient of the chosen rows' mean loss."""
        learner = self.learner
        batch = Batch((source,), learner.task_index)
        with private_dropout(learner.model, learner.device):
            outputs = learner.forward.batch(batch, learner.shown_task)
            loss = learner.criterion(outputs, batch, learner.allowed)
            scale = loss_scale(learner)
            gradient = self.parameters.gradient(loss if scale is None else loss * scale)
        learner.passes["forward_rows"] += source.size
        learner.passes["backward_rows"] += source.size
        finish_gradients(learner, [gradient], scale)
        grad.add_(gradient)
        views = self.parameters.views(grad)
        for name, parameter in self.parameters.members.items():
            # Another task's head, idle in the current rows' pass, moves if replayed rows went through it.
            if parameter.grad is None and bool(views[name].any()):
                parameter.grad = views[name]
