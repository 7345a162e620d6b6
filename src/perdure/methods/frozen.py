"""A model as it was, or as it became elsewhere: a set of tensors that is run through the learner's own module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from perdure.methods.side_passes import eval_mode

if TYPE_CHECKING:
    from perdure.learner import Learner

Tensors = dict[str, Tensor]


def frozen_copy(module: nn.Module) -> Tensors:
    """Copies of all parameters and buffers by name; a tensor that is shared appears once."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def run_frozen(learner: Learner, tensors: Tensors, inputs: Any) -> Tensor:
    """Outputs [rows, columns] of the learner's module with other tensors, on prepared inputs, in evaluation mode.

    The tensors may be narrower than the module's are now (a head that has grown since): so are the outputs then.
    """
    module = learner.parameters.module

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(module, tensors, args, kwargs)

    with eval_mode(module):
        return learner.forward.call(inputs, run)
