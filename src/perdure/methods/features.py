"""What a model's last layer sees of an example: its features, for exemplars and nearest means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.errors import ModelError, UsageError
from perdure.methods.side_passes import eval_mode
from perdure.models.heads import CosineHead
from perdure.tree import rows, take

if TYPE_CHECKING:
    from perdure.learner import Learner


@torch.no_grad()
def features_of(
    learner: Learner, x: Any, layer: str | None = None, normalise: bool = True, task: int | None = None
) -> Tensor:
    """Features [rows, d] of stored rows `x`, in evaluation mode; of length 1 if `normalise`.

    They are what the model's own method `features(x)` gives; of a model without one, the input of its last linear
    layer, or of the layer that is named.

    Raises
    ------
    ModelError, UsageError
        If there is no such layer.
    """
    forward, module = learner.forward, learner.parameters.module
    with eval_mode(module):
        forward.activate(task)
        size = forward.batch_size(take(x, slice(0, 2)))
        chunks = [forward.inputs(take(x, slice(i, i + size))) for i in range(0, rows(x), size)]
        found = [_features(learner, module, chunk, layer).flatten(1) for chunk in chunks]
    learner.passes["forward_rows"] += rows(x)
    features = torch.cat(found)
    return F.normalize(features, dim=1) if normalise else features


def _features(learner: Learner, module: nn.Module, inputs: Any, layer: str | None) -> Tensor:
    own = getattr(module, "features", None)
    if layer is None and callable(own) and not isinstance(own, nn.Module):
        return learner.forward.call(inputs, own)
    seen: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        seen[:] = [given[0]]

    handles = [each.register_forward_pre_hook(note) for each in _layers(module, layer)]
    try:
        learner.forward.call(inputs, module)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ModelError(f"no input of layer '{layer or 'linear'}' was seen in the model's forward pass; name another")
    return seen[0].float() if seen[0].dtype in (torch.float16, torch.bfloat16) else seen[0]


def _layers(module: nn.Module, layer: str | None) -> list[nn.Module]:
    """The named layer, or all linear ones, of which the last to run has the features."""
    if layer is None:
        linear: list[nn.Module] = [each for each in module.modules() if isinstance(each, nn.Linear)]
        if not linear:
            raise ModelError(
                "the model has no linear layer whose input could be its features; give it a method features(x), or "
                "name a layer: layer='classifier'"
            )
        return linear
    try:
        return [module.get_submodule(layer)]
    except AttributeError as error:
        names = ", ".join(name for name, _ in module.named_children())
        raise UsageError(f"the model has no layer '{layer}'; there are {names}") from error


def output_layer(learner: Learner) -> nn.Linear:
    """The linear layer that gives the class columns: the last that is wide enough for those seen.

    Raises
    ------
    ModelError
        If there is none, or if it compares directions alone.
    """
    wide = [
        each
        for each in learner.parameters.module.modules()
        if isinstance(each, nn.Linear) and each.out_features >= learner.classes.width
    ]
    if not wide or isinstance(wide[-1], CosineHead):
        raise ModelError(
            "the lengths of the output layer's rows are to be compared, and the model ends in no linear layer with one "
            "row a class; use a wide or a growing head"
        )
    return wide[-1]
