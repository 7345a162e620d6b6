"""HAT: every task learns which units it needs, and later tasks leave the weights into those units alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from perdure.errors import PerdureWarning, UsageError
from perdure.methods.base import check_value
from perdure.methods.gates import GATE, Gate, Link, check_covered, gated_layers, trace
from perdure.methods.masks import UpdateMask
from perdure.methods.task_parts import (
    check_heads,
    check_own_rows,
    check_plain_model,
    of_norms,
    of_other_tasks,
    output_layers,
)
from perdure.parameters import Slot
from perdure.registry import register

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner
    from perdure.streams.task import Task

# Where the compensation of the gradient and the embeddings are cut off: the constants of the published code.
_STEEPEST, _FARTHEST = 50.0, 6.0


@register("hat")
@dataclass
class HAT(UpdateMask):
    """Gate every unit by a learned attention a task, and keep the weights into units that old tasks use.

    A unit's output is multiplied by a = sigmoid(s e) with an embedding e a task; s rises from 1/smax to smax in each
    pass over the data, and is smax in prediction.

    loss += strength * sum a (1 - c) / sum (1 - c), where c = max over old tasks of sigmoid(smax e); theta_ij <-
    before_ij + (1 - min(c_i, c_j)) (theta_ij - before_ij) for the weight from unit j into unit i, with c_i alone for a
    bias or an input of the model; the gradient of e is multiplied by (smax / s) (cosh(s e) + 1) / (cosh(e) + 1), and e
    stays within -6 and 6.

    Serra et al. 2018, arXiv 1801.01423. The gates are parameters of the layers whose units they gate, trained by your
    own optimizer. A normalisation layer gets a copy a task, and a wide head keeps other tasks' rows still.

    Parameters
    ----------
    strength
        Weight of the regulariser that keeps units free for later tasks. 0 switches the whole method off, its gates too.
    smax
        Steepest slope of the gates: more than 1.
    mask_on
        "update" or, with plain SGD alone, "gradient": see `SPG`.
    anneal_steps
        Updates in which s rises once; by default those of one pass over the task's data.
    head
        Names or patterns of the layers that give the outputs: one Linear layer, or heads of which each task has its
        own. Default: heads of perdure's, else the last layer.
    first_task_only
        Names or patterns of parameters that cannot be gated, which learn in the first task and are kept from then on.
    """

    strength: float = 0.75
    smax: float = 400.0
    mask_on: str = "update"
    anneal_steps: int | None = None
    head: tuple[str, ...] = ()
    first_task_only: tuple[str, ...] = ()

    summary: ClassVar[str] = "learn which units each task needs and keep the weights into them"
    paper: ClassVar[str] = "Serra et al. 2018, arXiv 1801.01423"
    use_when: ClassVar[str] = (
        "the task is known in training and at test time, no old data may be kept, next to nothing may be forgotten, "
        "and the network has units to spare and no skip connections"
    )
    cost: ClassVar[str] = "time: three vector operations a step and one product a gated layer; memory: 2 P + U T"
    adds_parameters: ClassVar[bool] = True
    transient: ClassVar[tuple[str, ...]] = (
        *UpdateMask.transient,
        "_layers",
        "_heads",
        "_links",
        "_handles",
        "_task",
        "_slots",
        "_pushed",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value(self.name, "strength", self.strength)
        check_value(self.name, "smax", self.smax, 1)
        if self.anneal_steps is not None:
            check_value(self.name, "anneal_steps", self.anneal_steps, 1)
        self.head = (self.head,) if isinstance(self.head, str) else tuple(self.head)
        only = self.first_task_only
        self.first_task_only = (only,) if isinstance(only, str) else tuple(only)

    # -- life -----------------------------------------------------------------------------------------------------

    def setup(self, learner: Learner) -> None:
        for handle in getattr(self, "_handles", ()):
            handle.remove()
        super().setup(learner)
        self.used: dict[str, Tensor] = {}
        self.steps = 0
        self.period: int | None = None
        self._task: int | None = None
        self._links: dict[str, Link] = {}
        self._handles: list[RemovableHandle] = []
        if not self.strength:
            return
        module = self.parameters.module
        check_plain_model(self.name, learner, "gates layers by hooks and adds parameters at every task")
        self._heads = output_layers(module, self.head)
        check_heads(self.name, self._heads)
        self._layers = gated_layers(module, self._heads)
        # The gates are parameters of the model, and the optimizer of the caller trains them: unscaling, clipping,
        # schedules, checkpoints and moments are then those of every other parameter, in a loop of his own as well. An
        # embedding a task, not one for all: no moment of the last task moves the next one's, and what is finished has
        # no gradient, so nothing moves it any more.
        for layer in self._layers.values():
            layer.add_module(GATE, Gate(layer))
        self._check()
        self._handles.append(module.register_forward_pre_hook(self._find_links, with_kwargs=True))

    def _check(self) -> None:
        kept = of_norms(self.parameters)
        if self.first_task_only:
            kept |= self.parameters.mask(self.first_task_only)
        check_covered(self.parameters, self._layers, self._heads, kept)

    def gates(self) -> dict[str, Gate]:
        """The gates of every gated layer, by the layer's name."""
        return {name: getattr(layer, GATE) for name, layer in self._layers.items()}

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        check_own_rows(self.name, self._heads, task, self.learner.classes.by_task)
        for gate in self.gates().values():
            if task.index not in gate:
                gate.draw(task.index, self.generator)
        self.learner.follow_model()
        self._check()
        self.steps, self.period, self._task = 0, self.anneal_steps, task.index
        used = self.capacity()["total"]
        if used > 0.95:
            warnings.warn(
                f"{self.name}: {used:.0%} of the units are used by old tasks, so task '{task.name}' has hardly any to "
                "learn with; use a wider model or a larger strength",
                PerdureWarning,
                stacklevel=2,
            )

    def capacity(self) -> dict[str, float]:
        """The fraction of units that old tasks use (c > 1/2), of every gated layer and in "total"."""
        units = {name: gate.units for name, gate in self.gates().items()}
        used = {name: float((self.used[name] > 0.5).sum()) if name in self.used else 0.0 for name in units}
        total = sum(used.values()) / sum(units.values())
        return {name: used[name] / units[name] for name in units} | {"total": total}

    def memory_bytes(self) -> int:
        embeddings = [p for gate in self.gates().values() for p in gate.parameters()] if self.strength else []
        return super().memory_bytes() + sum(p.numel() * p.element_size() for p in embeddings)

    def forget_mask(self) -> None:
        super().forget_mask()
        self._slots: list[Slot] = []
        self._pushed: list[Tensor] | None = None

    # -- gates ----------------------------------------------------------------------------------------------------

    def _find_links(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first forward pass: who reads whose units. Only an input can tell."""
        self._handles.pop().remove()
        self._links = trace(module, self._layers, self._heads, args, kwargs)
        for name, link in self._links.items():
            if link.source is not None:
                reader = module.get_submodule(name)
                self._handles.append(reader.register_forward_pre_hook(self._gating(link)))

    def _gating(self, link: Link) -> Any:
        # Where units are read and not where they are written: after the activation, pooling and normalisation.
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            assert link.source is not None
            gate: Gate = getattr(self._layers[link.source], GATE)
            self._measure_pass(len(args[0]))
            return (link.gate(args[0], self.attention(gate)), *args[1:])

        return hook

    def attention(self, gate: Gate) -> Tensor:
        """The gate values [units] of the active task: sigmoid(s e)."""
        task = self._task
        if task is None or task not in gate:
            what = "no task was named" if task is None else f"task {task} has none"
            raise UsageError(f"'{self.name}' has gates of its own for every task, and {what}; give predict() task=")
        training = gate.training and task == self.learner.task_index
        return torch.sigmoid((self.slope() if training else self.smax) * gate.embedding(task))

    def slope(self) -> float:
        """s of the next update: from 1/smax up to smax within a pass over the data."""
        if self.period is None:
            raise UsageError(
                f"'{self.name}' anneals its gates within each pass over the data, and nobody said how long a pass is; "
                f"give begin_task() the data, or {type(self).__name__}(anneal_steps=...)"
            )
        least = 1 / self.smax
        return least + (self.smax - least) * (self.steps % self.period) / self.period

    def activate(self, task: int | None) -> None:
        self._task = self.learner.task_index if task is None else task

    def on_batch(self, batch: Batch) -> Batch:
        self._measure_pass(batch.now.size)
        return batch

    def _measure_pass(self, batch_size: int) -> None:
        """Find out, at a task's first batch, how many updates a pass over its data has."""
        if self.period is not None or self.learner.task is None:
            return
        data: Any = self.learner.task.train
        if self.learner.steps_per_pass is not None:
            self.period = self.learner.steps_per_pass
        elif hasattr(data, "__len__"):
            # Examples are so many rows, a loader is so many batches.
            self.period = -(-len(data) // batch_size) if hasattr(data, "ordered") else len(data)

    # -- the step -------------------------------------------------------------------------------------------------

    @property
    def gathers(self) -> bool:
        return self.mask_on == "gradient"

    @torch.no_grad()
    def project_gradient(self, grad: Tensor) -> None:
        """Add the regulariser's gradient to that of the embeddings and undo what the slope does; mask, if on gradients.

        The regulariser is written out because the loop, and with it the loss, may be somebody else's.
        """
        members = self.parameters.members
        found = [(members[slot.name], push) for slot, push in zip(self._open(), self._pressure(), strict=True)]
        found = [(embedding, push) for embedding, push in found if embedding.grad is not None]
        if found:
            self._compensate(found)
        if self.mask_on == "gradient":
            super().project_gradient(grad)

    def _compensate(self, found: list[tuple[nn.Parameter, Tensor]]) -> None:
        s, parts = self.slope(), [embedding.grad for embedding, _ in found if embedding.grad is not None]
        e = torch.cat([embedding for embedding, _ in found])
        a = torch.sigmoid(s * e)
        total = torch.cat(parts).addcmul_(a * (1 - a), torch.cat([push for _, push in found]), value=s)
        steep = torch.cosh((s * e).clamp_(-_STEEPEST, _STEEPEST)).add_(1)
        total.mul_(steep).div_(torch.cosh(e).add_(1)).mul_(self.smax / s)
        torch._foreach_copy_(parts, total.split_with_sizes([len(part) for part in parts]))

    @torch.no_grad()
    def on_update(self, before: Tensor, theta: Tensor) -> None:
        if self.mask_on == "update":
            super().on_update(before, theta)
        for slot in self._open():
            slot.view(theta).clamp_(-_FARTHEST, _FARTHEST)
        self.steps += 1

    def _open(self) -> list[Slot]:
        """Where the open task's embeddings lie, layer by layer."""
        if not self._slots:
            end = f".{GATE}.embeddings.task_{self.learner.task_index}"
            slots = {slot.name: slot for slot in self.parameters.layout}
            self._slots = [slots[name + end] for name in self._layers]
        return self._slots

    def _pressure(self) -> Sequence[Tensor]:
        """d loss / d a of the regulariser [units], layer by layer: strength (1 - c) / sum (1 - c) over all layers."""
        if self._pushed is None:
            theta = self.parameters.theta
            free = [
                1 - self.used[name].to(theta.dtype) if name in self.used else theta.new_ones(gate.units)
                for name, gate in self.gates().items()
            ]
            total = torch.cat(free).sum().clamp_min(torch.finfo(theta.dtype).tiny)
            self._pushed = [self.strength * part / total for part in free]
        return self._pushed

    # -- protection -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        for name, gate in self.gates().items():
            e = gate.embedding(task.index).detach()
            a = torch.sigmoid(self.smax * e.to(torch.promote_types(e.dtype, torch.float32)))
            self.used[name] = torch.maximum(self.used[name], a) if name in self.used else a
        self.forget_mask()

    def protection(self) -> Tensor | None:
        task = self.learner.task_index
        if not self.used or not self._links or task is None:
            return None
        a = torch.zeros_like(self.parameters.theta)
        views = self.parameters.views(a)
        for name, used in self.used.items():
            link = self._links[name]
            weight = views[f"{name}.weight"]
            into = used.view(-1, *[1] * (weight.dim() - 1))
            if link.source is not None:
                out_of = link.spread(self.used[link.source])
                into = torch.minimum(into, out_of.view(1, -1, *[1] * (weight.dim() - 2)))
            weight.copy_(into.expand(weight.shape))
            if f"{name}.bias" in views:
                views[f"{name}.bias"].copy_(used)
            for key, view in views.items():
                if key.startswith(f"{name}.{GATE}.") and not key.endswith(f".task_{task}"):
                    view.fill_(1.0)
        kept = of_other_tasks(self.parameters, self._heads, task, self.learner.classes.by_task)
        if self.first_task_only:
            kept |= self.parameters.mask(self.first_task_only)
        return a.masked_fill_(kept, 1.0)
