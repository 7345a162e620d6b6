"""The networks: their sizes, their initialisation, and that building one disturbs nobody."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from perdure.errors import UnknownNameError, UsageError
from perdure.models import MLP, SlimResNet18, SmallCNN
from perdure.registry import models

BUILDERS = ["mlp", "small_cnn", "slim_resnet18"]


def build(name: str, **options: object) -> nn.Module:
    return models.get(name)(input_shape=(3, 16, 16), outputs=6, **options)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_parameter_counts_are_the_published_ones():
    assert size(MLP(784, (400, 400), 10)) == 784 * 400 + 400 + 400 * 400 + 400 + 4010
    assert size(SlimResNet18(3, 10)) == 1_094_750
    assert len(list(SlimResNet18(3, 10).parameters())) == 62
    assert 0.11e6 < size(SmallCNN(3, 10)) < 0.125e6


@pytest.mark.parametrize("name", BUILDERS)
def test_forward_is_the_head_on_the_features(name):
    model = build(name, seed=1).eval()
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), model.head(model.features(x)))
    assert model(x).shape == (3, 6)
    assert model(x[:1, :, :7, :9] if name != "mlp" else x[:1]).shape == (1, 6)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("head", ["wide", "growing", "multi", "cosine"])
def test_a_seed_decides_every_bit_and_touches_no_global_generator(name, head):
    before = torch.get_rng_state()
    one, two, three = (build(name, seed=seed, head=head) for seed in (5, 5, 6))
    for model in (one, two, three):
        if head == "growing":
            model.head.grow(4)
        if head == "multi":
            model.head.add(0, (0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert same(one, two)
    assert not torch.equal(next(one.parameters()), next(three.parameters()))
    assert not torch.equal(one.state_dict()[_head_weight(one)], three.state_dict()[_head_weight(three)])


def _head_weight(model: nn.Module) -> str:
    return next(key for key in model.state_dict() if key.startswith("head") and key.endswith("weight"))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_seeded_model_has_the_bits_of_torchs_own_initialisation(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        usual = build(name)
    assert same(usual, build(name, seed=11))


def test_without_a_seed_the_global_generator_is_used():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        one, two = build("mlp"), build("mlp")
    assert not same(one, two)


def test_xavier_initialisation():
    model = MLP(300, [200], 10, init="xavier", seed=0)
    weight = model.body[0].weight
    bound = math.sqrt(6 / 500)
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert all(not parameter.any() for name, parameter in model.named_parameters() if "bias" in name)
    assert same(model, MLP(300, [200], 10, init="xavier", seed=0))
    with pytest.raises(UsageError, match="init is 'kaiming'"):
        MLP(3, [], 2, init="kaiming")


def test_a_model_without_hidden_layers_is_linear():
    model = MLP(4, (), 2, seed=0)
    x = torch.rand(3, 2, 2)
    assert torch.equal(model(x), torch.nn.functional.linear(x.flatten(1), model.head.weight, model.head.bias))


def test_a_head_of_ones_own():
    head = nn.Linear(8, 3, bias=False)
    assert MLP(4, [8], 99, head=head).head is head


def test_slim_resnet_is_the_network_of_the_gem_paper():
    """On 32 x 32 images the mean over the map is the paper's 4 x 4 pooling."""
    model = SlimResNet18(3, 10, seed=0).eval()
    maps = []
    model.blocks.register_forward_hook(lambda module, inputs, output: maps.append(output))
    logits = model(torch.rand(2, 3, 32, 32))
    assert maps[0].shape == (2, 160, 4, 4)
    pooled = torch.nn.functional.avg_pool2d(maps[0], 4).flatten(1)
    torch.testing.assert_close(logits, model.head(pooled))
    widths = [block.conv1.out_channels for block in model.blocks]
    assert widths == [20, 20, 40, 40, 80, 80, 160, 160]


def test_bad_arguments_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'growing'"):
        build("mlp", head="grow")
    with pytest.raises(UsageError, match="small_cnn needs images"):
        models.get("small_cnn")(input_shape=(64,), outputs=2)


def test_the_package_imports_nothing_until_asked():
    code = "import sys, perdure.models; print('torch' in sys.modules, 'perdure.models.mlp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_exported_names_exist():
    import perdure.models as package

    assert all(hasattr(package, name) for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018
