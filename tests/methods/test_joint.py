"""Joint training: after every task the model is what training on the union from the initial weights gives."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from small_problems import current_loss, masked_cross_entropy, momentum, same_bits, sgd, toy_model, toy_stream
from torch import nn

import perdure
from perdure.methods import Joint
from perdure.streams.task import draw_plan

OPTIMIZERS = {"momentum": momentum, "adam": partial(torch.optim.Adam, lr=0.01)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("scenario", "norm"), [("class", False), ("class", True), ("domain", True)])
def test_it_is_training_on_the_union_from_the_initial_weights(scenario: str, norm: bool, optimizer: str) -> None:
    stream = toy_stream(scenario)
    outputs = 2 if scenario == "domain" else 6
    ours = toy_model(outputs, norm=norm)
    initial = copy.deepcopy(ours)
    learner = perdure.Learner(ours, OPTIMIZERS[optimizer], [Joint()])
    learner.fit(stream, epochs=2, batch_size=8)

    theirs = copy.deepcopy(initial)
    step = OPTIMIZERS[optimizer](theirs.parameters())
    x = torch.cat([task.train.x for task in stream])
    y = torch.cat([task.train.targets for task in stream])
    for rows in draw_plan(120, (0, "plan", 2), epochs=2, batch_size=8):
        step.zero_grad()
        current_loss(theirs(x[rows]), y[rows], stream[2], scenario).backward()
        step.step()
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("head", [None, "multi"])
def test_each_row_counts_on_its_own_tasks_columns(head: str | None) -> None:
    stream = toy_stream("task")
    ours = toy_model(head=head)
    perdure.Learner(ours, sgd, [Joint()]).fit(stream, batch_size=8)

    theirs = toy_model(head=head)
    if head == "multi":
        for task in stream:
            theirs.head.add(task.index, task.classes)
        theirs.head.activate(None)
    step = sgd(theirs.parameters())
    x = torch.cat([task.train.x for task in stream])
    y = torch.cat([task.train.targets for task in stream])
    for rows in draw_plan(120, (0, "plan", 2), batch_size=8):
        step.zero_grad()
        masked_cross_entropy(theirs(x[rows]), y[rows], [stream[int(i) // 40].classes for i in rows]).backward()
        step.step()
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert all(torch.allclose(ours_state[key], theirs_state[key], atol=1e-5) for key in theirs_state)


@pytest.mark.parametrize("head", ["growing", "multi"])
def test_heads_that_grow_begin_anew_too(head: str) -> None:
    """With a rate of almost zero, every task ends at the weights the model began with."""
    stream = toy_stream("task")
    model = toy_model(head=head, norm=head == "growing")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner = perdure.Learner(model, partial(torch.optim.SGD, lr=1e-12), [Joint()])
    learner.fit(stream, batch_size=8)
    end = model.state_dict()
    assert torch.allclose(end["body.0.weight"], start["body.0.weight"], atol=1e-9)
    fresh = toy_model(head=head)
    for task in stream:
        if head == "growing":
            fresh.head.grow(max(task.classes) + 1)
        else:
            fresh.head.add(task.index, task.classes)
    assert all(torch.allclose(end[f"head.{name}"], value, atol=1e-7) for name, value in fresh.head.state_dict().items())
    # Of the running statistics only those of the last, joint task are left: 15 batches, not 5 + 10 + 15.
    if head == "growing":
        assert int(end["body.1.num_batches_tracked"]) == 15


def test_without_restart_training_goes_on_from_the_current_weights() -> None:
    stream = toy_stream("domain")
    ours = toy_model(2)
    perdure.Learner(ours, momentum, [Joint(restart=False)]).fit(stream, batch_size=8)
    theirs = toy_model(2)
    step = momentum(theirs.parameters())
    x = torch.cat([task.train.x for task in stream])
    y = torch.cat([task.train.targets for task in stream])
    for task in stream:
        for rows in draw_plan(40 * (task.index + 1), (0, "plan", task.index), batch_size=8):
            step.zero_grad()
            nn.functional.cross_entropy(theirs(x[rows]), y[rows]).backward()
            step.step()
    assert same_bits(ours, theirs)


def test_a_schedule_begins_anew_too() -> None:
    """Otherwise the last union would be trained with what an earlier task's schedule left of the rate."""
    stream = toy_stream("domain")
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.5)
    ours, theirs = toy_model(2), toy_model(2)
    perdure.Learner(ours, momentum, [Joint()], scheduler=schedule).fit(stream, batch_size=8)
    step = momentum(theirs.parameters())
    rates = schedule(step)
    x = torch.cat([task.train.x for task in stream])
    y = torch.cat([task.train.targets for task in stream])
    for rows in draw_plan(120, (0, "plan", 2), batch_size=8):
        step.zero_grad()
        nn.functional.cross_entropy(theirs(x[rows]), y[rows]).backward()
        step.step()
        rates.step()
    assert same_bits(ours, theirs)


def test_it_needs_the_whole_stream() -> None:
    stream = toy_stream("class")
    learner = perdure.Learner(toy_model(), momentum, [Joint()])
    with pytest.raises(perdure.errors.UsageError, match="whole stream"):
        learner.begin_task(stream[0])
