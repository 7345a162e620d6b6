"""The parameter vector: views, gradients, layout, growth."""

import copy

import pytest
import torch
from torch import nn

from perdure.errors import ModelError
from perdure.parameters import Layout, ParameterVector, Remap


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def test_parameters_are_views_and_keep_their_values() -> None:
    model = small()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    vector = ParameterVector(model)
    assert len(vector) == sum(p.numel() for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name])
    vector.theta.mul_(2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, 2 * expected[name])


def test_gather_zeroes_idle_parameters_and_leaves_their_grad_none() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    vector = ParameterVector(model)
    vector.gather().fill_(7.0)
    vector.release()
    model["a"](torch.ones(1, 2)).sum().backward()
    grad = vector.gather()
    assert model["b"].weight.grad is None
    assert not grad[vector.slices["b.weight"]].any()
    assert torch.equal(vector.views(grad)["a.weight"], torch.ones(2, 2))
    grad.mul_(3)
    assert torch.equal(model["a"].weight.grad, 3 * torch.ones(2, 2)), "after gathering p.grad is a view of grad"


def test_a_shared_parameter_appears_once() -> None:
    model = small()
    model[0].bias = model[2].weight = None  # type: ignore[assignment]
    model[2].weight = nn.Parameter(torch.randn(2, 5))
    tied = nn.ModuleDict({"first": model, "second": model})
    assert list(ParameterVector(tied).members) == [f"first.{n}" for n, _ in model.named_parameters()]


def test_channels_last_strides_live_inside_the_vector() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    expected = model.weight.detach().clone()
    vector = ParameterVector(model)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.weight, expected)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    gradient = model.weight.grad.clone()
    assert torch.equal(vector.views(vector.gather())["weight"], gradient)


def test_growth_is_noticed_and_remapped_by_name() -> None:
    model = small()
    vector = ParameterVector(model)
    state = torch.arange(float(vector.layout.length))
    before = {name: view.clone() for name, view in vector.views(state).items()}
    old = model[2]
    model[2] = nn.Linear(5, 3)
    with torch.no_grad():
        model[2].weight[:2] = old.weight
    assert vector.changed()
    remap = vector.rebind()
    assert isinstance(remap, Remap)
    zeros = vector.views(remap(state, 0.0))
    anchored = vector.views(remap(state, vector.theta))
    assert torch.equal(zeros["0.weight"], before["0.weight"])
    assert torch.equal(zeros["2.weight"][:2], before["2.weight"])
    assert not zeros["2.weight"][2:].any()
    assert torch.equal(anchored["2.weight"][2:], model[2].weight[2:])
    assert not vector.changed()


def test_replaced_storage_is_noticed_at_once() -> None:
    model = small()
    vector = ParameterVector(model)
    assert vector.intact()
    model.load_state_dict(copy.deepcopy(small().state_dict()), assign=True)
    assert not vector.intact()
    values = [p.detach().clone() for p in model.parameters()]
    assert vector.rebind() is None, "the layout is the same"
    assert vector.intact()
    for parameter, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(parameter, value)


def test_frozen_then_thawed_keeps_its_place() -> None:
    model = small()
    vector = ParameterVector(model)
    layout = vector.layout
    model[0].requires_grad_(False)
    assert vector.rebind() is None
    assert vector.layout == layout
    assert [name for name, _ in vector.named()] == ["2.weight", "2.bias"]
    model[0].requires_grad_(True)
    vector.rebind()
    assert len(vector.named()) == 4


def test_parameters_thawed_for_the_first_time_join() -> None:
    model = small()
    model[0].requires_grad_(False)
    vector = ParameterVector(model)
    state = vector.pack({}, fill=1.0)
    model[0].requires_grad_(True)
    assert vector.changed()
    remap = vector.rebind()
    assert remap is not None
    moved = vector.views(remap(state, 0.0))
    assert moved["2.weight"].all()
    assert not moved["0.weight"].any()


def test_mask_and_pack() -> None:
    vector = ParameterVector(small())
    assert int(vector.mask(exclude=("2",)).sum()) == 20
    assert int(vector.mask(("*.bias",)).sum()) == 7
    with pytest.raises(ModelError, match="no parameter matches 'head'"):
        vector.mask(exclude=("head",))
    packed = vector.pack({"2.bias": torch.tensor([1.0, 2.0])})
    assert packed[vector.slices["2.bias"]].tolist() == [1, 2]
    assert packed.abs().sum() == 3
    assert vector.pack({"2.bias": torch.zeros(2)}, fill=1.0).sum() == len(vector) - 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_parameter_starts_on_a_cache_line_and_what_lies_between_is_zero(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 17), nn.Linear(17, 5)).to(dtype)
    vector = ParameterVector(model)
    model(torch.randn(4, 3, dtype=dtype)).sum().backward()
    gradient = vector.gather()
    assert all(p.data_ptr() % 64 == 0 and p.grad.data_ptr() % 64 == 0 for p in model.parameters())
    real = vector.mask()
    assert int(real.sum()) == len(vector) == sum(p.numel() for p in model.parameters())
    assert len(vector) < vector.layout.length == len(vector.theta)
    for each in (vector.theta, gradient, vector.pack({}, fill=2.0)):
        assert not each[~real].any()


def test_a_remap_leaves_gaps_zero_whatever_it_fills_with() -> None:
    vector = ParameterVector(small())
    tight = Layout.from_json({"length": 5, "slots": [["0.bias", [5], [1], 0]]})
    state = torch.arange(5.0)
    for fill in (7.0, torch.full_like(vector.theta, 7.0)):
        moved = Remap(tight, vector.layout)(state, fill)
        views = vector.views(moved)
        assert torch.equal(views["0.bias"], state)
        assert all(bool((view == 7).all()) for name, view in views.items() if name != "0.bias")
        assert not moved[~vector.mask()].any()
    back = Remap(vector.layout, tight)(moved, 0.0)
    assert torch.equal(back, state)


def test_layout_round_trip() -> None:
    layout = ParameterVector(small()).layout
    assert Layout.from_json(layout.to_json()) == layout


def test_side_gradient_touches_no_grad() -> None:
    model = small()
    vector = ParameterVector(model)
    x = torch.randn(4, 3)
    gradient = vector.gradient(model(x).square().sum())
    assert all(p.grad is None for p in model.parameters())
    model(x).square().sum().backward()
    assert torch.equal(gradient, vector.gather())


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (nn.LazyLinear(3), "no values yet"),
        (nn.Linear(2, 2, device="meta"), "no values yet"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float64)), "differ in type or device"),
        (nn.ReLU(), "no trainable parameter"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_refused_models(model: nn.Module, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        ParameterVector(model)


def test_sparse_gradients_are_refused() -> None:
    model = nn.Embedding(10, 3, sparse=True)
    vector = ParameterVector(model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ModelError, match="sparse=False"):
        vector.gather()
