"""Forward passes beside training that must leave no trace in the model: importance, teachers, scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode; afterwards every module is back in its own mode.

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with eval_mode(model):
    ...     model[0].training
    False
    >>> model[0].training, model[1].training
    (True, False)
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def frozen_copy(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, copied: a teacher, run by `torch.func.functional_call` through the same module.

    >>> layer = nn.Linear(2, 1)
    >>> frozen_copy(layer)["weight"].data_ptr() == layer.weight.data_ptr()
    False
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise as the model's mode says, but leave running statistics and batch counters as they are.

    >>> import torch
    >>> norm = nn.BatchNorm1d(2)
    >>> with frozen_statistics(norm):
    ...     _ = norm(torch.rand(4, 2))
    >>> norm.running_mean.tolist(), norm.num_batches_tracked.item()
    ([0.0, 0.0], 0)
    """
    tracking = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    # Batch norm then normalises a training batch by the batch, as it does anyway. Instance norm would still update.
    instances = [(m, m.running_mean, m.running_var) for m in tracking if isinstance(m, _InstanceNorm)]
    try:
        for module in tracking:
            module.track_running_stats = False
        for module, _, _ in instances:
            module.running_mean = module.running_var = None
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
        for module, mean, variance in instances:
            module.running_mean, module.running_var = mean, variance
