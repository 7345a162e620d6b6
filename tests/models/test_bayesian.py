"""Mean-field layers: the law of their outputs, its limits, and noise that is the model's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from perdure.errors import ModelError
from perdure.models import MLP, GrowingHead, MeanFieldConv2d, MeanFieldLinear, mean_field
from perdure.models.bayesian import gaussian_kl, mean_field_layers
from perdure.registry import models


def layer_with_spread(seed: int = 0) -> MeanFieldLinear:
    draw = torch.Generator().manual_seed(seed)
    layer = MeanFieldLinear.of(nn.Linear(3, 2), seed=5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return layer


def test_divergence_of_gaussians_is_that_of_torch_distributions() -> None:
    draw = torch.Generator().manual_seed(0)
    m, s, m0, s0 = (torch.randn(50, generator=draw, dtype=torch.float64) * 2 for _ in range(4))
    q, p = (torch.distributions.Normal(mean, (0.5 * spread).exp()) for mean, spread in ((m, s), (m0, s0)))
    expected = torch.distributions.kl_divergence(q, p)
    for i in range(50):
        found = gaussian_kl(m[i], s[i], m0[i], s0[i])
        assert float(found) == pytest.approx(float(expected[i]), rel=1e-9)
        assert found > 0
    assert float(gaussian_kl(m, s, m0, s0)) == pytest.approx(float(expected.sum()), rel=1e-9)
    assert gaussian_kl(m, s, m, s) == 0


def test_training_outputs_have_the_law_of_drawn_weights() -> None:
    """Mean x m and variance x^2 s^2 for every output, independent between rows."""
    layer = layer_with_spread()
    x = torch.tensor([0.5, -1.0, 2.0])
    out = layer(x.expand(40000, 3)).detach()
    mean = layer.mean @ x + layer.bias_mean
    variance = layer.log_variance.exp() @ x.square() + layer.bias_log_variance.exp()
    drawn = []
    noise = torch.Generator().manual_seed(1)
    for _ in range(4000):
        layer.sample(noise)
        drawn.append(layer(x[None])[0].detach())
    layer.sample(None)
    for found, count in ((out, 40000), (torch.stack(drawn), 4000)):
        assert bool(((found.mean(0) - mean).abs() < 5 * (variance / count).sqrt()).all())
        assert bool(((found.var(0) / variance - 1).abs() < 5 * (2 / count) ** 0.5).all())
    assert abs(float(torch.corrcoef(torch.stack([out[:-1, 0], out[1:, 0]]))[0, 1])) < 0.02


def test_a_convolution_is_the_linear_layer_on_patches() -> None:
    draw = torch.Generator().manual_seed(0)
    conv = MeanFieldConv2d.of(nn.Conv2d(2, 3, 2, stride=2), seed=5)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    x = torch.randn(1, 2, 2, 2, generator=draw)
    out = conv(x.expand(30000, -1, -1, -1)).detach()[..., 0, 0]
    mean = conv.mean.flatten(1) @ x.flatten() + conv.bias_mean
    variance = conv.log_variance.exp().flatten(1) @ x.flatten().square() + conv.bias_log_variance.exp()
    assert bool(((out.mean(0) - mean).abs() < 5 * (variance / 30000).sqrt()).all())
    assert bool(((out.var(0) / variance - 1).abs() < 5 * (2 / 30000) ** 0.5).all())
    conv.eval()
    assert torch.allclose(conv(x)[0, :, 0, 0], mean, atol=1e-5)


def test_without_variance_it_is_the_plain_network_in_every_mode() -> None:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    plain = MLP(4, [6], 3, seed=0)
    bayesian = mean_field(copy.deepcopy(plain), log_variance=-80.0)
    assert torch.allclose(bayesian(x), plain(x), atol=1e-6)
    assert torch.equal(bayesian.eval()(x), plain(x))
    for layer in mean_field_layers(bayesian).values():
        layer.sample(torch.Generator().manual_seed(0))
    assert torch.allclose(bayesian(x), plain(x), atol=1e-6)


def test_an_input_of_zeros_to_a_layer_without_a_bias_has_finite_gradients() -> None:
    layer = MeanFieldLinear.of(nn.Linear(3, 2, bias=False))
    layer(torch.zeros(2, 3)).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_the_noise_is_new_at_every_pass_its_own_and_goes_on_from_a_saved_state() -> None:
    x = torch.ones(4, 3)
    layer, twin, other = layer_with_spread(), layer_with_spread(), layer_with_spread()
    before = torch.get_rng_state()
    first, second = layer(x), layer(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    assert torch.equal(twin(x), first)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_layers_have_noise_of_their_own() -> None:
    model = mean_field(nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)), seed=1)
    seeds = {layer.seed for layer in mean_field_layers(model).values()}
    assert len(seeds) == 2


def test_what_is_made_mean_field_and_what_is_not() -> None:
    model = mean_field(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 4), GrowingHead(4, 2)))
    assert [type(layer).__name__ for layer in model] == ["MeanFieldConv2d", "Flatten", "MeanFieldLinear", "GrowingHead"]
    assert isinstance(mean_field(nn.Linear(2, 2)), MeanFieldLinear)
    with pytest.raises(ModelError, match="pads with zeros, not 'circular'"):
        mean_field(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"))


def test_the_named_model_is_the_mlp_with_the_same_means() -> None:
    plain = models.get("mlp")(input_shape=(2, 3), outputs=4, hidden=(5,), seed=3)
    found = models.get("bayesian_mlp")(input_shape=(2, 3), outputs=4, hidden=(5,), seed=3, log_variance=-4.0)
    layers = mean_field_layers(found)
    assert list(layers) == ["body.0", "head"]
    assert torch.equal(layers["head"].mean, plain.head.weight)
    assert bool((layers["head"].log_variance == -4.0).all())
