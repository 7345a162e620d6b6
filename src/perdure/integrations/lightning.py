"""A callback for Lightning's `Trainer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perdure.checkpoint import pack, unpack
from perdure.criterion import RowLoss
from perdure.errors import IncompatibleError, MissingExtraError, UsageError
from perdure.integrations.tasks import Split, TaskCallback, TaskRows, as_pair
from perdure.methods.base import Method
from perdure.saving import continual_state

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as error:
    raise MissingExtraError(
        "perdure.integrations.lightning needs lightning; pip install 'perdure[lightning]' installs it"
    ) from error

# What remembered rows run in. In "16-mixed" the gradients are unscaled when they join, and half of them would be zero.
PRECISIONS = {
    "32-true": "float32",
    "64-true": "float32",
    "16-true": "float32",
    "bf16-true": "float32",
    "16-mixed": "float32",
    "bf16-mixed": "bfloat16",
}


class Continual(TaskCallback, Callback):
    """Let methods act on every update of Lightning's `Trainer`; each `trainer.fit` is one task.

    Methods see the accumulated, unscaled gradient before the trainer clips it, once an update. What they remember or
    distil gets passes of its own just before. Checkpoints of the trainer hold their state, and `ckpt_path=` resumes it,
    also in the middle of a task. The module trains on one device, by automatic optimization, with one optimizer.

    Parameters
    ----------
    methods
        What `perdure.attach` takes, but for HAT.
    rows
        From a batch: inputs for one call of the network (a dictionary is passed as keywords) and targets. By default
        batches are such pairs.
    network
        The submodule, by name, that maps inputs to outputs [rows, columns] and whose weights are protected; by default
        the module itself, by its `forward`.
    criterion
        The module's loss of remembered rows, with one value a row or their mean; softmax cross-entropy if left out.
    scenario, seed
        As for `perdure.Learner`.

    Raises
    ------
    IncompatibleError
        For methods that have to own a part of the loop; when the fit begins, for several devices, several optimizers,
        manual optimization and compiled modules.

    >>> from perdure.methods import Replay
    >>> continual = Continual([Replay(200)])
    >>> continual.next_task("2026-11")  # and then: Trainer(callbacks=[continual]).fit(module, loader)
    """

    def __init__(
        self,
        methods: Sequence[Method],
        *,
        rows: Split = as_pair,
        network: str | None = None,
        criterion: RowLoss | None = None,
        scenario: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(methods, criterion, scenario, seed)
        self.rows = rows
        self.network = network
        self._counted = True
        self._ignored = False

    # -- a fit is a task ------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module)
        network = self._network(pl_module)

        def loader() -> Any:
            found: Any = trainer.train_dataloader
            if isinstance(found, (dict, list, tuple)):
                raise UsageError(
                    "the fit has several training loaders, and a method reads the task's data when it ends; give one"
                )
            return found

        def split(batch: Any) -> tuple[Any, Any]:
            return self.rows(_on_device(trainer, pl_module, batch))

        def limit() -> int | None:
            batches = trainer.num_training_batches
            return None if batches == float("inf") else int(batches)

        self.start(network, trainer.optimizers[0], TaskRows(loader, split, limit), closures=True)
        self.learner.forward.precision = PRECISIONS[str(trainer.precision)]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A fit that had nothing left to do has no end of training.
        self.finish()

    # -- a step ---------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.looks_at_rows:
            self._drop_uncounted()
            self.guard.see(*self.rows(batch))
            self._counted = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._counted = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._drop_uncounted()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            return  # a fused optimizer unscales in its own step, whose hook comes later
        gradients = [p.grad for p in self.learner.parameters.members.values() if p.grad is not None]
        nothing = not gradients  # the training step has returned None
        if nothing or (scaler is not None and not bool(torch.stack([g.isfinite().all() for g in gradients]).all())):
            self.guard.forget()
            return
        self.guard.before_update()

    def _drop_uncounted(self) -> None:
        """Rows of a batch for which the training step gave no loss."""
        if not self._counted:
            self.guard.unsee()
            self._counted = True

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self._guard is not None and self._loaded is None:
            return pack(continual_state(self.learner))
        return {} if self._loaded is None else pack(self._loaded)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # `trainer.test(ckpt_path=...)` restores callbacks as well, and says nothing about what is trained next.
        self._ignored = trainer.state.fn != "fit"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._ignored:
            self._loaded = unpack(state_dict)
        self._ignored = False

    # -- checks ---------------------------------------------------------------------------------------------------

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise IncompatibleError(
                f"the trainer uses {type(trainer.strategy).__name__} and {trainer.world_size} processes, and what "
                "methods remember is not shared between them; use Trainer(devices=1)"
            )
        if not pl_module.automatic_optimization:
            raise IncompatibleError(
                "the module optimizes by hand, so the callback cannot know which rows an update is for; call "
                "perdure.attach in the module, or set automatic_optimization"
            )
        if len(trainer.optimizers) != 1:
            raise IncompatibleError(
                f"the module has {len(trainer.optimizers)} optimizers, and methods act on the update of one; use one"
            )
        if str(trainer.precision) not in PRECISIONS:
            raise IncompatibleError(
                f"precision is {trainer.precision!r}, it must be one of {', '.join(PRECISIONS)} for these methods"
            )
        if self.passes_rows and getattr(pl_module, "_compiler_ctx", None) is not None:
            raise IncompatibleError(
                "the whole module is compiled, training step and all, so the network cannot be called alone; compile "
                "the network inside it instead"
            )

    def _network(self, pl_module: LightningModule) -> nn.Module:
        if self.network is not None:
            try:
                return pl_module.get_submodule(self.network)
            except AttributeError:
                names = ", ".join(name for name, _ in pl_module.named_children())
                raise UsageError(f"the module has no submodule '{self.network}'; it has {names}") from None
        if self.passes_rows and not is_overridden("forward", pl_module, LightningModule):
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise UsageError(
                f"the module has no forward(), and methods call it; name the submodule that maps inputs to outputs: "
                f"Continual(..., network=...), one of {names}"
            )
        return pl_module


def _on_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A batch as the trainer hands it to the training step: converted, moved, and through the module's own hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
