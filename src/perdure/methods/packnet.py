"""PackNet: several tasks in one network, each with weights of its own that later tasks read and never change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from perdure.errors import CapacityExhausted, DivergedError, IncompatibleError, UsageError
from perdure.methods.base import RESTORE, Method, check_count, check_value
from perdure.methods.owners import FREE, claim, shares_left, smallest
from perdure.methods.retraining import retrain, training_batches
from perdure.methods.single_task import single_task
from perdure.methods.substitutes import Substitutes
from perdure.methods.task_parts import (
    check_heads,
    check_own_rows,
    check_plain_model,
    of_other_tasks,
    output_layers,
    task_parameters,
)
from perdure.models.task_norm import TaskNorm, split_norms
from perdure.parameters import Slot
from perdure.registry import register

if TYPE_CHECKING:
    from perdure.batch import Batch
    from perdure.learner import Learner
    from perdure.parameters import Remap
    from perdure.streams.task import Task

FILL = "fill"
_PACKED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@register("packnet")
@dataclass
class PackNet(Method):
    """Give every task weights of its own: train all that are free, keep the largest, free the rest for later tasks.

    When task k begins, it owns every free weight of the Linear and convolutional layers before the head. When its
    training ends, in each layer the round(prune * n) smallest of its n weights become 0 and free, and the others are
    trained once more. After every update w <- where(owner == k, w, w before it), bit for bit, whatever the optimizer;
    task j is predicted with w * (1 <= owner <= j), so old outputs never change.

    Heads (or rows of one head) and copies of batch norms belong to one task each; what is left, such as biases and
    embeddings, learns in the first task and is kept from then on. The second training is more steps of the learner, on
    the task's rows in a new order, when the task ends; whoever calls `prune_now()` before has it in his own last steps.

    Mallya and Lazebnik 2018, arXiv 1711.05769.

    Parameters
    ----------
    prune
        Share of a task's weights that is given back, 0 to 1: one for all tasks, or one a task (the last for all
        further ones); "fill" keeps 1 / (tasks left) of what is free, so that the last task keeps the rest. None
        switches the method off.
    retrain
        Steps of the second training as a share of those of the first: 0.5 as published, 0 for none.
    retrain_lr
        Factor on every learning rate in the second training; schedules stand still in it.
    tasks
        How many tasks there will be, where no stream says it. "fill" needs it, and with it a network that is too small
        is noticed before the first task instead of before the one that finds no free weight.
    train_biases
        Whether every task has biases of its own in the layers that share weights, which start as the last task's.
    head
        Names or patterns of the layers that give the outputs: one Linear layer, or heads of which each task has its
        own. Default: heads of perdure's, else the last layer.
    """

    prune: float | tuple[float, ...] | str | None = 0.75
    retrain: float = 0.5
    retrain_lr: float = 0.1
    tasks: int | None = None
    train_biases: bool = False
    head: tuple[str, ...] = ()

    summary: ClassVar[str] = "give every task weights of its own, which later tasks may use but never change"
    paper: ClassVar[str] = "Mallya and Lazebnik 2018, arXiv 1711.05769"
    use_when: ClassVar[str] = (
        "the task is known in training and at test time, nothing at all may be forgotten, no old data may be kept, and "
        "the network is large for its tasks"
    )
    cost: ClassVar[str] = (
        "time: three vector operations a step, and half as many steps again when a task ends; memory: P / 4"
    )
    regulariser: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True
    needs_train_task_id: ClassVar[bool] = True
    needs_test_task_id: ClassVar[bool] = True
    needs_task_data: ClassVar[bool] = True
    needs_update: ClassVar[bool] = True
    attachable: ClassVar[bool] = False
    scenarios: ClassVar[frozenset[str]] = frozenset({"task"})
    # Norms have to be there before another method takes a snapshot of the model, and the weights have to be final
    # before one measures them; a mask comes after GEM.
    ranks: ClassVar[dict[str, int]] = {"begin_task": 10, "on_update": RESTORE, "project_gradient": 60, "end_task": 0}
    aligned: ClassVar[dict[str, float | str]] = {"owner": FREE}
    transient: ClassVar[tuple[str, ...]] = (
        "_heads",
        "_layers",
        "_substitutes",
        "_active",
        "_frozen",
        "_known",
        "_slots",
        "_hidden",
    )

    def __post_init__(self) -> None:
        if isinstance(self.prune, (list, tuple)):
            self.prune = tuple(self.prune)
            if not self.prune:
                raise UsageError("packnet: prune is an empty list; give one share for all tasks or one a task")
        elif isinstance(self.prune, str) and self.prune != FILL:
            raise UsageError(f"packnet: prune is '{self.prune}', it must be shares between 0 and 1, or '{FILL}'")
        for share in self._list():
            check_value(self.name, "prune", share, 0, 1)
        check_value(self.name, "retrain", self.retrain)
        check_value(self.name, "retrain_lr", self.retrain_lr)
        if self.tasks is not None:
            check_count(self.name, "tasks", self.tasks, 1)
        self.head = (self.head,) if isinstance(self.head, str) else tuple(self.head)

    def _list(self) -> Sequence[float]:
        if self.prune is None or isinstance(self.prune, str):
            return ()
        return self.prune if isinstance(self.prune, tuple) else (self.prune,)

    def has(self, hook: str) -> bool:
        return super().has(hook) and self.prune is not None

    # -- life -----------------------------------------------------------------------------------------------------

    def setup(self, learner: Learner) -> None:
        for substitutes in getattr(self, "_substitutes", ()):
            substitutes.remove()
        super().setup(learner)
        self.owner = torch.zeros_like(self.parameters.theta, dtype=torch.uint8)
        self.begun: list[int] = []
        self.biases: dict[str, dict[str, Tensor]] = {}
        self.called: list[str] = []
        self.packed: list[str] = []
        self.pruned, self.steps, self.batch_size = False, 0, 0
        self._substitutes: list[Substitutes] = []
        self._active: int | None = None
        self._forget()
        if self.prune is None:
            return
        module = self.parameters.module
        check_plain_model(self.name, learner, "shows layers the weights of one task by hooks")
        self._heads = output_layers(module, self.head)
        check_heads(self.name, self._heads)
        split_norms(module)
        self._layers = self._find_layers(module)
        self.packed = list(self._layers)
        norms = {name: each for name, each in module.named_modules() if isinstance(each, TaskNorm)}
        self._substitutes = [Substitutes(self._layers, self._shown), Substitutes(norms, self._settled)]

    def _find_layers(self, module: nn.Module) -> dict[str, nn.Module]:
        inside = tuple(f"{name}." for name in self._heads)
        layers: dict[str, nn.Module] = {
            name: each
            for name, each in module.named_modules()
            if isinstance(each, _PACKED) and name not in self._heads and not name.startswith(inside)
        }
        layers = {name: each for name, each in layers.items() if _learns(each._parameters.get("weight"))}
        if not layers:
            raise IncompatibleError(
                "'packnet' found no Linear or convolutional layer before the head whose weights learn; there is "
                "nothing to pack"
            )
        places: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            places.setdefault(id(parameter), []).append(name)
        for name in (name for names in places.values() if len(names) > 1 for name in names):
            if name.rpartition(".")[0] in layers or name.startswith(inside):
                raise IncompatibleError(f"'packnet' cannot own the weight '{name}', which two layers share; untie it")
        return layers

    def resize(self, remap: Remap) -> None:
        super().resize(remap)
        self._forget()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._forget()

    def _forget(self) -> None:
        """Have everything that follows from the owners looked up again."""
        self._frozen: Tensor | None = None
        self._known = False
        self._slots: dict[str, Slot] = {}
        self._hidden: tuple[int, Tensor] | None = None

    # -- tasks ----------------------------------------------------------------------------------------------------

    def begin_task(self, task: Task) -> None:
        if not task.classes:
            raise UsageError(
                f"'{self.name}' keeps old heads, so it has to know the class columns of task '{task.name}'; give "
                "begin_task() classes="
            )
        if task.index in self.begun:
            raise UsageError(
                f"'{self.name}' has packed task {task.index} already, and what it learned is never changed; give "
                f"'{task.name}' an index of its own"
            )
        check_own_rows(self.name, self._heads, task, self.learner.classes.by_task)
        self._check_capacity(task)
        for module in self.parameters.module.modules():
            if isinstance(module, TaskNorm):
                module.add(task.index)
        self.begun.append(task.index)
        self.owner = claim(self.owner, self._where(self.packed), len(self.begun))
        self.pruned, self.steps, self.batch_size, self._active = False, 0, 0, None
        self._forget()

    def _check_capacity(self, task: Task) -> None:
        """Raise CapacityExhausted if a layer will have nothing left for this task or, if their number is known, one to
        come."""
        first, count = len(self.begun), self._count(task)
        last = first + 1 if count is None else max(count, first + 1)
        shares = [self._share(position, count) for position in range(first, last)]
        for name in self.packed:
            free = int((self._owners(name) == FREE).sum())
            for position, left in enumerate(shares_left(free, shares), first):
                if not left:
                    of = "" if count is None else f" of {count}"
                    size = self._owners(name).numel()
                    raise CapacityExhausted(
                        f"packnet: with prune={self.prune} none of the {size} weights of layer '{name}' is left for "
                        f"task {position + 1}{of}; prune more, use prune='{FILL}', or widen the layer"
                    )

    def _count(self, task: Task) -> int | None:
        """How many tasks there will be, if anybody knows."""
        if self.tasks is not None:
            return self.tasks
        stream = self.learner.stream
        return len(stream) if stream is not None and task in stream else None

    def _share(self, position: int, count: int | None) -> float:
        """The share that the task of that position (from 0) gives back."""
        if self.prune != FILL:
            shares = self._list()
            return shares[min(position, len(shares) - 1)]
        if count is None or position >= count:
            known = "nobody said how many there are" if count is None else f"tasks is {count}"
            raise UsageError(
                f"packnet: prune='{FILL}' shares the weights among all tasks, and at task {position + 1} {known}; give "
                "tasks=, or prune as a number"
            )
        return 1 - 1 / (count - position)

    @torch.no_grad()
    def prune_now(self) -> None:
        """Give back the smallest weights of the open task; the steps from here to its end are the second training."""
        task = self.learner.task
        if task is None or self.pruned:
            raise UsageError("packnet: prune_now() is for once in an open task; call it between two of its steps")
        self._drop_uncalled()
        share = self._share(len(self.begun) - 1, self._count(task))
        for name in self.packed:
            slot, owner = self._slot(name), self._owners(name)
            drop = smallest(slot.view(self.parameters.theta), owner == len(self.begun), share)
            slot.view(self.parameters.theta).masked_fill_(drop, 0.0)
            owner.masked_fill_(drop, FREE)
        self.pruned = True
        self._forget()

    def _drop_uncalled(self) -> None:
        """Own no weights that are read past `forward`, as attention reads those of its projection: no mask would act
        there. They learn in the first task, like all that nobody owns."""
        if not self.called or len(self.begun) > 1:
            return
        for name in self.packed:
            if name not in self.called:
                self._owners(name).fill_(FREE)
        self.packed = [name for name in self.packed if name in self.called]

    def end_task(self, task: Task) -> None:
        if not self.pruned:
            count = round(self.retrain * self.steps)
            self.prune_now()
            if count and bool((self.owner[self._where(self.packed)] == FREE).any()):
                seed = (self.learner.seed, self.name, task.index)
                retrain(self.learner, training_batches(task.train, count, self.batch_size, seed), self.retrain_lr)
                if not bool(self.parameters.theta.isfinite().all()):
                    raise DivergedError("packnet: the training after pruning diverged; lower retrain_lr")
        if self.train_biases:
            self.biases[str(task.index)] = {
                name: bias.detach().clone()
                for name in self.packed
                if (bias := self._layers[name]._parameters.get("bias")) is not None
            }
        self._forget()

    # -- the step -------------------------------------------------------------------------------------------------

    def on_batch(self, batch: Batch) -> Batch:
        self.batch_size = max(self.batch_size, batch.now.size)
        return batch

    @torch.no_grad()
    def project_gradient(self, grad: Tensor) -> None:
        frozen = self._look_up()
        if frozen is not None:
            torch.where(frozen, grad.new_zeros(()), grad, out=grad)  # on a CPU a third of the time of `masked_fill_`

    @torch.no_grad()
    def on_update(self, before: Tensor, theta: Tensor) -> None:
        frozen = self._look_up()
        if frozen is not None:
            torch.where(frozen, before, theta, out=theta)
        self.steps += 1

    def _look_up(self) -> Tensor | None:
        """Boolean [P]: what the open task must not change; None if it may change everything."""
        task = self.learner.task_index
        if not self._known and task is not None:
            frozen = of_other_tasks(self.parameters, self._heads, task, self.learner.classes.by_task)
            packed, own = self._where(self.packed), task_parameters(self.parameters, self._heads)
            frozen |= packed & (self.owner != len(self.begun))
            own |= {f"{name}.bias" for name in self.packed if self.train_biases}
            if len(self.begun) > 1:
                for slot in self.parameters.layout:
                    if slot.name not in own:
                        slot.view(frozen).logical_or_(~slot.view(packed))
            self._frozen, self._known = frozen if bool(frozen.any()) else None, True
        return self._frozen

    # -- showing a task -------------------------------------------------------------------------------------------

    def activate(self, task: int | None) -> None:
        if task is not None and task not in self.begun:
            known = ", ".join(map(str, self.begun)) or "none"
            raise UsageError(f"'{self.name}' has no weights for task {task}; there are some for {known}")
        self._active = None if task is None else self.begun.index(task)

    def _shown(self, name: str, layer: nn.Module) -> Mapping[str, Tensor]:
        """What a layer computes with while an older task is active: no weight of a later one."""
        if name not in self.called:
            self.called.append(name)
        position = self._active
        if position is None or position >= len(self.begun) - 1 or name not in self.packed:
            return {}
        weight = layer._parameters["weight"]
        assert weight is not None
        # A clone has the very strides of the weight, by which kernels choose how they round.
        shown = {"weight": weight.clone().masked_fill_(self._slot(name).view(self.hidden(position)), 0.0)}
        bias = self.biases.get(str(self.begun[position]), {}).get(name)
        return shown if bias is None else shown | {"bias": bias}

    def _settled(self, name: str, norm: nn.Module) -> Mapping[str, Tensor]:
        """The norms of a finished task keep their statistics, whatever mode the model is put into."""
        assert isinstance(norm, TaskNorm)
        norm.copy.train(norm.training and norm.active == f"task_{self.learner.task_index}")
        return {}

    def hidden(self, position: int) -> Tensor:
        """Boolean [P]: owned by a task after the one of that position (from 0), or by none."""
        if self._hidden is None or self._hidden[0] != position:
            self._hidden = position, (self.owner > position + 1) | (self.owner == FREE)
        return self._hidden[1]

    # -- what there is to see -------------------------------------------------------------------------------------

    def capacity(self) -> dict[str, dict[str, Any]]:
        """Of every layer, and in "total": its `weights`, those that are `free`, and how many each task (by index) owns.

        While a task is open it owns all that nobody else does, and nothing is free before it is pruned.
        """
        found: dict[str, dict[str, Any]] = {}
        for name in self.packed:
            counts = torch.bincount(self._owners(name).reshape(-1).long(), minlength=len(self.begun) + 1).tolist()
            owned = dict(zip(self.begun, counts[1:], strict=True))
            found[name] = {"weights": sum(counts), "free": counts[0], "tasks": owned}
        layers = list(found.values())
        total = {index: sum(layer["tasks"][index] for layer in layers) for index in self.begun}
        sums = {key: sum(layer[key] for layer in layers) for key in ("weights", "free")}
        return found | {"total": {**sums, "tasks": total}}

    def export(self, task: int) -> nn.Module:
        """A plain copy of the model that gives the outputs of one task bit for bit, in evaluation mode.

        Its layers are dense, with zeros for what other tasks own; norms are the task's, and of heads for each task only
        its own is left, whose column i is the task's i-th class. It knows nothing of perdure's other tasks.

        Raises
        ------
        UsageError
            If that task has not begun.
        """
        before = self._active
        self.activate(task)
        position, self._active = self._active, before
        assert position is not None
        for substitutes in self._substitutes:
            substitutes.remove()
        try:
            exported = single_task(self.parameters.module, task)
        finally:
            for substitutes in self._substitutes:
                substitutes.put()
        for name in self.packed if position < len(self.begun) - 1 else ():
            layer: Any = exported.get_submodule(name)
            layer.weight.data.masked_fill_(self._slot(name).view(self.hidden(position)), 0.0)
            bias = self.biases.get(str(task), {}).get(name)
            if bias is not None:
                layer.bias.data.copy_(bias)
        return exported

    # -- places ---------------------------------------------------------------------------------------------------

    def _slot(self, name: str) -> Slot:
        if not self._slots:
            self._slots = {slot.name: slot for slot in self.parameters.layout}
        return self._slots[f"{name}.weight"]

    def _owners(self, name: str) -> Tensor:
        return self._slot(name).view(self.owner)

    def _where(self, names: Sequence[str]) -> Tensor:
        """Boolean [P]: the weights of these layers."""
        chosen = torch.zeros_like(self.owner, dtype=torch.bool)
        for name in names:
            self._slot(name).view(chosen).fill_(True)
        return chosen


def _learns(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad
