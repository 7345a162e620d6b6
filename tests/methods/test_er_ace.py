"""ER-ACE: which columns the loss of new rows touches, in any order of classes, alone and beside other replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_problems import (
    Watcher,
    batches,
    gradient_of,
    masked_cross_entropy,
    same_bits,
    sgd,
    sgd_step,
    toy_model,
    toy_stream,
    weights,
)
from torch import Tensor
from torch.nn import functional as F

import perdure
from perdure.batch import Batch
from perdure.data.examples import Examples
from perdure.memory import Buffer
from perdure.methods import ERACE, DERpp, Replay
from perdure.seeding import derive
from perdure.streams.task import Stream, Task


def columns_of_new(present: set[int], seen: set[int], among: tuple[int, ...]) -> list[int]:
    """The classes that a loss of new rows may touch: their own, and those that never came."""
    return [c for c in among if c in present or c not in seen]


@pytest.mark.parametrize("scenario", ["class", "task"])
@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_training_equals_a_hand_written_loop(scenario: str, forward: str) -> None:
    stream = toy_stream(scenario)
    ours, theirs = toy_model(), toy_model()
    perdure.Learner(ours, sgd, [ERACE(capacity=20, batch_size=5, weight=0.7, forward=forward)]).fit(
        stream, batch_size=8, epochs=2
    )
    memory, seen = Buffer(20, seed=derive(0, "buffer", "er_ace")), set()
    for task in stream:
        for step, (x, y) in enumerate(batches(stream, task.index, epochs=2)):
            seen |= set(y.tolist())
            among = task.classes if scenario == "task" else tuple(range(6))
            own = columns_of_new(set(y.tolist()), seen, among)
            loss = masked_cross_entropy(theirs(x), y, [own] * len(y))
            if len(memory):
                old = memory.sample(5)
                known = [
                    [c for c in (stream[t].classes if scenario == "task" else range(6)) if c in seen]
                    for t in old["task"].tolist()
                ]
                loss = loss + 0.7 * masked_cross_entropy(theirs(old["x"]), old["y"], known)
            sgd_step(theirs, gradient_of(loss, theirs))
            if step < 5:
                memory.add({"x": x, "y": y, "task": torch.full((len(y),), task.index)})
    assert torch.allclose(weights(ours), weights(theirs), atol=5e-6)


def seen_all_then(y: Tensor) -> tuple[perdure.Learner, ERACE, Batch]:
    """A learner that has seen classes 0 to 4 of 6, and a batch with the labels `y`."""
    method = ERACE(capacity=20)
    learner = perdure.Learner(toy_model(), sgd, [method], scenario="online")
    x = torch.randn(5, 5, generator=torch.Generator().manual_seed(3))
    learner.step(x, torch.arange(5))
    learner.parameters.release()
    return learner, method, Batch.current(x[: len(y)], y)


def test_new_rows_give_no_gradient_to_the_outputs_of_seen_classes_that_are_absent() -> None:
    learner, method, batch = seen_all_then(torch.tensor([2, 2, 4]))
    replayed = method.on_batch(batch)
    outputs = learner.forward.batch(replayed, None)
    alone = replayed.with_sources(replayed.now)
    loss = method.criterion(outputs[: batch.size], alone)
    loss.backward()
    rows = learner.model.head.weight.grad.abs().sum(1) + learner.model.head.bias.grad.abs()
    assert [bool(row) for row in rows] == [False, False, True, False, True, True]  # 5 has not been seen
    learner.parameters.release()
    plain = learner.forward.batch(batch, None)
    learner.criterion(plain, batch, learner.allowed).backward()
    assert bool((learner.model.head.bias.grad != 0).all())


def test_remembered_rows_push_every_seen_class_and_none_that_never_came() -> None:
    learner, method, batch = seen_all_then(torch.tensor([2, 2, 4]))
    batch = method.on_batch(batch)
    outputs = learner.forward.batch(batch, None).detach().requires_grad_()
    method.criterion(outputs, batch).backward()
    remembered = outputs.grad[batch.slice("er_ace")]
    assert bool((remembered[:, :5] != 0).all())
    assert not remembered[:, 5].any()


def relabelled(stream: Stream, order: list[int]) -> Stream:
    """The same rows in the same tasks, where class c is called order[c]."""
    names = torch.tensor(order)

    def renamed(examples: Examples) -> Examples:
        return Examples(examples.x, names[examples.targets])

    tasks = [
        Task(t.index, t.name, renamed(t.train), renamed(t.test), tuple(sorted(order[c] for c in t.classes)))
        for t in stream
    ]
    return Stream(tasks, scenario=stream.scenario, seed=stream.seed)


@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]], ids=str)
@pytest.mark.parametrize("extra", [[], [DERpp(capacity=20)]], ids=["alone", "derpp"])
def test_the_order_in_which_classes_arrive_changes_nothing_but_their_names(order: list[int], extra: list[Any]) -> None:
    stream = toy_stream("class")
    ours, theirs = toy_model(), toy_model()
    with torch.no_grad():
        theirs.head.weight[order] = ours.head.weight.clone()
        theirs.head.bias[order] = ours.head.bias.clone()
    perdure.Learner(ours, sgd, [ERACE(capacity=20), *extra]).fit(stream, batch_size=8)
    perdure.Learner(theirs, sgd, [ERACE(capacity=20), *extra]).fit(relabelled(stream, order), batch_size=8)
    assert torch.allclose(theirs.head.weight[order], ours.head.weight, atol=1e-5)
    assert torch.allclose(theirs.body[0].weight, ours.body[0].weight, atol=1e-5)


@pytest.mark.parametrize("companion", ["derpp", "replay"])
def test_beside_other_replay_it_changes_the_loss_of_new_rows_alone(companion: str) -> None:
    """One step, with the rows that were drawn, against the sum of the terms written out."""
    stream = toy_stream("class")
    other = DERpp(capacity=20, alpha=0.3, beta=0.6) if companion == "derpp" else Replay(capacity=20)
    method, watcher = ERACE(capacity=20), Watcher()
    learner = perdure.Learner(toy_model(), sgd, [method, other, watcher], scenario="class")
    learner.fit_task(stream[0], batch_size=8)
    learner.begin_task(stream[1])
    x, y = batches(stream, 1)[0]
    before = learner.parameters.theta.clone()
    learner.step(x, y)
    batch = watcher.steps[-1]["batch"]
    learner.parameters.theta.copy_(before)
    model = learner.model
    loss = masked_cross_entropy(model(x), y, [[2, 3, 4, 5]] * 8)
    ace = batch.find("er_ace")
    loss = loss + masked_cross_entropy(model(ace.x), ace.y, [[0, 1, 2, 3]] * ace.size)
    if companion == "derpp":
        dark, labels = batch.find("derpp_logits"), batch.find("derpp_labels")
        loss = loss + 0.3 * F.mse_loss(model(dark.x), dark.extras["logits"])
        loss = loss + 0.6 * F.cross_entropy(model(labels.x), labels.y)
    else:
        old = batch.find("replay")
        loss = loss + F.cross_entropy(model(old.x), old.y)
    raw = watcher.steps[-1]["raw"][learner.parameters.mask()]
    assert torch.allclose(raw, gradient_of(loss, model), atol=1e-6)


def test_a_batch_in_pieces_is_the_whole_batch() -> None:
    """A piece may lack a class that the batch has; the columns are still those of the batch."""
    stream = toy_stream("class")
    found = []
    for pieces in (1, 4):
        model = toy_model()
        perdure.Learner(model, sgd, [ERACE(capacity=20, batch_size=5)], micro_batches=pieces).fit(stream, batch_size=8)
        found.append(weights(model))
    assert torch.allclose(found[0], found[1], atol=1e-6)


@pytest.mark.parametrize("off", [{"capacity": 0}, {"ratio": 0}, {"batch_size": 0}], ids=str)
def test_without_memory_it_is_fine_tuning(off: dict[str, Any]) -> None:
    stream = toy_stream("class")
    ours, plain = toy_model(norm=True), toy_model(norm=True)
    perdure.Learner(ours, sgd, [ERACE(**off)]).fit(stream, batch_size=8)
    perdure.Learner(plain, sgd).fit(stream, batch_size=8)
    assert same_bits(ours, plain)


def test_a_growing_head_and_labels_that_are_no_columns() -> None:
    stream = toy_stream("class")
    method = ERACE(capacity=20)
    learner = perdure.Learner(toy_model(head="growing"), sgd, [method])
    learner.fit(stream, batch_size=8)
    assert method.seen.tolist() == [True] * 6
    with pytest.raises(perdure.errors.UsageError, match="targets must be class columns"):
        perdure.Learner(toy_model(), sgd, [ERACE()], scenario="class").step(torch.ones(2, 5), torch.ones(2))


@pytest.mark.parametrize("writing", ["herding", "loss_aware", "greedy_balanced", "ring"])
def test_its_buffer_may_be_written_like_that_of_replay(writing: str) -> None:
    stream = toy_stream("class")
    methods = ERACE(capacity=18, writing=writing), Replay(capacity=18, writing=writing)
    for method in methods:
        learner = perdure.Learner(toy_model(), sgd, [method], scenario="class")
        learner.fit_task(stream[0], batch_size=8)
        assert len(method.buffer) == 18
    kept = [{tuple(row) for row in method.buffer.view("x").tolist()} for method in methods]
    assert kept[0] == kept[1] or writing in ("herding", "loss_aware"), "these two follow the model"


def test_it_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(perdure.errors.IncompatibleError, match="not defined on a domain-incremental"):
        perdure.Learner(toy_model(2), sgd, [ERACE()], scenario="domain")
    model = toy_model()
    with pytest.raises(perdure.errors.IncompatibleError, match="cannot be attached"):
        perdure.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [ERACE()])
