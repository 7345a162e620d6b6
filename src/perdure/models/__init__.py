"""Networks that grow with their task, and heads for any network. Imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perdure.models.bayesian import MeanFieldConv2d, MeanFieldLinear, mean_field
    from perdure.models.heads import CosineHead, GrowingHead, MultiHead, make_head
    from perdure.models.mlp import MLP
    from perdure.models.slim_resnet import SlimResNet18
    from perdure.models.small_cnn import SmallCNN
    from perdure.models.vae import VAE

__all__ = [
    "MLP",
    "VAE",
    "CosineHead",
    "GrowingHead",
    "MeanFieldConv2d",
    "MeanFieldLinear",
    "MultiHead",
    "SlimResNet18",
    "SmallCNN",
    "make_head",
    "mean_field",
]

_MODULES = {
    "CosineHead": "heads",
    "GrowingHead": "heads",
    "MLP": "mlp",
    "MeanFieldConv2d": "bayesian",
    "MeanFieldLinear": "bayesian",
    "MultiHead": "heads",
    "SlimResNet18": "slim_resnet",
    "SmallCNN": "small_cnn",
    "VAE": "vae",
    "make_head": "heads",
    "mean_field": "bayesian",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
