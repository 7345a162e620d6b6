"""Heads that follow the tasks: old rows keep their bits, new ones follow torch's law, a state rebuilds them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from perdure.errors import UnknownNameError, UsageError
from perdure.models.heads import CosineHead, GrowingHead, MultiHead

X = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))


def test_growth_keeps_old_rows_and_makes_new_parameters():
    head = GrowingHead(7, 2)
    head.weight.grad = torch.ones_like(head.weight)
    old, weight, bias = head.weight, head.weight.detach().clone(), head.bias.detach().clone()
    head.grow(6)
    assert head.weight is not old
    assert isinstance(head.weight, nn.Parameter)
    assert head.weight.shape == (6, 7)
    assert head.out_features == 6
    assert head.weight.grad is None
    assert torch.equal(head.weight[:2], weight)
    assert torch.equal(head.bias[:2], bias)
    grown = head.weight
    head.grow(6)
    head.grow(3)
    assert head.weight is grown


@pytest.mark.parametrize("kind", [GrowingHead, CosineHead])
def test_a_head_may_begin_with_nothing_and_steps_do_not_matter(kind):
    rng = torch.get_rng_state()
    slow, fast = kind(7, seed=3), kind(7, 9, seed=3)
    assert slow.weight.shape == (0, 7)
    assert slow(X).shape == (5, 0)
    for width in (2, 3, 9):
        slow.grow(width)
    assert torch.equal(slow.weight, fast.weight)
    assert torch.equal(slow(X), fast(X))
    assert torch.equal(rng, torch.get_rng_state())
    assert not torch.equal(fast.weight, kind(7, 9, seed=4).weight)


def test_new_rows_follow_torchs_default_law():
    head = GrowingHead(16, seed=1)
    head.grow(800)
    bound = 1 / 4
    for values in (head.weight, head.bias):
        assert values.abs().max() <= bound
        assert values.mean().abs() < 4.5 * bound / math.sqrt(3 * values.numel())
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)
    rows = head.weight - head.weight.mean()
    cosine = (rows[:-1] * rows[1:]).sum(1) / (rows[:-1].norm(dim=1) * rows[1:].norm(dim=1))
    assert cosine.mean().abs() < 4.5 * 0.25 / math.sqrt(799)


def test_growth_keeps_dtype_and_frozenness():
    head = GrowingHead(7, 2).double().requires_grad_(False)
    head.grow(4)
    assert head.weight.dtype == torch.float64
    assert not head.weight.requires_grad
    assert not head.bias.requires_grad


@pytest.mark.parametrize("kind", [GrowingHead, CosineHead])
@pytest.mark.parametrize("width", [0, 3, 9])
def test_loading_takes_over_the_saved_width(kind, width):
    saved = nn.Sequential(nn.Linear(7, 7), kind(7, width, seed=1))
    fresh = nn.Sequential(nn.Linear(7, 7), kind(7, 5, seed=2))
    fresh.load_state_dict(saved.state_dict())
    assert fresh[1].out_features == width
    assert torch.equal(saved(X), fresh(X))
    fresh[1].grow(11)
    saved[1].grow(11)
    assert torch.equal(saved(X)[:, :width], fresh(X)[:, :width])


def test_cosine_logits_are_scaled_cosines():
    head = CosineHead(7, 4, scale=3.0)
    expected = 3 * nn.functional.cosine_similarity(X[:, None], head.weight[None], dim=-1)
    torch.testing.assert_close(head(X), expected)
    torch.testing.assert_close(head(10 * X), expected)
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    learnable = CosineHead(7, 4, learnable=True)
    assert {name for name, _ in learnable.named_parameters()} == {"weight", "scale"}
    learnable.grow(6)
    assert learnable.scale.item() == 10


def multi(seed: int = 0) -> MultiHead:
    head = MultiHead(7, seed=seed)
    head.add(0, (0, 1))
    head.add("b.c", (4, 2))
    return head


def test_each_head_writes_its_own_columns():
    head = multi()
    first, second = (head.heads[name] for name in head.heads)
    assert head.columns == 5
    head.activate(0)
    out = head(X)
    assert torch.equal(out[:, :2], first(X))
    assert (out[:, 2:] == -math.inf).all()
    head.activate("b.c")
    assert torch.equal(head(X)[:, [4, 2]], second(X))
    assert (head(X)[:, [0, 1, 3]] == -math.inf).all()
    head.activate(None)
    everything = head(X)
    assert torch.equal(everything[:, [0, 1, 4, 2]], torch.cat([first(X), second(X)], 1))
    assert (everything[:, 3] == -math.inf).all()


def test_only_the_active_head_gets_a_gradient():
    head = multi()
    head.activate("b.c")
    nn.functional.cross_entropy(head(X), torch.tensor([4, 2, 4, 2, 4])).backward()
    first, second = (head.heads[name] for name in head.heads)
    assert first.weight.grad is None
    assert second.weight.grad.isfinite().all()
    assert second.weight.grad.any()


def test_adding_a_head_changes_no_other_and_depends_on_the_key_alone():
    head = multi()
    before = copy.deepcopy(head.state_dict())
    rng = torch.get_rng_state()
    head.add(2, (5,))
    head.add(0, (0, 1))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(head.state_dict()[key], value) for key, value in before.items())
    assert head.columns == 6
    other = MultiHead(7)
    other.add(2, (5,))
    assert torch.equal(other.heads["task_2"].weight, head.heads["task_2"].weight)
    assert not torch.equal(head.heads["task_0"].weight, head.heads["task_b%2Ec"].weight)
    with pytest.raises(UsageError, match="'0' has a head for columns"):
        head.add("0", (0, 3))


def test_heads_are_rebuilt_from_a_state():
    saved = nn.Sequential(nn.Linear(7, 7), multi(seed=1))
    fresh = nn.Sequential(nn.Linear(7, 7), MultiHead(7, seed=2))
    fresh[1].add("other", (8,))
    fresh[1].add(0, (3,))
    fresh[1].activate("other")
    fresh.load_state_dict(saved.state_dict())
    assert fresh[1].columns == 5
    assert "other" not in fresh[1]
    assert "b.c" in fresh[1]
    for key in (0, "b.c", None):
        saved[1].activate(key)
        fresh[1].activate(key)
        assert torch.equal(saved(X), fresh(X))


@pytest.mark.parametrize("key", ["keys", "2026-11", "a.b%2Ec", "training", ""])
def test_any_text_is_a_task_key(key):
    head = MultiHead(7)
    head.add(key, (0,))
    assert key in head
    head.activate(key)
    other = MultiHead(7)
    other.load_state_dict(head.state_dict())
    assert key in other
    with pytest.raises(UnknownNameError, match="there are heads for " + ("none" if not key else "")):
        head.activate("some other task")


def test_no_head_yet():
    head = MultiHead(7)
    assert head(X).shape == (5, 0)
    with pytest.raises(UnknownNameError, match="task '3' has no head; there are heads for none"):
        head.activate(3)


def test_a_new_head_has_the_dtype_and_mode_of_its_model():
    head = MultiHead(7).double().eval()
    head.add(0, (0,))
    assert head(X.double()).dtype == torch.float64
    assert not head.heads["task_0"].training
