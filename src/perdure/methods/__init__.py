"""The methods, imported one by one when they are asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perdure.methods.agem import AGEM
    from perdure.methods.base import Method
    from perdure.methods.bic import BiC
    from perdure.methods.der import DER
    from perdure.methods.derpp import DERpp
    from perdure.methods.er_ace import ERACE
    from perdure.methods.ewc import EWC
    from perdure.methods.gdumb import GDumb
    from perdure.methods.gem import GEM
    from perdure.methods.generative_replay import GenerativeReplay
    from perdure.methods.hat import HAT
    from perdure.methods.icarl import ICaRL
    from perdure.methods.joint import Joint
    from perdure.methods.kd import KD
    from perdure.methods.l2 import L2
    from perdure.methods.la_maml import LaMAML
    from perdure.methods.look_ahead import LookAhead
    from perdure.methods.lwf import LwF
    from perdure.methods.mas import MAS
    from perdure.methods.mer import MER
    from perdure.methods.mir import MIR
    from perdure.methods.momentum_kd import MomentumKD
    from perdure.methods.packnet import PackNet
    from perdure.methods.replay import Replay
    from perdure.methods.si import SI
    from perdure.methods.spg import SPG
    from perdure.methods.vcl import VCL
    from perdure.methods.wa import WA

_HOMES = {
    "AGEM": "agem",
    "DER": "der",
    "EWC": "ewc",
    "GEM": "gem",
    "KD": "kd",
    "HAT": "hat",
    "L2": "l2",
    "MAS": "mas",
    "MER": "mer",
    "LaMAML": "la_maml",
    "LookAhead": "look_ahead",
    "SI": "si",
    "VCL": "vcl",
    "SPG": "spg",
    "DERpp": "derpp",
    "GenerativeReplay": "generative_replay",
    "Joint": "joint",
    "LwF": "lwf",
    "ERACE": "er_ace",
    "MIR": "mir",
    "GDumb": "gdumb",
    "ICaRL": "icarl",
    "WA": "wa",
    "BiC": "bic",
    "Method": "base",
    "MomentumKD": "momentum_kd",
    "PackNet": "packnet",
    "Replay": "replay",
}

__all__ = [
    "AGEM",
    "DER",
    "ERACE",
    "EWC",
    "GEM",
    "HAT",
    "KD",
    "L2",
    "MAS",
    "MER",
    "MIR",
    "SI",
    "SPG",
    "VCL",
    "WA",
    "BiC",
    "DERpp",
    "GDumb",
    "GenerativeReplay",
    "ICaRL",
    "Joint",
    "LaMAML",
    "LookAhead",
    "LwF",
    "Method",
    "MomentumKD",
    "PackNet",
    "Replay",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"perdure.methods.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'perdure.methods' has no attribute '{name}'")


def __dir__() -> list[str]:
    return list(__all__)
