"""Settings that suit each benchmark: seconds to a minute a run on two cores for the small ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perdure.experiments.sources import Source

DEFAULT_RATES = {
    "sgd": 0.05,
    "adam": 1e-3,
    "adamw": 1e-3,
    "nadam": 1e-3,
    "radam": 1e-3,
    "adamax": 2e-3,
    "rmsprop": 1e-3,
    "adagrad": 1e-2,
    "adafactor": 1e-2,
}
"""The optimizers by the names that `train.optimizer` takes, and the learning rate of each if nobody says another."""


@dataclass(frozen=True)
class Preset:
    """Defaults of the sections `train` and `model`; `lr` and `fused` go with the preset's own optimizer.

    Fused kernels differ from the plain ones in the last bits of some values, and take a third of the time.
    """

    train: dict[str, Any]
    lr: float
    model: dict[str, Any]
    fused: bool = True


def preset_of(source: Source) -> Preset:
    """The preset of a benchmark; of a user's own data by its kind."""
    if source.name in _PRESETS:
        return _PRESETS[source.name]
    if source.path is not None and source.path.is_dir():
        return _OWN_IMAGES
    return _OWN_TABLE


_DIGITS = Preset({"epochs": 20, "batch_size": 32, "optimizer": "adam"}, 1e-3, {"name": "mlp", "hidden": [100]})
_MNIST = Preset({"epochs": 1, "batch_size": 128, "optimizer": "adam"}, 1e-3, {"name": "mlp"})
_CIFAR = Preset({"epochs": 1, "batch_size": 32, "optimizer": "sgd"}, 0.03, {"name": "slim_resnet18"}, fused=False)
_OWN_TABLE = Preset({"epochs": 10, "batch_size": 32, "optimizer": "adam"}, 1e-3, {"name": "mlp"})
_OWN_IMAGES = Preset({"epochs": 10, "batch_size": 32, "optimizer": "adam"}, 1e-3, {"name": "small_cnn"})

_PRESETS = {
    "split_digits": _DIGITS,
    "split_mnist": _MNIST,
    "permuted_mnist": _MNIST,
    "rotated_mnist": _MNIST,
    "split_fashion_mnist": _MNIST,
    "split_cifar10": _CIFAR,
    "split_cifar100": _CIFAR,
    "coarse_cifar100": _CIFAR,
}
