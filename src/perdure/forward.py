"""Calling the model: stored rows become model inputs, and are grouped where the pass depends on task or source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from perdure.batch import Batch, Source, joined
from perdure.errors import ModelError, UsageError
from perdure.parameters import unwrap
from perdure.tree import cat, leaves, rows, take, to_device, tree_map

LARGEST_ACTIVATION = 1 << 20
"""Bytes that the largest tensor of a pass without gradients should have at most, so that it stays in a CPU's cache."""

PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_prepare(x: Any) -> Any:
    """Images stored as uint8 become float32 in [0, 1]; everything else stays as it is."""
    return tree_map(lambda leaf: leaf.float().div_(255) if leaf.dtype == torch.uint8 else leaf, x)


def has_convolutions(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


class Forward:
    """One way to run a model for training, teachers, importance passes and evaluation alike.

    Parameters
    ----------
    model
        Called with the prepared input; a dictionary is passed as keywords. Its answer is a tensor [rows, columns], or
        an object with `.logits`.
    like
        The parameter vector, whose device and type floating inputs get.
    precision
        "float32", or "bfloat16" and "float16" for autocast.
    channels_last
        Whether 4-D inputs are brought into that memory format.
    """

    def __init__(self, model: nn.Module, like: Tensor, precision: str, channels_last: bool) -> None:
        if precision not in PRECISIONS:
            raise UsageError(f"precision is '{precision}', it must be one of {', '.join(PRECISIONS)}")
        self.model = model
        self.device, self.dtype = like.device, like.dtype
        self.precision = precision
        self.channels_last = channels_last
        self.prepare: Callable[[Any], Any] = default_prepare
        self.heads: list[Any] = []
        self.activators: list[Callable[[int | None], None]] = []

    def inputs(self, x: Any, prepared: bool = False) -> Any:
        """Stored rows (or rows that are `prepared` already) on the device, as the model takes them."""
        moved = to_device(x, self.device)
        ready = tree_map(self._cast, moved if prepared else self.prepare(moved))
        if self.channels_last and isinstance(ready, Tensor) and ready.dim() == 4:
            ready = ready.contiguous(memory_format=torch.channels_last)
        return ready

    def _cast(self, leaf: Tensor) -> Tensor:
        """Floating inputs in the parameters' type: stored rows may be older than a `model.double()`."""
        return leaf.to(self.dtype) if leaf.is_floating_point() and leaf.dtype != self.dtype else leaf

    def joined(self, sources: Sequence[Source]) -> tuple[Any, bool]:
        """The rows of some sources as one, and whether they are prepared: all are as soon as one source is."""
        if not any(source.prepared for source in sources):
            return joined(tuple(sources)), False
        return cat([self.inputs(source.x, source.prepared) for source in sources]), True

    def call(self, prepared: Any, function: Callable[..., Any] | None = None) -> Tensor:
        """The model's outputs [rows, columns] for prepared inputs; `function` runs in the model's place."""
        function = function or self.model
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype=dtype) if dtype is not None else nullcontext():
            answer = function(**prepared) if isinstance(prepared, dict) else function(prepared)
        outputs = getattr(answer, "logits", answer)
        if not isinstance(outputs, Tensor):
            raise ModelError(f"the model returned {type(answer).__name__}; return a tensor or an object with .logits")
        # Losses, stored logits and distances are float32 whatever the precision of the pass.
        return outputs if dtype is None else outputs.float()

    def activate(self, task: int | None) -> None:
        """Tell everything that depends on the task which one comes."""
        for head in self.heads:
            head.activate(task)
        for activate in self.activators:
            activate(task)

    @property
    def depends_on_task(self) -> bool:
        """Whether some head or method gives another answer for another task."""
        return bool(self.heads or self.activators)

    @property
    def widest_batch(self) -> int:
        """Rows of a pass without gradients for a small model."""
        return 256 if self.device.type == "cpu" else 1024

    @torch.no_grad()
    def batch_size(self, x: Any, task: int | None = None) -> int:
        """Rows that a pass without gradients should have: few on a CPU if they have large activations.

        `x` holds a few stored rows, which are sent through the model once (in the mode in which it is).
        """
        if self.device.type != "cpu":
            return self.widest_batch
        prepared = self.inputs(x)
        largest = max(leaf.nbytes for leaf in leaves(prepared))

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal largest
            largest = max(largest, *(leaf.nbytes for leaf in leaves(output)), 0)

        model = unwrap(self.model)
        handles = [module.register_forward_hook(note) for module in model.modules() if not any(module.children())]
        try:
            self.activate(task)
            self.call(prepared, model)
        finally:
            for handle in handles:
                handle.remove()
        fitting = LARGEST_ACTIVATION * rows(x) // max(1, largest)
        return min(max(32, 1 << fitting.bit_length() >> 1), self.widest_batch)

    def __call__(
        self, x: Any, task: int | None = None, prepared: bool = False, function: Callable[..., Any] | None = None
    ) -> Tensor:
        """Outputs of stored (or prepared) rows `x` that all belong to `task`."""
        self.activate(task)
        return self.call(self.inputs(x, prepared), function)

    def batch(self, batch: Batch, task: int | None, function: Callable[..., Any] | None = None) -> Tensor:
        """Outputs of all sources in order; `task` is the current task as far as the scenario shows it.

        `function` runs in the model's place (the same module with a teacher's tensors, say).
        """
        together = [source for source in batch.sources if not source.separate]
        if len(together) == len(batch.sources):
            return self._group(together, task, function)
        outputs: dict[str, Tensor] = {}
        if together:
            parts = self._group(together, task, function).split_with_sizes([source.size for source in together])
            outputs = dict(zip([source.name for source in together], parts, strict=True))
        for source in batch.sources:
            if source.separate:
                outputs[source.name] = self._group([source], task, function)
        return torch.cat([outputs[source.name] for source in batch.sources])

    def _group(self, sources: Sequence[Source], task: int | None, function: Callable[..., Any] | None) -> Tensor:
        x, prepared = self.joined(sources)
        if not self.depends_on_task or task is None or all(source.tasks is None for source in sources):
            return self(x, task, prepared, function)
        tasks = torch.cat(
            [torch.full((s.size,), task) if s.tasks is None else s.tasks.to("cpu", torch.int64) for s in sources]
        )
        members = torch.unique(tasks).tolist()
        if not self.activators and all(hasattr(h, "together") and h.together(members) for h in self.heads):
            for head in self.heads:
                head.activate(tuple(members))
            return self.call(self.inputs(x, prepared), function)
        outputs, order = [], []
        for member in members:
            chosen = (tasks == member).nonzero()[:, 0]
            outputs.append(self(take(x, chosen), member, prepared, function))
            order.append(chosen)
        back = torch.cat(order).argsort().to(outputs[0].device)
        return torch.cat(outputs).index_select(0, back)
