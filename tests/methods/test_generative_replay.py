"""Generative replay: what is replayed, how it is weighted, that both networks are protected, and what never changes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_problems import (
    FEATURES,
    Watcher,
    gradient_of,
    masked_cross_entropy,
    same_bits,
    sgd,
    toy_model,
    toy_stream,
    values,
)
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.batch import Batch, Source
from perdure.checkpoint import load_state, save_state
from perdure.errors import DataError, IncompatibleError, UsageError
from perdure.methods import EWC, SI, GenerativeReplay, LwF, Replay
from perdure.methods.generative_replay import divergence, evenly
from perdure.methods.input_generator import InputGenerator
from perdure.models import VAE
from perdure.saving import learner_state, load_learner_state
from perdure.seeding import derive, generator
from perdure.streams.task import Stream

SMALL: dict[str, Any] = {"hidden": (6,), "latent": 2}


def learn(
    method: GenerativeReplay,
    scenario: str = "class",
    tasks: int = 2,
    *others: Any,
    head: str | None = None,
    norm: bool = False,
    batch_size: int = 8,
    **options: Any,
) -> tuple[perdure.Learner, Stream]:
    """A learner that has finished some tasks of three and has begun the next."""
    stream = toy_stream(scenario)
    model = toy_model(2 if scenario == "domain" else 6, head, norm)
    learner = perdure.Learner(model, sgd, [method, *others], **options)
    learner.adopt(stream)
    for index in range(tasks):
        learner.fit_task(stream[index], batch_size=batch_size)
    learner.begin_task(stream[tasks])
    return learner, stream


def rows_of(stream: Stream, index: int, count: int = 8) -> tuple[Tensor, Tensor]:
    return stream[index].train.gather(torch.arange(count))


def tensors_of(vae: nn.Module | None) -> dict[str, Tensor]:
    assert vae is not None
    return {name: tensor.clone() for name, tensor in vae.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- the first task ---------------------------------------------------------------------------------------------------


def test_in_the_first_task_the_model_and_the_generator_train_as_in_loops_of_their_own() -> None:
    stream = toy_stream()
    ours, plain = toy_model(), toy_model()
    method = GenerativeReplay(**SMALL)
    perdure.Learner(ours, sgd, [method], seed=5).fit_task(stream[0], epochs=2, batch_size=8)
    perdure.Learner(plain, sgd, seed=5).fit_task(stream[0], epochs=2, batch_size=8)
    assert same_bits(ours, plain)

    seed = derive(5, "method", "generative_replay", "inputs")
    vae = VAE((FEATURES,), hidden=(6,), latent=2, likelihood="gaussian", seed=derive(seed, "weights"))
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
    noise = generator(seed, "noise")
    plan = perdure.streams.task.draw_plan(40, (5, "plan", 0), epochs=2, batch_size=8)
    for step, index in enumerate(plan):
        x, _ = stream[0].train.gather(index)
        if step == 0:
            vae.decoder.scale_to(x)
        optimizer.zero_grad()
        vae.losses(x, torch.randn(8, 2, generator=noise)).mean().backward()
        optimizer.step()
    assert method.maker.vae is not None
    assert same_bits(method.maker.vae, vae)


@pytest.mark.parametrize("off", [{"ratio": 0}, {"batch_size": 0}])
def test_switched_off_there_is_no_generator(off: dict[str, Any]) -> None:
    method = GenerativeReplay(**off)
    learner, _ = learn(method)
    assert not method.acts
    assert method.maker.vae is None
    assert learner.passes["forward_rows"] == 80


# -- what the model learns --------------------------------------------------------------------------------------------


def copied(model: nn.Module) -> nn.Module:
    """A copy whose parameters are tensors of their own."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = parameter.detach().clone()
    return twin


def watched(method: GenerativeReplay, scenario: str, **options: Any) -> tuple[perdure.Learner, Source, dict[str, Any]]:
    """One step of the third task: the replayed rows, and what the step looked like."""
    watcher = Watcher()
    learner, stream = learn(method, scenario, 2, watcher, **options)
    watcher.steps.clear()
    before = copied(learner.model)
    learner.step(*rows_of(stream, 2))
    source = watcher.steps[0]["batch"].find("generated")
    assert source is not None
    return learner, source, watcher.steps[0] | {"model": before, "current": rows_of(stream, 2)}


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_hard_labels_weigh_1_minus_1_over_t(scenario: str) -> None:
    learner, source, step = watched(GenerativeReplay(**SMALL), scenario)
    model, (x, y) = step["model"], step["current"]
    old = [0, 1] if scenario == "domain" else [0, 1, 2, 3]
    labels = torch.tensor(old)[model(source.x)[:, old].argmax(1)]
    assert torch.equal(source.y, labels)
    loss = F.cross_entropy(model(x), y) / 3 + F.cross_entropy(model(source.x), labels) * 2 / 3
    torch.testing.assert_close(values(learner.parameters, step["final"]), gradient_of(loss, model))


def test_task_incremental_every_past_head_labels_and_scores_every_row() -> None:
    learner, source, step = watched(GenerativeReplay(**SMALL), "task")
    model, (x, y) = step["model"], step["current"]
    loss = masked_cross_entropy(model(x), y, [[4, 5]] * 8) / 3
    for block in ([0, 1], [2, 3]):
        labels = torch.tensor(block)[model(source.x)[:, block].argmax(1)]
        loss = loss + masked_cross_entropy(model(source.x), labels, [block] * 8) / 2 * 2 / 3
    torch.testing.assert_close(values(learner.parameters, step["final"]), gradient_of(loss, model))


def test_with_several_heads_rows_are_of_past_tasks_in_turn() -> None:
    _, source, step = watched(GenerativeReplay(**SMALL), "task", head="multi")
    assert source.tasks is not None
    assert torch.bincount(source.tasks).tolist() == [4, 4]
    step["model"].head.activate(None)
    answers = step["model"](source.x)
    for row, label, task in zip(answers, source.y.tolist(), source.tasks.tolist(), strict=True):
        assert label == 2 * task + int(row[2 * task + 1] > row[2 * task])
    assert source.share == pytest.approx(2 / 3)


def soft(student: Tensor, teacher: Tensor, known: Sequence[int], scored: Sequence[int], T: float) -> Tensor:
    """T^2 KL, mean over rows, from the definition, class by class."""
    p = (teacher[:, list(known)] / T).softmax(1)
    log_q = (student[:, list(scored)] / T).log_softmax(1)[:, [list(scored).index(c) for c in known]]
    return T**2 * (p * (p.log() - log_q)).sum(1).mean()


@pytest.mark.parametrize("active", ["all", "seen"])
def test_soft_targets_are_the_old_probabilities_and_nothing_for_new_classes(active: str) -> None:
    method = GenerativeReplay(targets="soft", temperature=1.5, **SMALL)
    learner, source, step = watched(method, "class", active_classes=active)
    model, (x, y) = step["model"], step["current"]
    distilled = soft(model(source.x), model(source.x).detach(), range(4), range(6), 1.5)
    assert distilled > 0.01, "new classes have probabilities that the old model does not want"
    loss = F.cross_entropy(model(x), y) / 3 + distilled * 2 / 3
    torch.testing.assert_close(values(learner.parameters, step["final"]), gradient_of(loss, model))


@pytest.mark.parametrize("head", [None, "multi"])
def test_soft_targets_task_incremental_stay_within_a_past_task(head: str | None) -> None:
    """At the first step the model is its own teacher, so that the term and its gradient are zero."""
    learner, source, step = watched(GenerativeReplay(targets="soft", **SMALL), "task", head=head)
    x, y = step["current"]
    if head is not None:
        step["model"].head.activate(None)
    loss = masked_cross_entropy(step["model"](x), y, [[4, 5]] * 8) / 3
    torch.testing.assert_close(
        values(learner.parameters, step["final"]), gradient_of(loss, step["model"]), atol=1e-7, rtol=1e-5
    )
    assert source.share == 0.0
    assert "answers" in source.extras


def test_the_temperature_factor_can_be_left_out() -> None:
    method = GenerativeReplay(targets="soft", temperature=3.0, **SMALL)
    learner, stream = learn(method, "class", 1)
    batch = method.on_batch(Batch.current(*rows_of(stream, 1), 1))
    outputs = learner.forward.batch(batch, None).detach()
    with_factor = method.loss(batch, outputs)
    method.rescale = False
    without = method.loss(batch, outputs)
    assert with_factor is not None
    assert without is not None
    assert float(with_factor) == pytest.approx(9 * float(without))


def test_the_divergence_is_that_of_the_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(5, 4, generator=draw), torch.randn(5, 4, generator=draw)
    known, scored = torch.tensor([[True, True, False, False]]), torch.tensor([[True, True, True, False]])
    found = divergence(ours, theirs, 2.0, known, scored).mean() * 4
    torch.testing.assert_close(found, soft(ours, theirs, [0, 1], [0, 1, 2], 2.0))
    same = divergence(ours, ours, 2.0, scored, scored)
    torch.testing.assert_close(same, torch.zeros(5), atol=1e-6, rtol=0)


def test_labels_are_of_seen_classes_though_the_model_prefers_unseen_ones() -> None:
    method = GenerativeReplay(**SMALL)
    learner, stream = learn(method, "class", 1)
    assert method.old_model is not None
    method.old_model["head.bias"][2:] += 100.0
    batch = method.on_batch(Batch.current(*rows_of(stream, 1), learner.task_index))
    source = batch.find("generated")
    assert source is not None
    assert set(source.y.tolist()) <= {0, 1}


def test_in_a_loop_that_names_no_classes_those_that_occurred_are_seen() -> None:
    method = GenerativeReplay(**SMALL)
    learner = perdure.Learner(toy_model(), sgd, [method])
    x, y = rows_of(toy_stream(), 0)
    learner.begin_task("a")
    learner.step(x, y + 3)
    learner.end_task()
    learner.begin_task("b")
    assert method.blocks == [[3, 4]]
    found = method.on_batch(Batch.current(x, y, 1)).find("generated")
    assert found is not None
    assert set(found.y.tolist()) <= {3, 4}


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_the_number_of_replayed_rows(ratio: float) -> None:
    _, source, _ = watched(GenerativeReplay(ratio=ratio, **SMALL), "class")
    assert source.size == 8 * ratio
    _, source, _ = watched(GenerativeReplay(batch_size=5, **SMALL), "class")
    assert source.size == 5


@pytest.mark.parametrize("options", [{}, {"targets": "soft"}, {"forward": "separate"}])
@pytest.mark.parametrize("scenario", ["class", "task"])
def test_pieces_of_a_batch_add_up_to_the_whole(options: dict[str, Any], scenario: str) -> None:
    found = []
    for pieces in (1, 3):
        learner, stream = learn(GenerativeReplay(**SMALL, **options), scenario, 1, micro_batches=pieces)
        learner.step(*rows_of(stream, 1))
        found.append(learner.parameters.theta.clone())
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


# -- what the generator learns ----------------------------------------------------------------------------------------


def test_the_generator_learns_from_both_with_the_same_weights_and_replay_has_a_gradient() -> None:
    method = GenerativeReplay(**SMALL)
    _, stream = learn(method, "class", 2)
    vae, optimizer = method.maker.vae, method.maker.optimizer
    assert vae is not None
    assert optimizer is not None
    (adam,) = optimizer.all
    adam.state.clear()
    twin, noise = copy.deepcopy(vae), generator(0)
    noise.set_state(method.maker.noise.get_state())
    x, y = rows_of(stream, 2)
    batch = method.on_batch(Batch.current(x, y, 2))
    source = batch.find("generated")
    assert source is not None
    method.after_step(batch, None)
    losses = twin.losses(torch.cat([x, source.x]), torch.randn(16, 2, generator=noise))
    parameters = list(twin.parameters())
    current = torch.autograd.grad(losses[:8].mean() / 3, parameters, retain_graph=True)
    replayed = torch.autograd.grad(losses[8:].mean() * 2 / 3, parameters)
    for parameter, one, two in zip(vae.parameters(), current, replayed, strict=True):
        assert two.abs().max() > 0
        # After one update Adam's first moment is a tenth of the gradient.
        torch.testing.assert_close(adam.state[parameter]["exp_avg"], 0.1 * (one + two), atol=1e-7, rtol=1e-4)


def test_the_frozen_generation_makes_the_rows_and_does_not_move() -> None:
    method = GenerativeReplay(lr=0.05, **SMALL)
    learner, stream = learn(method, "class", 1)
    assert method.maker.vae is not None
    assert method.maker.old is not None
    assert method.old_model is not None
    frozen, model = copy.deepcopy(method.maker.vae), copy.deepcopy(method.old_model)
    old, state = copy.deepcopy(method.maker.old), method.maker.sampling.get_state()
    for _ in range(5):
        learner.step(*rows_of(stream, 1))
    assert equal(method.maker.old, old)
    assert equal(method.old_model, model)
    assert not equal(tensors_of(method.maker.vae.decoder), old)
    method.maker.sampling.set_state(state)
    draws = generator(0)
    draws.set_state(state)
    z, noise = torch.randn(7, 2, generator=draws), torch.randn(7, FEATURES, generator=draws)
    assert torch.equal(method.maker.draw(7), frozen.decoder(z, None, noise))
    learner.end_task()
    learner.begin_task(stream[2])
    assert equal(method.maker.old, tensors_of(method.maker.vae.decoder))
    assert all(
        a.data_ptr() != b.data_ptr()
        for a, b in zip(method.maker.old.values(), method.maker.vae.decoder.parameters(), strict=True)
    )


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_the_model_of_before_the_task_is_the_one_that_is_asked(scenario: str) -> None:
    method = GenerativeReplay(targets="soft", **SMALL)
    learner, stream = learn(method, scenario, 1)
    before = copied(learner.model)
    for _ in range(5):
        learner.step(*rows_of(stream, 1))
    source = method.on_batch(Batch.current(*rows_of(stream, 1), 1)).find("generated")
    assert source is not None
    torch.testing.assert_close(source.extras["answers"], before(source.x).detach())
    assert not torch.allclose(source.extras["answers"], learner.model(source.x).detach(), atol=0.01)


def test_its_optimizer_lives_through_tasks_unless_told_otherwise() -> None:
    for reset in (False, True):
        method = GenerativeReplay(reset_optimizer=reset, **SMALL)
        learn(method, "class", 2)
        assert method.maker.optimizer is not None
        assert bool(method.maker.optimizer.all[0].state) is not reset


def test_more_updates_a_step_and_the_loss_per_value() -> None:
    method = GenerativeReplay(generator_steps=3, **SMALL)
    learn(method, "class", 1)
    assert method.maker.optimizer is not None
    steps = {int(state["step"]) for state in method.maker.optimizer.all[0].state.values()}
    assert steps == {15}
    found = []
    for per_value in (False, True):
        method = GenerativeReplay(per_value=per_value, **SMALL)
        learner, stream = learn(method, "class", 0)
        learner.step(*rows_of(stream, 0))
        assert method.maker.optimizer is not None
        found.append([state["exp_avg"] for state in method.maker.optimizer.all[0].state.values()])
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole / FEATURES)


def test_sampling_and_training_draw_from_separate_generators() -> None:
    """How much is replayed does not decide the noise of training, and nothing touches torch's own generator."""
    states = []
    for ratio in (0.5, 2.0):
        method = GenerativeReplay(ratio=ratio, **SMALL)
        before = torch.get_rng_state()
        learn(method, "class", 1)
        assert torch.equal(torch.get_rng_state(), before)
        states.append((method.maker.noise.get_state(), method.maker.sampling.get_state()))
    assert torch.equal(states[0][0], states[1][0])
    assert not torch.equal(*states[0])


# -- balance and conditions -------------------------------------------------------------------------------------------


def test_an_even_choice_takes_as_many_of_each_class_as_there_are() -> None:
    labels = torch.tensor([5] * 20 + [1] * 3 + [2] * 9)[torch.randperm(32, generator=generator(0))]
    for count in (1, 5, 9, 14, 21, 32):
        kept = evenly(labels, count)
        assert len(set(kept.tolist())) == count
        found = torch.bincount(labels[kept], minlength=6)
        most = int(found.max())
        for label, there in ((5, 20), (1, 3), (2, 9)):
            assert int(found[label]) >= min(there, most - 1)


def test_balanced_replay_is_more_even_than_the_generator() -> None:
    for scenario in ("class", "task"):
        method = GenerativeReplay(balanced=True, batch_size=40, **SMALL)
        _, source, _ = watched(method, scenario)
        assert source.size == 40
        assert source.y.shape == (40,)
        method.maker.sampling.set_state(generator(1).get_state())
        drawn = method.maker.draw(160)
        answers = method._ask(drawn, None)
        labels = answers[:, :4].argmax(1)
        assert _unevenness(evenly(labels, 40), labels) <= _unevenness(torch.arange(40), labels)


def _unevenness(kept: Tensor, labels: Tensor) -> int:
    found = torch.bincount(labels[kept], minlength=4)
    return int(found.max() - found.min())


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_a_conditional_generator_draws_old_classes_equally_often(scenario: str, targets: str) -> None:
    method = GenerativeReplay(conditional=True, batch_size=16, targets=targets, **SMALL)
    _, source, _ = watched(method, scenario)
    old = 2 if scenario == "domain" else 4
    assert torch.bincount(source.y).tolist() == [16 // old] * old
    if scenario == "task":
        assert source.tasks is not None
        assert torch.equal(source.tasks, source.y // 2)


def test_a_conditional_generator_grows_with_the_classes_and_keeps_its_moments() -> None:
    method = GenerativeReplay(conditional=True, **SMALL)
    learner = perdure.Learner(toy_model(head="growing"), sgd, [method], scenario="class")
    stream = toy_stream()
    for index in range(2):
        learner.fit_task(stream[index], batch_size=8)
        assert method.maker.vae is not None
        assert method.maker.vae.classes == 2 * index + 2
    learner.begin_task(stream[2])
    learner.step(*rows_of(stream, 2))
    assert method.maker.vae.classes == 6
    assert method.maker.optimizer is not None
    for parameter, state in method.maker.optimizer.all[0].state.items():
        assert state["exp_avg"].shape == parameter.shape
        assert int(state["step"]) == 11


# -- inputs -----------------------------------------------------------------------------------------------------------


class Shifted:
    """A preparation that must not be applied twice."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.float() / 127.5 - 1

    def describe(self) -> str:
        return "to [-1, 1]"


def test_stored_bytes_train_as_their_prepared_form_does() -> None:
    """Replayed rows are prepared already: only the stored ones beside them are prepared."""
    found = []
    for prepared in (False, True):
        stream = toy_stream(dtype=torch.uint8)
        method = GenerativeReplay(**SMALL)
        learner = perdure.Learner(toy_model(), sgd, [method, LwF(replayed=True)], scenario="class")
        if not prepared:
            learner.forward.prepare = Shifted()
        else:
            learner.forward.prepare = lambda x: x
        for index in range(3):
            learner.begin_task(stream[index])
            for rows in torch.arange(40).split(8):
                x, y = stream[index].train.gather(rows)
                learner.step(Shifted()(x) if prepared else x, y)
            learner.end_task()
        assert method.maker.vae is not None
        found.append((learner.parameters.theta.clone(), tensors_of(method.maker.vae)))
    assert torch.equal(found[0][0], found[1][0])
    assert equal(found[0][1], found[1][1])


def test_a_buffer_beside_it_still_stores_bytes() -> None:
    stream = toy_stream(dtype=torch.uint8)
    replay = Replay(capacity=20)
    learner = perdure.Learner(toy_model(), sgd, [GenerativeReplay(**SMALL), replay])
    learner.adopt(stream)
    learner.fit_task(stream[0], batch_size=8)
    learner.fit_task(stream[1], batch_size=8)
    assert replay.buffer.columns["x"].dtype == torch.uint8


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_images_of_the_usual_sizes(shape: tuple[int, ...], network: str) -> None:
    draw = generator(0)
    model = perdure.models.SmallCNN(shape[0], 4, width=4, seed=0)
    method = GenerativeReplay(network=network, hidden=(8,), latent=2)
    learner = perdure.Learner(model, sgd, [method], scenario="class")
    for index in range(2):
        x = torch.randint(256, (8, *shape), dtype=torch.uint8, generator=draw)
        learner.begin_task(str(index), classes=(2 * index, 2 * index + 1))
        for _ in range(2):
            learner.step(x, torch.arange(8) % 2 + 2 * index)
        learner.end_task()
    assert method.maker.plan == {"shape": list(shape), "likelihood": "bernoulli", "classes": 0}
    pictures = method.pictures()
    assert pictures is not None
    assert pictures.shape[1:] == shape
    assert 0 <= pictures.min() <= pictures.max() <= 1


def test_double_precision_is_kept_and_half_is_not_used_for_the_generator() -> None:
    for dtype, wanted in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        model = toy_model().to(dtype)
        method = GenerativeReplay(**SMALL)
        learner = perdure.Learner(model, sgd, [method], scenario="class")
        stream = toy_stream()
        for index in range(2):
            learner.fit_task(stream[index], batch_size=8)
        assert method.maker.vae is not None
        assert next(method.maker.vae.parameters()).dtype == wanted
        assert learner.parameters.theta.dtype == dtype


def test_what_cannot_be_generated_is_refused_in_a_sentence() -> None:
    x, y = rows_of(toy_stream(), 0)
    cases: list[tuple[dict[str, Any], Any, Any, str]] = [
        ({}, x, y.float(), "targets are none"),
        ({}, x.long(), y, "not torch.int64"),
        ({"likelihood": "bernoulli"}, x, y, "set likelihood to 'gaussian'"),
    ]
    for options, inputs, targets, match in cases:
        method = GenerativeReplay(**SMALL, **options)
        learn(method, "class", 0)
        with pytest.raises(DataError, match=match):
            method.after_step(Batch.current(inputs, targets), None)
    method = GenerativeReplay(**SMALL)
    learn(method, "class", 1)
    with pytest.raises(DataError, match="one shape"):
        method.after_step(Batch.current(x[:, :3], y), None)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"targets": "sharp"}, "hard, soft"),
        ({"ratio": -1}, "at least 0"),
        ({"hidden": ()}, "hidden is empty"),
        ({"network": "gan"}, "mlp, conv"),
        ({"temperature": 0}, "temperature"),
        ({"latent": 0}, "latent"),
        ({"generator_steps": 0}, "generator_steps"),
        ({"snapshot_every": 0}, "snapshot_every"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        GenerativeReplay(**arguments)


# -- without boundaries, attached, resumed ----------------------------------------------------------------------------


def test_without_boundaries_it_is_copied_at_intervals() -> None:
    with pytest.raises(IncompatibleError, match="needs task boundaries"):
        perdure.Learner(toy_model(), sgd, [GenerativeReplay()], scenario="online")
    method = GenerativeReplay(snapshot_every=4, **SMALL)
    learner = perdure.Learner(toy_model(), sgd, [method], scenario="online")
    x, y = rows_of(toy_stream(), 0)
    for step in range(1, 10):
        learner.step(x, y)
        assert method.generation == 1 + step // 4
    assert method.blocks == [[0, 1]]
    drawn = method.on_batch(Batch.current(x, y))
    assert drawn.now.share == pytest.approx(1 / 3)


def test_attached_to_a_foreign_loop_both_networks_learn_the_same() -> None:
    """Equal to rounding: a foreign loop has a forward pass of its own for its rows."""
    stream, found = toy_stream(), []
    for attached in (False, True):
        method, model = GenerativeReplay(**SMALL), toy_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if attached:
            guard = perdure.attach(model, optimizer, methods=[method], scenario="class")
        else:
            learner = perdure.Learner(model, optimizer, [method], scenario="class")
        for index in range(2):
            pairs = [stream[index].train.gather(rows) for rows in torch.arange(40).split(8)]
            if attached:
                with guard.task(str(index), classes=stream[index].classes):
                    for x, y in pairs:
                        guard.see(x, y)
                        optimizer.zero_grad()
                        F.cross_entropy(model(x), y).backward()
                        optimizer.step()
            else:
                learner.begin_task(str(index), classes=stream[index].classes)
                for x, y in pairs:
                    learner.step(x, y)
                learner.end_task()
        assert method.maker.vae is not None
        found.append((model, tensors_of(method.maker.vae)))
    for ours, theirs in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    for name in found[0][1]:
        torch.testing.assert_close(found[0][1][name], found[1][1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"conditional": True}, {"targets": "soft", "balanced": True}])
def test_resumed_inside_a_task_generator_and_optimizer_have_the_same_bits(
    options: dict[str, Any], tmp_path: Path
) -> None:
    learner, stream = learn(GenerativeReplay(**SMALL, **options), "class", 2, head="growing")
    learner.step(*rows_of(stream, 2))
    save_state(tmp_path / "state", learner_state(learner))
    other = perdure.Learner(toy_model(6, "growing"), sgd, [GenerativeReplay(**SMALL, **options)])
    other.adopt(stream)
    load_learner_state(other, load_state(tmp_path / "state"))
    for each in (learner, other):
        each.step(*rows_of(stream, 2))
    ours, theirs = (each.methods[0].state_dict()["maker"] for each in (learner, other))
    assert equal(ours["vae"], theirs["vae"])
    assert equal(ours["old"], theirs["old"])
    moments = [each["optimizer"][0]["state"] for each in (ours, theirs)]
    assert moments[0].keys() == moments[1].keys()
    assert all(equal(moments[0][name], moments[1][name]) for name in moments[0])
    assert torch.equal(learner.parameters.theta, other.parameters.theta)


def test_its_size_counts_generator_moments_and_copies() -> None:
    method = GenerativeReplay(**SMALL)
    learner, _ = learn(method, "class", 1)
    vae = method.maker.vae
    assert vae is not None
    count = sum(p.numel() for p in vae.parameters())
    decoder = sum(p.numel() for p in vae.decoder.parameters())
    model = sum(p.numel() for p in learner.model.parameters())
    assert method.memory_bytes() >= 4 * (3 * count + decoder + model)
    assert method.memory_bytes() < 4 * (3 * count + decoder + model) + 200


@pytest.mark.parametrize("penalty", [SI(strength=0.1), EWC(strength=0.1)])
def test_a_penalty_beside_it_holds_the_model_and_not_the_generator(penalty: Any) -> None:
    generators = []
    for others in ([], [penalty]):
        method = GenerativeReplay(**SMALL)
        learner, stream = learn(method, "class", 1, *others)
        generators.append(tensors_of(method.maker.vae))
        before = learner.parameters.theta.clone()
        learner.step(*rows_of(stream, 1))
        assert not torch.equal(before, learner.parameters.theta)
    assert equal(*generators), "in the first task nothing of the penalty reaches the generator"
    assert all(p.shape == learner.parameters.theta.shape for p in [getattr(penalty, a) for a in penalty.aligned])


# -- what is left alone, and what is not forgotten --------------------------------------------------------------------


def test_batch_statistics_are_not_touched_by_labelling() -> None:
    method = GenerativeReplay(**SMALL)
    learner, stream = learn(method, "class", 1, norm=True)
    before = {name: tensor.clone() for name, tensor in learner.model.named_buffers()}
    batch = method.on_batch(Batch.current(*rows_of(stream, 1), 1))
    assert batch.find("generated") is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.model.named_buffers())
    assert learner.model.training


def enlarged(x: Tensor) -> Tensor:
    """Digits of 16 x 16: their likelihood weighs four times as much beside the divergence, so that codes tell more."""
    if x.dtype != torch.uint8:
        return x
    return (x.float() / 16).view(-1, 1, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_after_five_tasks_the_generator_makes_all_digits_and_without_replay_only_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """500 images by the class that a judge trained on all digits sees in them."""
    adam = partial(torch.optim.Adam, lr=2e-3, fused=True)
    whole = perdure.benchmarks.split_digits(tasks=1, prepare=enlarged)
    judge = perdure.Learner(perdure.models.MLP(256, [50], 10, seed=1), adam)
    judge.adopt(whole)
    judge.fit_task(whole[0], steps=300, batch_size=64)
    assert judge.evaluate(whole).class_incremental[0] > 0.9

    real, found = InputGenerator.learn, {}
    for replays in (True, False):
        if not replays:
            monkeypatch.setattr(InputGenerator, "learn", lambda self, rows: real(self, [(*rows[0][:2], 1.0)]))
        stream = perdure.benchmarks.split_digits(prepare=enlarged)
        method = GenerativeReplay(hidden=(128,), latent=8, lr=3e-3, generator_steps=2)
        learner = perdure.Learner(perdure.models.MLP(256, [50], 10, seed=0), adam, [method])
        learner.adopt(stream)
        for task in stream:
            learner.fit_task(task, steps=150, batch_size=64)
        found[replays] = torch.bincount(judge.predict(method.maker.show(generator(0), 500)), minlength=10).tolist()
    assert min(found[True]) >= 8, found
    assert sum(found[False][8:]) > 400, found


@pytest.mark.parametrize("conditional", [False, True])
def test_a_task_that_comes_back_is_not_taken_for_a_past_one(conditional: bool) -> None:
    stream = perdure.benchmarks.split_digits(scenario="task", tasks=2, repeats=2, seed=0)
    method = GenerativeReplay(hidden=(16,), latent=4, conditional=conditional)
    model = perdure.models.MLP(64, [16], 0, head="multi", seed=0)
    learner = perdure.Learner(model, partial(torch.optim.SGD, lr=0.05), [method])
    learner.adopt(stream)
    for task in stream[:2]:
        learner.fit_task(task, steps=3, batch_size=8)
    learner.begin_task(stream[2])
    x, y, *_ = next(stream[2].train.batches(stream.plan(stream[2], steps=1, batch_size=8)))
    source = method.on_batch(Batch.current(x, y, 2, None, True)).find("generated")
    assert source is not None
    assert set(source.tasks.tolist()) == {0, 1}


def test_soft_targets_know_nothing_of_columns_that_came_later() -> None:
    stream = perdure.streams.online(perdure.benchmarks.split_digits(seed=0))
    method = GenerativeReplay(hidden=(16,), latent=4, targets="soft", snapshot_every=3)
    model = perdure.models.MLP(64, [16], 0, head="growing", seed=0)
    learner = perdure.Learner(model, partial(torch.optim.SGD, lr=0.05), [method])
    learner.fit(stream, batch_size=40)
    assert learner.parameters.theta.isfinite().all()


def test_values_that_leave_the_range_later_in_a_task_are_refused_too() -> None:
    learner = perdure.Learner(nn.Linear(4, 2), methods=[GenerativeReplay(hidden=(8,), latent=2)], scenario="domain")
    learner.begin_task("a", (torch.rand(8, 4), torch.arange(8) % 2))
    learner.step(torch.rand(8, 4), torch.arange(8) % 2)
    with pytest.raises(DataError, match="set likelihood to 'gaussian'"):
        learner.step(torch.rand(8, 4) + 3, torch.arange(8) % 2)
