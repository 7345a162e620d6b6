"""Tasks that nobody announces, found by the drop of the model's accuracy on what arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from perdure.continual.wrapper import Wrapper
from perdure.detection import Boundary, WindowDetector
from perdure.errors import DataError, UsageError
from perdure.lagged import Lagged
from perdure.memory import Buffer
from perdure.methods.side_passes import eval_mode
from perdure.tree import as_tensors, to_device

SAMPLES = 1000
SNAPSHOTS = 12


def detect_task_boundary(
    model: nn.Module,
    data_stream: Iterable[Any],
    window_size: int = 100,
    threshold: float = 0.1,
    *,
    wrapper: Wrapper | None = None,
    on_boundary: Callable[[Boundary, int], None] | None = None,
) -> Iterator[tuple[int, Any, Any]]:
    """Hand out a stream's batches with the number of the task that each seems to belong to, counted from 1.

    Each batch is evaluated before it is handed out to be trained on. A task ends where the mean accuracy of the newer
    half of the last `window_size` batches is more than `threshold` below that of the older half; afterwards the window
    is empty, and as many batches pass untested. The alarm comes up to half a window late, when the weights know the new
    task already: with a `wrapper` the old task is registered with weights and examples from before the change.

    Parameters
    ----------
    model
        Any module with outputs [rows, classes]. It is evaluated without gradients and left in the mode it was in.
    data_stream
        Batches (inputs, targets), class numbers int64 [rows], in the order in which they arrive.
    window_size, threshold
        Of `perdure.detection.WindowDetector`.
    wrapper
        A wrapper of this model; its `register_task` is called at every boundary, if it has one. It keeps snapshots of
        the weights (12 P) and a uniform sample of 1,000 examples of the open task.
    on_boundary
        Called at every boundary with the alarm and the new task's number, after the registration.

    Yields
    ------
    (task_id, inputs, targets)

    Raises
    ------
    UsageError
        If `wrapper` is around another model, or window or threshold are out of range.
    DataError
        If targets are not class numbers.

    >>> from perdure.continual import EWC
    >>> draw = torch.Generator().manual_seed(0)
    >>> x = torch.randn(60, 16, 2, generator=draw)
    >>> y = (x[:, :, 0] > 0).long()
    >>> y[30:] = 1 - y[30:]
    >>> model = nn.Linear(2, 2)
    >>> ewc, optimizer = EWC(model, importance=10.0), torch.optim.SGD(model.parameters(), lr=0.3)
    >>> for task_id, inputs, targets in detect_task_boundary(model, zip(x, y), 10, threshold=0.3, wrapper=ewc):
    ...     loss = ewc.train_step(optimizer, nn.CrossEntropyLoss(), inputs, targets, task_id)
    >>> task_id, ewc.method.importance is not None
    (2, True)
    """
    if wrapper is not None and wrapper.model is not model:
        raise UsageError("wrapper is around another model; pass wrapper.model")
    detector = WindowDetector(window=window_size, threshold=threshold, cool_down=window_size)
    return _numbered(model, data_stream, detector, wrapper, on_boundary)


def _numbered(
    model: nn.Module,
    data_stream: Iterable[Any],
    detector: WindowDetector,
    wrapper: Wrapper | None,
    on_boundary: Callable[[Boundary, int], None] | None,
) -> Iterator[tuple[int, Any, Any]]:
    task_id = 1
    past = None if wrapper is None else _Past(wrapper, detector.window)
    for batch in data_stream:
        inputs, targets = batch[0], batch[1]
        boundary = detector.observe(_accuracy(model, inputs, targets))
        if boundary is not None:
            if past is not None:
                past.register(task_id, boundary)
            task_id += 1
            if on_boundary is not None:
                on_boundary(boundary, task_id)
        if past is not None:
            past.before_step(detector.steps - 1, inputs, targets)
        yield task_id, inputs, targets


class _Past:
    """The model and the examples before an alarm."""

    def __init__(self, wrapper: Wrapper, window: int) -> None:
        self.wrapper = wrapper
        self.lagged = Lagged(wrapper.learner, max(1, window // (SNAPSHOTS - 2)), SNAPSHOTS)
        self.tasks = 0
        self.examples = self._empty()
        wrapper.learner.followers.append(self.lagged.resize)

    def _empty(self) -> Buffer | None:
        if not self.wrapper.method.needs_task_data:
            return None
        self.tasks += 1
        return Buffer(SAMPLES, seed=("detect_task_boundary", self.tasks))

    def before_step(self, step: int, inputs: Any, targets: Any) -> None:
        """Batch number `step` is about to be trained on."""
        self.wrapper._finish_step()
        if self.lagged.ring:
            self.lagged.after_step(step)
        else:
            self.lagged.restart(step)
        if self.examples is not None:
            self.examples.add({"x": as_tensors(inputs), "y": as_tensors(targets), "step": step})

    def register(self, task_id: int, boundary: Boundary) -> None:
        """End the old task where it ended, and begin the next one."""
        wrapper, step = self.wrapper, boundary.step
        wrapper._finish_step()
        with self.lagged.as_it_was(boundary.change_point, step):
            wrapper._change_task(task_id, self._examples_before(boundary.change_point), task_id + 1)
        self.lagged.restart(step)
        self.examples = self._empty()

    def _examples_before(self, change_point: int) -> tuple[Any, Tensor] | None:
        if self.examples is None:
            return None
        before = (self.examples.view("step") < change_point).nonzero().flatten()
        kept = self.examples.take(before if len(before) else torch.arange(len(self.examples)))
        return kept["x"], kept["y"]


@torch.no_grad()
def _accuracy(model: nn.Module, inputs: Any, targets: Any) -> float:
    y = as_tensors(targets)
    if y.is_floating_point() or y.dim() != 1:
        raise DataError(f"targets are {y.dtype} {list(y.shape)}, they must be class numbers int64 [rows]")
    device = next(iter(model.parameters())).device
    with eval_mode(model):
        outputs = model(to_device(as_tensors(inputs), device))
    return float((outputs.argmax(-1) == y.to(device)).double().mean())
