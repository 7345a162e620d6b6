"""Layers that run with other tensors than their parameters: weights under a mask, a bias of another task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Substitute = Callable[[str, nn.Module], Mapping[str, Tensor]]


class Substitutes:
    """While a layer runs, some of its parameters are what `substitute` makes of them; the parameters stay as they are.

    The parameters keep their names, so that optimizers, checkpoints and vectors know nothing of it, and gradients flow
    to them through whatever `substitute` does. It is asked before every forward pass of a layer, and reads
    `layer._parameters`, which are a teacher's tensors inside `functional_call`. What a layer reads without its
    `forward` being called (attention takes the weight of its output projection) is not substituted.

    Parameters
    ----------
    layers
        By name, each with parameters of its own.
    substitute
        `(name, layer)` -> tensors by the attribute that they stand for; nothing for what stays.

    >>> import torch
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> halved = Substitutes({"": layer}, lambda name, layer: {"weight": layer._parameters["weight"] / 2})
    >>> x = torch.ones(1, 2)
    >>> bool(layer(x) == x @ layer.weight.T / 2)
    True
    """

    def __init__(self, layers: Mapping[str, nn.Module], substitute: Substitute) -> None:
        self._substitute = substitute
        self._layers = dict(layers)
        self._handles: list[RemovableHandle] = []
        self.put()

    def put(self) -> None:
        """Begin again after `remove`."""
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._before(name)))
            self._handles.append(layer.register_forward_hook(_after, always_call=True))

    def remove(self) -> None:
        """Let the layers run with their parameters."""
        while self._handles:
            self._handles.pop().remove()

    def _before(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(layer: nn.Module, args: Any) -> None:
            # An attribute of the object is found before a registered parameter.
            vars(layer).update(self._substitute(name, layer))

        return hook


def _after(layer: nn.Module, args: Any, output: Any) -> None:
    own = vars(layer)
    for name in layer._parameters:
        own.pop(name, None)
