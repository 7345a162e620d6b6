"""Every registered method passes the conformance suite, in the scenarios that show or hide the task."""

import pytest
from torch import nn

from perdure import registry
from perdure.methods import Method
from perdure.models import mean_field
from perdure.testing import MethodSuite
from registered import METHODS

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
