"""Augmentation: what it does to images, that every draw is a new one, that nothing stores it, and that it resumes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import perdure
from perdure.augment import RandomCrop, RandomFlip
from perdure.batch import Batch
from perdure.data.examples import Examples
from perdure.errors import DataError, UnknownNameError, UsageError
from perdure.experiments.config import Experiment
from perdure.methods import AGEM, DER, GEM, DERpp, Method, Replay
from perdure.seeding import generator
from perdure.streams.task import Stream, Task

sgd = partial(torch.optim.SGD, lr=0.05)


def pictures(dtype: torch.dtype = torch.uint8, count: int = 12) -> Tensor:
    made = torch.randint(1, 256, (count, 3, 6, 5), generator=torch.Generator().manual_seed(0))
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [True, False])
def test_a_crop_is_the_picture_moved_over_zeros_by_any_amount_alike(dtype: torch.dtype, channels: bool) -> None:
    x = pictures(dtype)[:1].expand(4000, -1, -1, -1)
    x = x if channels else x[:, 0]
    moved = RandomCrop(2)(x, torch.Generator().manual_seed(3))
    assert moved.dtype == dtype
    assert moved.shape == x.shape
    wide = F.pad(x[0], (2, 2, 2, 2))
    found = torch.zeros(5, 5)
    for down in range(5):
        for right in range(5):
            expected = wide[..., down : down + 6, right : right + 5]
            found[down, right] = (moved == expected).flatten(1).all(1).sum()
    assert found.sum() == 4000
    assert float(((found - 160) ** 2 / 160).mean()) < 1 + 4.5 * (2 / 24) ** 0.5


def test_a_flip_turns_every_second_picture() -> None:
    x = pictures(count=2000)
    turned = RandomFlip()(x, torch.Generator().manual_seed(3))
    same, other = ((turned == y).flatten(1).all(1) for y in (x, x.flip(3)))
    assert bool((same ^ other).all())
    assert abs(int(same.sum()) - 1000) < 4.5 * 500**0.5


def image_stream(tasks: int = 3) -> Stream:
    made = []
    for index in range(tasks):
        draw = torch.Generator().manual_seed(index)
        x = torch.randint(1, 256, (32, 6, 5), generator=draw).to(torch.uint8)
        y = torch.arange(32) % 2 + 2 * index
        made.append(Task(index, f"t{index}", Examples(x, y), Examples(x[:8], y[:8]), (2 * index, 2 * index + 1)))
    return Stream(made, scenario="class", seed=0)


def model() -> Any:
    return perdure.models.MLP(30, [8], 6, seed=1)


class Views(Method):
    name = "zz_views"
    ranks = {"on_batch": 99}  # noqa: RUF012

    def __init__(self) -> None:
        self.seen: list[Batch] = []

    def arguments(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def on_batch(self, batch: Batch) -> Batch:
        self.seen.append(batch)
        return batch


def known(x: Tensor, y: Tensor, stream: Stream) -> int:
    """How many of the rows are examples of the stream as they are."""
    pairs = [(r, t) for task in stream for r, t in zip(task.train.x, task.train.targets, strict=True)]
    every = {(tuple(r.flatten().tolist()), int(t)) for r, t in pairs}
    return sum((tuple(r.flatten().tolist()), int(t)) in every for r, t in zip(x, y, strict=True))


@pytest.mark.parametrize("method", [Replay, DERpp, partial(Replay, writing="herding"), partial(DER, writing="ring")])
def test_every_row_of_a_step_is_changed_and_every_stored_row_is_not(method: Any) -> None:
    stream, views, own = image_stream(), Views(), method(capacity=20)
    perdure.Learner(model(), sgd, [own, views], augment="crop").fit(stream, batch_size=8)
    assert known(own.buffer.view("x"), own.buffer.view("y"), stream) == 20
    sources = [source for batch in views.seen for source in batch.sources]
    assert {"current"} < {source.name for source in sources}
    for source in sources:
        assert source.x.dtype == torch.uint8
        assert known(source.x, source.y, stream) <= 2  # 1 of 81 is not moved
    assert all(known(batch.now.stored, batch.now.y, stream) == 8 for batch in views.seen)


@pytest.mark.parametrize("method", [partial(GEM, per_task=20), partial(AGEM, per_task=20, batch_size=10)])
def test_reference_gradients_are_of_changed_rows_too_and_new_ones_in_every_step(method: Any) -> None:
    def moved(x: Tensor, generator: torch.Generator) -> Tensor:
        return x.float() + 1000 + torch.rand(len(x), 1, 1, generator=generator)

    stream, own, net, seen = image_stream(2), method(), model(), []
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    learner = perdure.Learner(net, partial(torch.optim.SGD, lr=1e-9), [own], scenario="class", augment=moved)
    for task in stream:
        learner.fit_task(task, batch_size=8)
    kept = own.memory.finished
    assert sum(len(memory["y"]) for memory in kept) == 40
    assert all(known(memory["x"], memory["y"], stream) == 20 for memory in kept)
    assert len(seen) == 4 + 2 * 4
    assert all(float(x.min()) >= 1000 for x in seen)
    assert len(torch.unique(torch.cat([x.flatten(1)[:, 0] for x in seen]))) == sum(map(len, seen))


def test_training_equals_a_loop_by_hand_with_a_function_of_ones_own() -> None:
    """New noise for the current rows and for every draw, from a generator that nobody else uses."""

    def noise(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + 0.3 * torch.rand(x.shape, generator=generator)

    stream, ours, theirs = image_stream(), model(), model()
    scaled = [replace(task, train=Examples(task.train.x / 255, task.train.targets)) for task in stream]
    stream = Stream(scaled, scenario="class", seed=0)
    method = DER(capacity=20, batch_size=5, alpha=0.5)
    before = torch.get_rng_state()
    perdure.Learner(ours, sgd, [method], augment=noise, seed=4).fit(stream, batch_size=8)
    assert torch.equal(torch.get_rng_state(), before)
    memory = perdure.memory.Buffer(20, seed=perdure.seeding.derive(4, "buffer", "der"))
    draws = generator(4, "augment")
    optimizer = sgd(theirs.parameters())
    for task in stream:
        for rows in stream.plan(task, batch_size=8):
            x, y = task.train.gather(rows)
            z = theirs(noise(x, draws))
            loss = F.cross_entropy(z, y)
            if len(memory):
                old = memory.sample(5)
                loss = loss + 0.5 * F.mse_loss(theirs(noise(old["x"], draws)), old["logits"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            memory.add({"x": x, "y": y, "task": task.index, "logits": z})
    assert torch.allclose(ours.head.weight, theirs.head.weight, atol=1e-6)
    assert torch.equal(method.buffer.view("x"), memory.view("x"))
    assert torch.allclose(method.buffer.view("logits"), memory.view("logits"), atol=1e-5)


def test_evaluation_sees_no_augmentation() -> None:
    learner = perdure.Learner(model(), sgd, augment="crop_flip")
    x = image_stream()[0].test.x
    learner.adopt(image_stream())
    assert torch.equal(learner.outputs(x), learner.model(x.float().div(255).unsqueeze(1)))


def half_dark(x: Tensor, generator: torch.Generator) -> Tensor:
    return x * (torch.rand(len(x), 1, 1, generator=generator) < 0.5)


@pytest.mark.parametrize("augment", ["crop_flip", half_dark])
def test_it_resumes_inside_a_task_to_the_same_bits(augment: Any, tmp_path: Path) -> None:
    stream = image_stream()

    def run(learner: perdure.Learner, since: tuple[int, int], until: tuple[int, int]) -> perdure.Learner:
        learner.adopt(stream)
        for task in stream:
            for step, rows in enumerate(stream.plan(task, batch_size=8)):
                if since <= (task.index, step) < until:
                    if step == 0 or learner.restored:
                        learner.begin_task(task)
                    learner.step(*task.train.gather(rows))
                    if step == 3:
                        learner.end_task()
        return learner

    def fresh() -> perdure.Learner:
        return perdure.Learner(model(), sgd, [Replay(capacity=20)], augment=augment)

    whole, cut = run(fresh(), (0, 0), (9, 0)), run(fresh(), (0, 0), (1, 2))
    cut.save(tmp_path / "cut")
    if augment is half_dark:
        with pytest.raises(UsageError, match="augmented its inputs by 'half_dark', which a folder cannot hold"):
            perdure.Learner.load(tmp_path / "cut", model())
        other = perdure.Learner.load(tmp_path / "cut", model(), augment=augment)
    else:
        other = perdure.Learner.load(tmp_path / "cut", model())
    run(other, (1, 2), (9, 0))
    assert torch.equal(whole.parameters.theta, other.parameters.theta)
    plain = run(perdure.Learner(model(), sgd, [Replay(capacity=20)]), (0, 0), (9, 0))
    assert not torch.equal(whole.parameters.theta, plain.parameters.theta)


def test_names_are_checked_and_so_are_inputs() -> None:
    with pytest.raises(UsageError, match="unknown augment 'flop'; did you mean 'flip'"):
        perdure.Learner(model(), augment="flop")
    with pytest.raises(DataError, match=r"not inputs of shape \[4, 2\]"):
        RandomFlip()(torch.zeros(4, 2), torch.Generator())
    with pytest.raises(DataError, match="a tree of tensors"):
        RandomCrop()({"x": torch.zeros(4, 2)}, torch.Generator())  # type: ignore[arg-type]
    assert Experiment.from_mapping({}, ["train.augment=crop_flip"]).train.augment == "crop_flip"
    with pytest.raises((UsageError, UnknownNameError), match="augment"):
        Experiment.from_mapping({}, ["train.augment=flop"])
