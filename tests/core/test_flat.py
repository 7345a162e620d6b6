"""The step on the whole vector has the bits of the steps on its tensors, and nobody can tell it from them."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import perdure

MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "nesterov": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "dampened": partial(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.5, maximize=True),
    "adam": partial(torch.optim.Adam, lr=1e-2, weight_decay=1e-2),
    "amsgrad": partial(torch.optim.Adam, lr=1e-2, amsgrad=True),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, foreach=True),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 11), nn.Tanh(), nn.Linear(11, 3))


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 7, generator=draw), torch.randint(0, 3, (5,), generator=draw)) for _ in range(count)]


def by_hand(net: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("name", MAKERS)
def test_weights_and_states_are_those_of_the_plain_optimizer(name: str) -> None:
    ours, theirs = model(), model()
    own = MAKERS[name](ours.parameters())
    learner = perdure.Learner(ours, own)
    plain = MAKERS[name](theirs.parameters())
    for x, y in batches(20):
        learner.partial_fit(x, y)
    if name == "sgd":
        assert not learner.parameters.grad.numel(), "plain descent needs no vector of gradients"
    else:
        assert learner.flat._shadow is not None, "the flat step was taken"
        assert learner.parameters.complete
    by_hand(theirs, plain, batches(20))
    assert equal(list(ours.parameters()), list(theirs.parameters()))
    ours_state, theirs_state = own.state_dict(), plain.state_dict()
    assert equal({k: v for k, v in ours_state["state"].items() if v}, theirs_state["state"])


@pytest.mark.parametrize("name", MAKERS)
def test_a_learning_rate_that_the_caller_changes_counts_at_once(name: str) -> None:
    ours, theirs = model(), model()
    own, plain = MAKERS[name](ours.parameters()), MAKERS[name](theirs.parameters())
    learner = perdure.Learner(ours, own)
    for factor in (1.0, 0.1, 3.0):
        for optimizer in (own, plain):
            optimizer.param_groups[0]["lr"] *= factor
        for x, y in batches(3):
            learner.partial_fit(x, y)
        by_hand(theirs, plain, batches(3))
    assert equal(list(ours.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize("name", MAKERS)
def test_steps_with_an_idle_layer_in_between(name: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.a, self.b = nn.Linear(7, 9), nn.Linear(9, 3), nn.Linear(9, 3)
            self.both = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.body(x).tanh()
            out: torch.Tensor = self.a(hidden) + (self.b(hidden) if self.both else 0)
            return out

    ours, theirs = Two(), Two()
    learner = perdure.Learner(ours, MAKERS[name](ours.parameters()))
    plain = MAKERS[name](theirs.parameters())
    for both in (True, False, True):
        ours.both = theirs.both = both
        for x, y in batches(4):
            learner.partial_fit(x, y)
        by_hand(theirs, plain, batches(4))
    assert equal(list(ours.parameters()), list(theirs.parameters()))


def test_a_state_that_the_caller_loads_is_taken_over() -> None:
    ours, theirs = model(), model()
    own, plain = MAKERS["adam"](ours.parameters()), MAKERS["adam"](theirs.parameters())
    learner = perdure.Learner(ours, own)
    by_hand(theirs, plain, batches(5))
    for x, y in batches(3):
        learner.partial_fit(x, y)
    ours.load_state_dict(theirs.state_dict())
    own.load_state_dict(copy.deepcopy(plain.state_dict()))
    for x, y in batches(5):
        learner.partial_fit(x, y)
    by_hand(theirs, plain, batches(5))
    assert equal(list(ours.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.Adam, lr=1e-2, fused=True),
        partial(torch.optim.RMSprop, lr=1e-2),
        lambda p: torch.optim.SGD([{"params": [q]} for q in p], lr=0.1),
    ],
)
def test_where_bits_could_differ_it_keeps_out(make: Callable[..., torch.optim.Optimizer]) -> None:
    net = model()
    learner = perdure.Learner(net, make(net.parameters()))
    for x, y in batches(2):
        learner.partial_fit(x, y)
    assert learner.flat._shadow is None


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 0.0), (torch.float32, 1e-50), (torch.float64, 0.0)])
def test_adam_without_eps_does_not_divide_zero_by_zero_between_parameters(dtype: torch.dtype, eps: float) -> None:
    make = partial(torch.optim.Adam, lr=1e-2, eps=eps)
    ours, theirs = model().to(dtype), model().to(dtype)
    learner = perdure.Learner(ours, make)
    data = [(x.to(dtype), y) for x, y in batches(5)]
    for x, y in data:
        learner.partial_fit(x, y)
    by_hand(theirs, make(theirs.parameters()), data)
    assert equal(list(ours.parameters()), list(theirs.parameters()))
    assert not learner.parameters.theta[~learner.parameters.mask()].any()


def test_hooks_and_schedulers_of_the_caller_still_see_every_step() -> None:
    net = model()
    own = MAKERS["sgd"](net.parameters())
    seen = []
    own.register_step_post_hook(lambda *_: seen.append(1))
    learner = perdure.Learner(net, own)
    for x, y in batches(3):
        learner.partial_fit(x, y)
    assert len(seen) == 3


def test_a_caller_who_steps_his_optimizer_himself_counts_every_step_once() -> None:
    ours, theirs = model(), model()
    own, plain = MAKERS["adam"](ours.parameters()), MAKERS["adam"](theirs.parameters())
    learner = perdure.Learner(ours, own)
    for _ in range(2):
        for x, y in batches(3):
            learner.partial_fit(x, y)
        by_hand(ours, own, batches(2))
        by_hand(theirs, plain, [*batches(3), *batches(2)])
    assert equal(list(ours.parameters()), list(theirs.parameters()))
    assert equal(own.state_dict()["state"], plain.state_dict()["state"])
    copied = copy.deepcopy(own)
    steps = [state["step"] for state in copied.state.values()]
    steps[0].add_(1)
    assert float(steps[1]) == 10, "each parameter has a count of its own"
