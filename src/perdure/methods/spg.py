"""SPG: every weight may move the less, the more the gradients of old tasks stood out there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from perdure.batch import Batch
from perdure.errors import DataError
from perdure.methods.base import check_choice, check_value
from perdure.methods.masks import UpdateMask
from perdure.methods.per_sample import call
from perdure.methods.side_passes import eval_mode, frozen_statistics
from perdure.methods.task_parts import below, of_norms, of_other_tasks, output_layers
from perdure.models.task_norm import TaskNorm
from perdure.parameters import average_over_processes
from perdure.registry import register
from perdure.seeding import derive
from perdure.tree import rows

if TYPE_CHECKING:
    from perdure.learner import Learner
    from perdure.streams.task import Task


@register("spg")
@dataclass
class SPG(UpdateMask):
    """Soft-mask the step of every weight by how much the old tasks' gradients stood out there.

    After task t: gamma_i = max over tau <= t of |tanh((G_tau,i - mean G_tau) / std G_tau)|, with mean and (unbiased)
    standard deviation over the tensor that weight i is in; a_i <- max(a_i, gamma_i). In later tasks: theta_i <-
    before_i + (1 - strength a_i) (theta_i - before_i), and for the head with the mean of all a in the place of a_i.

    G_t is the gradient of the task's loss over all its data, G_tau that of the sum of all logits of the older head tau
    on the same data (cross-head importance). Normalisation layers get a copy a task.

    Konishi et al. 2023, arXiv 2306.14775.

    Parameters
    ----------
    strength
        Factor of the importance in the mask, 0 to 1: 1 is the paper, 0 switches the method off.
    mask_on
        "update": what the optimizer did is scaled, right for any optimizer. "gradient": the paper's form, the same
        under SGD without momentum and weight decay, and refused with anything else.
    cross_head
        Whether the logits of older heads count too.
    importance_mode
        Of the pass for importance: "eval", or "train" (dropout active, norms by the batch) as in the published code.
    head
        Names or patterns of the layers that give the outputs; default: `multi`, `growing` heads, else the last layer.
    """

    strength: float = 1.0
    mask_on: str = "update"
    cross_head: bool = True
    importance_mode: str = "eval"
    head: tuple[str, ...] = ()

    summary: ClassVar[str] = "soft-mask each weight's step by how much old tasks' gradients stood out there"
    paper: ClassVar[str] = "Konishi et al. 2023, arXiv 2306.14775"
    use_when: ClassVar[str] = (
        "the task is known in training and at test time, no old data may be kept, and tasks are alike enough to share "
        "weights"
    )
    cost: ClassVar[str] = (
        "time: three vector operations a step, 1 forward and t+1 backward passes over the task at its end; memory: 2 P"
    )
    needs_task_data: ClassVar[bool] = True
    aligned: ClassVar[dict[str, float | str]] = {"importance": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value(self.name, "strength", self.strength, 0, 1)
        check_choice(self.name, "importance_mode", self.importance_mode, ("eval", "train"))
        self.head = (self.head,) if isinstance(self.head, str) else tuple(self.head)

    def setup(self, learner: Learner) -> None:
        super().setup(learner)
        self.importance: Tensor | None = None
        if self.strength:
            self._heads()

    def _heads(self) -> dict[str, nn.Module]:
        return output_layers(self.parameters.module, self.head)

    def _shared(self) -> Tensor:
        """Boolean [P]: the feature extractor, which all tasks share."""
        return self.parameters.mask() & ~below(self.parameters, list(self._heads())) & ~of_norms(self.parameters)

    # -- using ----------------------------------------------------------------------------------------------------

    def protection(self) -> Tensor | None:
        task = self.learner.task_index
        if self.importance is None or task is None:
            return None
        heads = self._heads()
        shared = self._shared()
        # The rule of the paper: the head follows what the features are allowed to do, on average.
        mean = self.importance[shared].mean() if bool(shared.any()) else self.importance.new_zeros(())
        a = torch.where(below(self.parameters, list(heads)), mean, self.importance).mul_(self.strength)
        return a.masked_fill_(of_other_tasks(self.parameters, heads, task, self.learner.classes.by_task), 1.0)

    # -- finding --------------------------------------------------------------------------------------------------

    def end_task(self, task: Task) -> None:
        found = self.estimate(task, self.learner.task_batches(task))
        self.importance = found if self.importance is None else torch.maximum(self.importance, found)
        self.forget_mask()

    def estimate(self, task: Task, batches: Iterable[tuple[Any, Tensor]]) -> Tensor:
        """gamma [P] of the current weights on prepared batches of `task`; 0 outside the feature extractor.

        Raises
        ------
        DataError
            If there is no data, or a gradient is not finite.
        """
        gradients = self._gradients(task, batches)
        best = torch.zeros_like(gradients[0])
        for gradient in gradients:
            average_over_processes(self.learner.model, gradient)
            if not bool(gradient.isfinite().all()):
                raise DataError(f"{self.name}: the gradient is not finite; training diverged or the data holds NaN")
            for slot in self.parameters.layout:
                part = slot.view(best)
                torch.maximum(part, prominence(slot.view(gradient)), out=part)
        return best.masked_fill_(~self._shared(), 0.0)

    def _gradients(self, task: Task, batches: Iterable[tuple[Any, Tensor]]) -> list[Tensor]:
        """G_tau [P] for every head tau, summed over all rows."""
        learner, module = self.learner, self.parameters.module
        trained = {name: p for name, p in self.parameters.members.items() if p.requires_grad}
        kind = torch.promote_types(self.parameters.theta.dtype, torch.float32)
        sums: dict[int, Tensor] = {}
        with ExitStack() as stack:
            if self.importance_mode == "eval":
                stack.enter_context(eval_mode(module))
            else:
                stack.enter_context(frozen_statistics(module))
                device = learner.device
                stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
                torch.manual_seed(derive(learner.seed, "method", self.name, task.index))
            stack.callback(lambda: learner.forward.activate(learner.shown_task))
            for x, y in batches:
                for tau, objective in self._objectives(task, x, y):
                    total = sums.setdefault(tau, torch.zeros_like(self.parameters.theta, dtype=kind))
                    views = self.parameters.views(total)
                    found = torch.autograd.grad(objective, list(trained.values()), retain_graph=True, allow_unused=True)
                    for name, gradient in zip(trained, found, strict=True):
                        if gradient is not None:
                            views[name].add_(gradient)
        if not sums:
            raise DataError(f"{self.name}: task '{task.name}' has no data to find importances on")
        return list(sums.values())

    def _objectives(self, task: Task, x: Any, y: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The scalar of every head whose gradient counts, for a prepared batch."""
        forward, module = self.learner.forward, self.parameters.module
        known = self.learner.classes.by_task
        wanted = [tau for tau in known if tau == task.index or self.cross_head]
        forward.activate(task.index)
        heads = [head for head in forward.heads if not isinstance(head, TaskNorm)]
        if all(hasattr(head, "together") and head.together(wanted) for head in heads):
            for head in heads:
                head.activate(tuple(wanted))
            outputs = call(module, x)
            for tau in wanted:
                yield tau, self._objective(task, tau, outputs, x, y)
        else:
            for tau in wanted:
                for head in heads:
                    head.activate(tau)
                yield tau, self._objective(task, tau, call(module, x), x, y)

    def _objective(self, task: Task, tau: int, outputs: Tensor, x: Any, y: Tensor) -> Tensor:
        columns = self.learner.classes.index(self.learner.classes.by_task[tau])
        assert columns is not None
        if tau != task.index:
            return outputs[..., columns].sum()
        batch = Batch.current(x, y, task.index)
        allowed: Any = columns
        if isinstance(columns, Tensor):
            allowed = torch.zeros(1, outputs.shape[-1], dtype=torch.bool, device=outputs.device)
            allowed[0, columns] = True
        batch = batch.with_sources(replace(batch.now, allowed=allowed))
        # A sum over rows, where the published code adds up means of batches: the same direction, but for a last batch
        # that is shorter, and then independent of how the data is cut.
        loss: Tensor = self.learner.criterion(outputs, batch, self.learner.allowed) * rows(x)
        return loss


def prominence(gradient: Tensor) -> Tensor:
    """|tanh| of a gradient standardised over its tensor: how far each value stands out, in [0, 1].

    A tensor of one value, or of equal ones, has nothing that stands out and gives zeros.

    >>> prominence(torch.tensor([1.0, 2.0, 3.0]))
    tensor([0.7616, 0.0000, 0.7616])
    >>> prominence(torch.tensor([5.0]))
    tensor([0.])
    """
    if gradient.numel() < 2:
        return torch.zeros_like(gradient)
    # Neither shift nor scale matters to the result. Taking one value off makes equal ones exactly zero, and scaling
    # keeps squares of tiny gradients from underflowing.
    shifted = gradient - gradient.flatten()[0]
    largest = shifted.abs().amax()
    scaled = shifted / torch.where(largest > 0, largest, torch.ones_like(largest))
    deviation = scaled.std()
    standard = (scaled - scaled.mean()) / torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    return standard.tanh_().abs_().masked_fill_(deviation == 0, 0.0)
