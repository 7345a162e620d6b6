"""Optimizers follow a model that grows, and are refused where they cannot."""

from functools import partial

import pytest
import torch
from torch import nn

from perdure.errors import ModelError, UsageError
from perdure.optimizers import Optimizers
from perdure.parameters import ParameterVector

FACTORIES = {
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
    "adafactor": partial(torch.optim.Adafactor, lr=0.01),
}


def grow(model: nn.Linear, rows: int) -> None:
    weight, bias = model.weight.detach(), model.bias.detach()
    extra = torch.full((rows - len(weight), weight.shape[1]), 0.5)
    model.weight = nn.Parameter(torch.cat([weight, extra]))
    model.bias = nn.Parameter(torch.cat([bias, torch.zeros(rows - len(bias))]))


def run(model: nn.Module, optimizers: Optimizers, steps: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = None
        x = torch.randn(8, 3, generator=generator)
        model(x)[:, :columns].square().mean().backward()
        optimizers.step()


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "rmsprop"])
def test_old_rows_move_as_if_nothing_had_grown(name: str) -> None:
    results = []
    for grows in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        vector = ParameterVector(model)
        optimizers = Optimizers(FACTORIES[name], list(vector.members.items()))
        run(model, optimizers, 5, 2)
        if grows:
            grow(model, 4)
            vector.rebind()
            optimizers.rebind(list(vector.members.items()))
        run(model, optimizers, 5, 2)
        results.append(model.weight[:2].detach().clone())
    assert torch.equal(*results)


def test_adafactor_factors_grow() -> None:
    model = nn.Linear(3, 2)
    vector = ParameterVector(model)
    optimizers = Optimizers(FACTORIES["adafactor"], list(vector.members.items()))
    run(model, optimizers, 3, 2)
    state = optimizers.all[0].state[model.weight]
    row = state["row_var"].clone()
    grow(model, 4)
    vector.rebind()
    optimizers.rebind(list(vector.members.items()))
    grown = optimizers.all[0].state[model.weight]
    assert grown["row_var"].shape == (4, 1)
    assert grown["col_var"].shape == (1, 3)
    assert torch.equal(grown["row_var"][:2], row)
    run(model, optimizers, 3, 4)


def test_the_callers_optimizer_stays_that_object_and_its_scheduler_works() -> None:
    model = nn.Linear(3, 2)
    vector = ParameterVector(model)
    own = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(own, 1, gamma=0.5)
    optimizers = Optimizers(own, list(vector.members.items()))
    run(model, optimizers, 2, 2)
    grow(model, 3)
    vector.rebind()
    optimizers.rebind(list(vector.members.items()))
    assert optimizers.all == [own]
    assert own.param_groups[0]["params"] == list(model.parameters())
    schedule.step()
    assert own.param_groups[0]["lr"] == 0.05
    before = model.weight.detach().clone()
    run(model, optimizers, 1, 3)
    assert (model.weight != before).all()


def test_new_parameters_go_where_the_factory_puts_them() -> None:
    model = nn.ModuleDict({"body": nn.Linear(3, 3)})

    def factory(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        heads = [p for name, p in named if name.startswith("head")]
        return torch.optim.SGD(
            [{"params": [p for n, p in named if not n.startswith("head")]}, {"params": heads, "lr": 1.0}], lr=0.1
        )

    vector = ParameterVector(model)
    optimizers = Optimizers(factory, list(vector.members.items()))
    optimizers.all[0].param_groups[0]["lr"] = 0.05
    model["head"] = nn.Linear(3, 2)
    vector.rebind()
    optimizers.rebind(list(vector.members.items()))
    rates = optimizers.learning_rates()
    assert rates["head.weight"] == 1.0
    assert rates["body.weight"] == 0.05, "a rate that was changed since stays"


def test_a_new_parameter_without_a_known_group_is_refused() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    vector = ParameterVector(model)
    own = torch.optim.SGD([{"params": model["a"].parameters()}, {"params": model["b"].parameters()}], lr=0.1)
    optimizers = Optimizers(own, list(vector.members.items()))
    model["c"] = nn.Linear(2, 2)
    vector.rebind()
    with pytest.raises(ModelError, match="pass a factory"):
        optimizers.rebind(list(vector.members.items()))


def test_state_round_trip_by_name() -> None:
    def build() -> tuple[nn.Linear, Optimizers]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        vector = ParameterVector(model)
        return model, Optimizers(FACTORIES["adam"], list(vector.members.items()))

    model, optimizers = build()
    run(model, optimizers, 3, 2)
    other, fresh = build()
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizers.state_dict())
    run(model, optimizers, 3, 2)
    run(other, fresh, 3, 2)
    assert torch.equal(model.weight, other.weight)


def test_refusals() -> None:
    model = nn.Linear(2, 2)
    named = list(ParameterVector(model).members.items())
    with pytest.raises(ModelError, match="closure"):
        Optimizers(torch.optim.LBFGS(model.parameters()), named)
    with pytest.raises(ModelError, match="does not hold the trainable parameter 'bias'"):
        Optimizers(torch.optim.SGD([model.weight], lr=0.1), named)
    with pytest.raises(UsageError, match=r"functools.partial\(Adam"):
        Optimizers(torch.optim.Adam, named)  # type: ignore[arg-type]
