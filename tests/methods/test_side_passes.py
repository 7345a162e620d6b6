"""Side passes leave no trace: modes, running statistics and counters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from perdure.methods.side_passes import eval_mode, frozen_statistics

X = torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1


def model() -> nn.Module:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), norm, nn.Dropout(0.5), nn.Flatten(), nn.BatchNorm1d(36))


def unchanged(one: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[key]) for key, value in one.state_dict().items())


def test_eval_mode_restores_every_modules_own_mode_also_after_an_error():
    net = model().train()
    net[1].eval()
    modes = [module.training for module in net.modules()]
    inside = []
    with pytest.raises(RuntimeError), eval_mode(net):  # noqa: PT012
        inside += [module.training for module in net.modules()]
        net(X[:, :1])
    assert not any(inside)
    assert modes == [module.training for module in net.modules()]


def test_frozen_statistics_normalise_like_training_and_record_nothing():
    net = model().train()
    net[3].eval()
    before = copy.deepcopy(net.state_dict())
    with frozen_statistics(net):
        inside = net(X)
    assert unchanged(net, before)
    assert torch.equal(inside, net(X))
    assert not unchanged(net, before)


def test_frozen_statistics_leave_evaluation_as_it_is():
    net = model().train()
    net(X)
    net.eval()
    expected = net(X)
    with frozen_statistics(net):
        assert torch.equal(net(X), expected)


def test_statistics_are_recorded_again_afterwards_also_after_an_error():
    net = nn.BatchNorm2d(3)
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    both = nn.Sequential(net, untracked)
    with pytest.raises(KeyError), frozen_statistics(both):
        raise KeyError
    both(X)
    assert net.num_batches_tracked == 1
    assert net.running_mean.any()
    assert not untracked.track_running_stats


def test_gradients_flow_through_frozen_statistics():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    with frozen_statistics(net):
        net(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
