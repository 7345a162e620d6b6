"""The autoencoder: its bound against torch's distributions and against the integral, its shapes, and its labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional as F

from perdure.errors import UsageError
from perdure.experiments.build import prepare
from perdure.experiments.config import Experiment
from perdure.models import VAE
from perdure.models.vae import divergence
from perdure.registry import models

DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def test_the_divergence_is_the_closed_form() -> None:
    mean, log_variance = torch.tensor([[1.0, -2.0], [0.0, 0.0]]), torch.tensor([[0.0, math.log(4.0)], [0.0, 0.0]])
    # 1/2 (1) + 1/2 (4 + 4 - 1 - ln 4), and nothing for the prior itself.
    assert divergence(mean, log_variance).tolist() == pytest.approx([0.5 + 3.5 - math.log(2.0), 0.0])
    m, v = draw(7, 5), draw(7, 5, seed=1)
    wanted = kl_divergence(Normal(m, (v / 2).exp()), Normal(torch.zeros(5).double(), torch.ones(5).double())).sum(1)
    torch.testing.assert_close(divergence(m, v), wanted)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_loss_is_the_negative_bound_in_nats(likelihood: str) -> None:
    vae = VAE((1, 3, 4), hidden=(9, 6), latent=2, likelihood=likelihood, seed=3).double()
    x, noise = (draw(8, 1, 3, 4) > 0).double(), draw(8, 2, seed=2)
    if vae.decoder.spread is not None:
        vae.decoder.spread.data.copy_(0.03 * draw(1, 3, 4, seed=5))
    mean, log_variance = vae.encode(x)
    q = Normal(mean, (log_variance / 2).exp())
    z = q.mean + q.stddev * noise
    if likelihood == "bernoulli":
        p = Bernoulli(probs=vae.decoder(z))
    else:
        variance = vae.decoder.log_variance
        assert variance is not None
        p = Normal(vae.decoder(z), (variance / 2).exp())
    prior = Normal(torch.zeros_like(z), torch.ones_like(z))
    wanted = kl_divergence(q, prior).sum(1) - p.log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(vae.losses(x, noise), wanted)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_bound_lies_below_the_integral_and_touches_it_at_the_true_posterior(likelihood: str) -> None:
    """log p(x) by summing over a grid of codes of one dimension."""
    vae = VAE((5,), hidden=(4,), latent=1, likelihood=likelihood, seed=1).double()
    x = (draw(1, 5) > 0).double()
    codes = torch.linspace(-9, 9, 20_001, dtype=DOUBLE)[:, None]
    joint = -vae.decoder.surprise(x.expand(len(codes), 5), codes) + Normal(0.0, 1.0).log_prob(codes[:, 0])
    step = float(codes[1, 0] - codes[0, 0])
    evidence = (torch.logsumexp(joint, 0) + math.log(step)).detach()
    bound = -vae.losses(x.expand(20_000, 5), draw(20_000, 1, seed=4)).mean().detach()
    assert bound < evidence
    # The gap is KL(q || p(z | x)) exactly.
    mean, log_variance = vae.encode(x)
    q = Normal(mean[0, 0], (log_variance[0, 0] / 2).exp())
    log_q, log_p = q.log_prob(codes[:, 0]), joint - evidence
    gap = (log_q.exp() * (log_q - log_p)).sum() * step
    assert float(evidence - bound) == pytest.approx(float(gap.detach()), abs=0.02)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 7, 9), (1, 1, 1)])
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_images_of_any_size_come_back_in_their_shape_and_every_parameter_learns(
    network: str, shape: tuple[int, ...]
) -> None:
    vae = VAE(shape, network=network, hidden=(16,), latent=3, seed=0)
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1))
    made = vae.decoder(torch.randn(6, 3, generator=torch.Generator().manual_seed(2)))
    assert made.shape == (6, *shape)
    assert 0 < float(made.min().detach()) < float(made.max().detach()) < 1, "a sigmoid bounds what is made"
    assert vae(x).shape == x.shape
    vae.losses(x, torch.ones(4, 3)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters() if p.numel() > 64)


def test_a_convolution_is_not_fooled_by_flattening() -> None:
    """A shifted image has a shifted response: the convolutional encoder sees where things are."""
    maps = VAE((1, 32, 32), network="conv", hidden=(8,), latent=2, seed=0).encoder.maps
    x = torch.zeros(1, 1, 32, 32)
    x[..., 14, 14] = 1.0
    here, there = (maps(image) - maps(torch.zeros_like(x)) for image in (x, x.roll((4, 4), (2, 3))))
    assert here.abs().max() > 0.01
    torch.testing.assert_close(there, here.roll((1, 1), (2, 3)))


def test_a_label_is_a_one_hot_code_beside_the_input_of_a_layer() -> None:
    vae = VAE((6,), hidden=(5,), latent=2, classes=3, seed=0).double()
    z, y = draw(4, 2), torch.tensor([2, 0, 1, 2])
    first, labels = vae.decoder.first, vae.decoder.labels
    assert labels is not None
    beside = F.linear(torch.cat([z, F.one_hot(y, 3).double()], 1), torch.cat([first.weight, labels.T], 1), first.bias)
    torch.testing.assert_close(vae.decoder(z, y), vae.decoder.body(beside.relu()).sigmoid())
    assert not torch.equal(vae.decoder(z, y), vae.decoder(z, (y + 1) % 3))
    assert not torch.equal(vae.encode(draw(4, 6), y)[0], vae.encode(draw(4, 6), (y + 1) % 3)[0])
    with pytest.raises(UsageError, match="give the labels"):
        vae.decoder(z)


def test_more_labels_leave_the_others_as_they_were() -> None:
    vae = VAE((6,), hidden=(5,), latent=2, classes=2, seed=0)
    z, y = draw(4, 2).float(), torch.tensor([0, 1, 1, 0])
    before = vae.decoder(z, y)
    vae.grow(5, torch.Generator().manual_seed(1))
    assert torch.equal(vae.decoder(z, y), before)
    assert vae.decoder(z, torch.full((4,), 4)).shape == (4, 6)
    assert vae.encoder.labels is not None
    assert len(vae.encoder.labels) == vae.classes == 5


def test_a_gaussian_decoder_learns_the_variance_of_each_value() -> None:
    """Of noise that nothing explains, the variances are all there is to learn: 0.04 and 1."""
    scale = torch.tensor([0.2, 1.0, 0.2, 1.0])
    vae = VAE((4,), hidden=(8,), latent=1, likelihood="gaussian", seed=0)
    noise = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    for _ in range(400):
        x = torch.randn(64, 4, generator=noise) * scale
        optimizer.zero_grad()
        vae.losses(x, torch.randn(64, 1, generator=noise)).mean().backward()
        optimizer.step()
    made = vae.decoder(torch.randn(4000, 1, generator=noise), None, torch.randn(4000, 4, generator=noise))
    torch.testing.assert_close(made.detach().std(0), scale, atol=0, rtol=0.12)
    means = vae.decoder(torch.randn(4000, 1, generator=noise))
    assert (means.detach().std(0) < 0.5 * scale).all(), "the means alone would be too narrow"


def test_the_scale_starts_at_that_of_the_data() -> None:
    vae = VAE((3,), likelihood="gaussian", seed=0)
    x = draw(500, 3).float() * torch.tensor([0.1, 1.0, 10.0])
    vae.decoder.scale_to(x)
    assert vae.decoder.log_variance is not None
    torch.testing.assert_close(vae.decoder.log_variance.detach().exp(), x.var(0, correction=0))


def test_a_seed_decides_every_bit_and_touches_no_global_generator() -> None:
    before = torch.get_rng_state()
    one, two = (VAE((1, 8, 8), network="conv", classes=2, seed=5).state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[key], two[key]) for key in one)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        usual = VAE((1, 8, 8), network="conv", classes=2).state_dict()
    assert all(torch.equal(one[key], usual[key]) for key in one)


def test_it_is_registered_and_is_no_classifier() -> None:
    vae = models.get("vae")(input_shape=(1, 8, 8), outputs=10, conditional=True, seed=0)
    assert isinstance(vae, VAE)
    assert vae.classes == 10
    assert models.get("vae")(input_shape=(1, 8, 8), outputs=10, seed=0).classes == 0
    with pytest.raises(UsageError, match="gives no class scores"):
        prepare(Experiment.from_mapping({"model": "vae"}), 0)


@pytest.mark.parametrize(
    ("shape", "arguments", "match"),
    [
        ((4,), {"network": "conv"}, "needs images"),
        ((4,), {"network": "rnn"}, "mlp or conv"),
        ((4,), {"likelihood": "laplace"}, "bernoulli or gaussian"),
        ((4,), {"hidden": ()}, "hidden layer"),
        ((4,), {"latent": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_refused(shape: tuple[int, ...], arguments: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        VAE(shape, **arguments)  # type: ignore[arg-type]
