"""Every registered method passes the conformance suite, in the scenarios that show or hide the task."""

from collections.abc import Callable

import pytest
from torch import nn

from perdure import registry
from perdure.methods import (
    AGEM,
    DER,
    EWC,
    GEM,
    HAT,
    KD,
    L2,
    MAS,
    MER,
    SI,
    SPG,
    VCL,
    DERpp,
    Joint,
    LaMAML,
    LookAhead,
    LwF,
    Method,
    MomentumKD,
    Replay,
)
from perdure.models import mean_field
from perdure.testing import MethodSuite

METHODS: dict[str, tuple[Callable[[], Method], Callable[[], Method | None]]] = {
    "agem": (lambda: AGEM(per_task=10), lambda: AGEM(batch_size=0)),
    "der": (lambda: DER(capacity=30), lambda: DER(capacity=0)),
    "derpp": (lambda: DERpp(capacity=30), lambda: DERpp(alpha=0, beta=0)),
    "ewc": (lambda: EWC(strength=1.0), lambda: EWC(strength=0)),
    "gem": (lambda: GEM(per_task=10), lambda: GEM(per_task=0)),
    "hat": (HAT, lambda: HAT(strength=0)),
    "joint": (Joint, lambda: None),
    "kd": (KD, lambda: KD(alpha=0)),
    "l2": (lambda: L2(strength=0.1), lambda: L2(strength=0)),
    "la_maml": (lambda: LaMAML(capacity=30, glances=2, chunks=2), lambda: LaMAML(capacity=0)),
    "look_ahead": (lambda: LookAhead(capacity=30, inner_steps=2), lambda: LookAhead(capacity=0)),
    "lwf": (LwF, lambda: LwF(strength=0)),
    "mas": (lambda: MAS(strength=0.01), lambda: MAS(strength=0)),
    "mer": (lambda: MER(capacity=30, batch_size=1, steps=1), lambda: MER(capacity=0)),
    "momentum_kd": (MomentumKD, lambda: MomentumKD(strength=0)),
    "replay": (lambda: Replay(capacity=30), lambda: Replay(capacity=0)),
    "si": (lambda: SI(strength=0.1), lambda: SI(strength=0)),
    "vcl": (lambda: VCL(coreset=5, coreset_steps=3, samples=2), lambda: VCL(strength=0)),
    "spg": (SPG, lambda: SPG(strength=0)),
}

pytestmark = pytest.mark.filterwarnings("ignore::perdure.errors.PerdureWarning")


def test_no_registered_method_is_left_out() -> None:
    assert sorted(METHODS) == registry.methods.names()


DEFINED = [
    (name, scenario)
    for name in METHODS
    for scenario in ("class", "task")
    if scenario in registry.methods.get(name).scenarios
]


@pytest.mark.parametrize(("name", "scenario"), DEFINED)
class TestMethods(MethodSuite):
    @pytest.fixture(autouse=True)
    def _choose(self, name: str, scenario: str) -> None:
        self.build, self.build_off = METHODS[name]
        self.scenario = scenario
        self.name = name

    def prepared(self, model: nn.Module) -> nn.Module:
        return mean_field(model) if self.name == "vcl" else model

    def on(self) -> Method:
        return self.build()

    def off(self) -> Method | None:
        return self.build_off()
