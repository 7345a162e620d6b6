"""A callback for Hugging Face's `Trainer`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from perdure.batch import Batch
from perdure.checkpoint import is_checkpoint
from perdure.criterion import RowLoss
from perdure.errors import IncompatibleError, MissingExtraError, UsageError
from perdure.integrations.padding import Padding
from perdure.integrations.tasks import TaskCallback, TaskRows
from perdure.methods.base import Method

try:
    import accelerate  # noqa: F401  (the Trainer does not run without it)
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise MissingExtraError(
        "perdure.integrations.transformers needs transformers and accelerate; pip install 'perdure[transformers]' "
        "installs them"
    ) from error

FOLDER = "perdure"
"""The methods' state inside a checkpoint folder of the trainer."""

# What the trainer or the model gives to forward() beside the inputs of the rows.
NOT_INPUTS = ("labels", "num_items_in_batch")


class Continual(TaskCallback, TrainerCallback):
    """Let methods act on every update of Hugging Face's `Trainer`; each `trainer.train()` is one task.

    Methods see the accumulated, unscaled gradient, once an update, and the trainer's `max_grad_norm` is applied after
    them. What they remember or distil gets passes of its own just before. A checkpoint of the trainer has a folder
    `perdure` with their state, and `resume_from_checkpoint=` goes on from it, also in the middle of a task. The model
    trains on one device; methods that look at rows need one label a row (sequence classification, regression).

    Parameters
    ----------
    methods
        What `perdure.attach` takes, but for HAT.
    criterion
        The trainer's loss of remembered rows, with one value a row or their mean; if left out, what the model's
        `config.problem_type` says.
    scenario, seed
        As for `perdure.Learner`.
    length
        Tokens of the longest row, where batches are padded to different lengths and rows are remembered.

    Raises
    ------
    IncompatibleError
        For methods that have to own a part of the loop; when the training begins, for several devices, DeepSpeed, FSDP,
        and, with methods that look at rows, fp16, compiled models and label smoothing.

    >>> from perdure.methods import EWC
    >>> continual = Continual([EWC(strength=100)])
    >>> continual.next_task("2026-11")  # and then: Trainer(..., callbacks=[continual]).train()
    """

    def __init__(
        self,
        methods: Sequence[Method],
        *,
        criterion: RowLoss | None = None,
        scenario: str | None = None,
        seed: int = 0,
        length: int | None = None,
    ) -> None:
        super().__init__(methods, criterion, scenario, seed)
        if length is not None and length < 1:
            raise UsageError(f"length is {length}, it must be at least 1")
        self.length = length
        self._own_criterion = criterion is not None
        self._padding: Padding | None = None
        self._listener: RemovableHandle | None = None
        self._clipping: tuple[TrainingArguments, float] | None = None
        self._width: int | None = None
        self._averages: bool | None = None

    # -- a training is a task -------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer, loader = kwargs["model"], kwargs["optimizer"], kwargs["train_dataloader"]
        self._release()
        self._check(args, state)
        if not self._own_criterion:
            self.criterion = self._criterion_of(model)
        if self.length is not None:
            token = getattr(getattr(model, "config", None), "pad_token_id", None)
            self._padding = Padding(self.length, token or 0)
        if state.global_step > 0 and self._loaded is None:
            self.load(self._folder(args, state))

        def batches() -> Iterable[Any]:
            # The trainer's wrapper counts how often it is used, and the plain loader has the same rows.
            return getattr(loader, "base_dataloader", loader)  # type: ignore[no-any-return]

        self.start(model, _unwrapped(optimizer), TaskRows(batches, _split, lambda: None))
        if self._padding is not None:
            self.learner.forward.prepare = self._padding.cut
        if self.looks_at_rows:
            self._width = self._averages = None
            self._listener = model.register_forward_hook(self._listen, with_kwargs=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._release()
        self.finish()

    # -- a step ---------------------------------------------------------------------------------------------------

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The trainer clips before anybody may act on the gradient, so the clipping is done behind the methods instead.
        self.learner.clip_norm = args.max_grad_norm or None
        self._clipping = args, args.max_grad_norm
        args.max_grad_norm = 0.0

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._return_clipping()
        self.guard.forget()  # there is something only if the scaler has skipped the step

    def _return_clipping(self) -> None:
        if self._clipping is not None:
            args, norm = self._clipping
            args.max_grad_norm = norm
            self._clipping = None

    def _release(self) -> None:
        self._return_clipping()
        if self._listener is not None:
            self._listener.remove()
            self._listener = None

    def _listen(self, model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], answer: Any) -> None:
        """Take note of the rows of the trainer's own forward passes, and of what the model said to them."""
        outputs, y = getattr(answer, "logits", None), keywords.get("labels")
        if self.guard.busy or not model.training or not torch.is_grad_enabled():
            return
        who = f"'{self.methods[0].name}'"
        if not isinstance(y, Tensor) or not isinstance(outputs, Tensor):
            raise UsageError(
                f"{who} needs the labels and logits of the rows in training, and the model is called without labels= "
                "or answers without .logits; let the model compute its loss, or use methods that look at gradients "
                "alone (si, l2, ewc)"
            )
        if outputs.dim() != 2 or len(y) != len(outputs) or (y.dim() > 1 and not y.is_floating_point()):
            raise UsageError(
                f"labels of shape {list(y.shape)} and outputs of shape {list(outputs.shape)} are not one label a row; "
                f"{who} works with sequence classification here, and for tokens there are methods that look at "
                "gradients alone (si, l2)"
            )
        counted = keywords.get("num_items_in_batch")
        if counted is not None and self._averages is None:
            self._check_accumulation(answer.loss, outputs, y, float(counted))
        self.guard.see(self._of_one_width(_inputs(keywords)), y, outputs)

    def _of_one_width(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = x.get("input_ids")
        if ids is None or ids.dim() < 2:
            return x
        if self._padding is not None:
            return self._padding.pad(x)
        if self._width is not None and ids.shape[1] != self._width:
            raise UsageError(
                f"batches are padded to different lengths ({self._width} and {ids.shape[1]} tokens), and rows are "
                "remembered at one; give Continual(..., length=) the tokens of the longest row"
            )
        self._width = ids.shape[1]
        return x

    def _check_accumulation(self, loss: Tensor, outputs: Tensor, y: Tensor, counted: float) -> None:
        """Refuse a sum of the accumulated batches' means, which would outweigh what is remembered."""
        if counted <= len(y):  # a batch on its own
            return
        batch = Batch.current(outputs, y)
        mean = float(self.learner.criterion(outputs.detach(), batch, self.learner.allowed))
        self._averages = abs(float(loss.detach()) - mean) > 1e-3 * abs(mean)
        if not self._averages:
            raise UsageError(
                "the model does not divide its loss by num_items_in_batch, so the trainer adds up the losses of "
                "accumulated batches instead of averaging them; set model.accepts_loss_kwargs = False before the "
                "Trainer is made"
            )

    # -- state ----------------------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = self._folder(args, state)
        if folder.parent.is_dir() and not args.save_only_model:
            self.save(folder)

    @staticmethod
    def _folder(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FOLDER

    # -- checks ---------------------------------------------------------------------------------------------------

    def _check(self, args: TrainingArguments, state: TrainerState) -> None:
        if args.world_size > 1 or args.n_gpu > 1 or args.deepspeed or args.fsdp:
            raise IncompatibleError(
                f"the trainer shares the work between devices ({args.world_size} processes with {args.n_gpu} GPUs, or "
                "DeepSpeed or FSDP), and what methods remember is not shared; train on one device"
            )
        if state.is_hyper_param_search:
            raise IncompatibleError(
                "a hyper-parameter search trains other models again and again, and the callback remembers one; make a "
                "new Continual and Trainer for each trial"
            )
        if self.passes_rows:
            for wrong, what in (
                (args.fp16, "fp16=True (gradients of the methods' own passes would vanish); use bf16=True"),
                (args.torch_compile, "torch_compile=True (rows cannot be noticed in a compiled model); leave it out"),
                (
                    args.label_smoothing_factor and self.looks_at_rows,
                    "label_smoothing_factor (the labels do not reach the model); leave it out",
                ),
            ):
                if wrong:
                    raise IncompatibleError(f"'{self.methods[0].name}' cannot be used with {what}")
        if state.global_step > 0 and self._loaded is None and not is_checkpoint(self._folder(args, state)):
            raise UsageError(
                f"the training goes on at step {state.global_step}, but there is no folder "
                f"{self._folder(args, state)} with the methods' state; call load() with the one it resumes from"
            )

    def _criterion_of(self, model: nn.Module) -> RowLoss | None:
        config: Any = getattr(model, "config", None)
        kind = getattr(config, "problem_type", None)
        if kind == "multi_label_classification" and self.passes_rows:
            raise IncompatibleError(
                f"'{self.methods[0].name}' takes one label a row, and the model has several; use methods that look at "
                "gradients alone (si, l2)"
            )
        regression = kind == "regression" or (kind is None and getattr(config, "num_labels", 2) == 1)
        return _squares if regression else None


def _squares(outputs: Tensor, y: Tensor) -> Tensor:
    """The squared error [rows] of a regression, a mean over its columns."""
    return F.mse_loss(outputs, y.view_as(outputs).to(outputs.dtype), reduction="none").mean(1)


def _inputs(columns: Any) -> dict[str, Tensor]:
    """What the model is called with for the rows alone."""
    return {
        name: part
        for name, part in columns.items()
        if name not in NOT_INPUTS and isinstance(part, Tensor) and part.dim()
    }


def _split(batch: Any) -> tuple[dict[str, Tensor], Tensor]:
    if "labels" not in batch:
        raise UsageError(f"the training data has no column 'labels', only {', '.join(batch)}; rename the targets")
    return _inputs(batch), batch["labels"]


def _unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer inside accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]
