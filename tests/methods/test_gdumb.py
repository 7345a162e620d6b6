"""GDumb: the stream only fills the buffer, and what is predicted depends on the buffer and the seed alone."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_problems import batches, masked_cross_entropy, same_bits, sgd, toy_model, toy_stream
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import perdure
from perdure.methods import MIR, SI, GDumb, LwF, Replay
from perdure.methods.gdumb import cut_and_mix, rate
from perdure.seeding import derive
from perdure.streams.task import Stream, draw_plan

paper = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-6)


def trained(stream: Stream, model: nn.Module | None = None, seed: int = 0, **options: Any) -> perdure.Learner:
    """A learner whose buffer has seen the stream."""
    method = GDumb(**{"capacity": 30, "epochs": 4, **options})
    learner = perdure.Learner(model or toy_model(), paper, [method], seed=seed, scenario=stream.scenario)
    for task in stream:
        learner.fit_task(task, batch_size=8)
    return learner


def every(stream: Stream) -> Tensor:
    return torch.cat([task.test.x for task in stream])


@pytest.mark.parametrize(("scenario", "head"), [("class", None), ("task", None), ("domain", None), ("task", "multi")])
def test_the_model_is_untouched_while_the_stream_runs_and_after_a_prediction(scenario: str, head: str | None) -> None:
    stream = toy_stream(scenario)
    model = toy_model(6, head=head, norm=head is None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner = perdure.Learner(model, paper, [GDumb(capacity=30, epochs=2)], scenario=scenario)
    learner.fit(stream, batch_size=8, epochs=2)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert learner.methods[0].fitted is not None


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_the_fresh_model_is_the_initial_one_trained_on_the_buffer_with_the_papers_schedule(scenario: str) -> None:
    stream = toy_stream(scenario)
    model = toy_model(8)
    fresh = copy.deepcopy(model)
    learner = trained(stream, model, epochs=9)
    found = learner.methods[0].outputs(every(stream))

    buffer = learner.methods[0].buffer
    x, y, tasks = (buffer.view(name) for name in ("x", "y", "task"))
    optimizer = paper(fresh.parameters())
    schedule = CosineAnnealingWarmRestarts(optimizer, T_0=1, T_mult=2, eta_min=0.001)
    plan = list(draw_plan(30, (derive(0, "gdumb", "fit"), "plan"), epochs=9, batch_size=16))
    for epoch in range(9):
        if epoch == 0:
            optimizer.param_groups[0]["lr"] = 0.01
        elif epoch == 1:
            optimizer.param_groups[0]["lr"] = 0.1
        else:
            schedule.step()
        for rows in plan[2 * epoch : 2 * epoch + 2]:
            own = [stream[int(t)].classes if scenario == "task" else range(6) for t in tasks[rows]]
            optimizer.zero_grad()
            masked_cross_entropy(fresh(x[rows]), y[rows], own).backward()
            nn.utils.clip_grad_norm_(fresh.parameters(), 10.0)
            optimizer.step()
    assert torch.allclose(found, fresh(every(stream)), atol=2e-4)


def test_256_passes_end_at_the_lowest_rate_of_the_eighth_cycle() -> None:
    assert rate(255) == pytest.approx(0.01, abs=1e-3)
    assert rate(256) == 1.0


def test_the_result_depends_on_the_buffer_and_the_seed_alone() -> None:
    stream = toy_stream("class")
    learner = trained(stream)
    x = every(stream)
    found = learner.methods[0].outputs(x)
    other = perdure.Learner(toy_model(), paper, [GDumb(capacity=30, epochs=4)], scenario="class")
    for task in stream:
        other.begin_task(task)
        other.end_task()
    torch.rand(7)  # whatever else has been drawn
    other.methods[0].buffer.load_state_dict(learner.methods[0].buffer.state_dict())
    assert torch.equal(other.methods[0].outputs(x), found)
    another = trained(stream, seed=1)
    another.methods[0].buffer.load_state_dict(learner.methods[0].buffer.state_dict())
    another.methods[0].fitted = None
    assert not torch.equal(another.methods[0].outputs(x), found)


def test_it_never_starts_from_what_it_trained_before() -> None:
    """Asking after every task or once at the end gives the same bits."""
    stream = toy_stream("class")
    asked = perdure.Learner(toy_model(), paper, [GDumb(capacity=30, epochs=4)], scenario="class")
    for task in stream:
        asked.fit_task(task, batch_size=8)
        asked.predict(every(stream))
    assert torch.equal(asked.methods[0].outputs(every(stream)), trained(stream).methods[0].outputs(every(stream)))


def test_a_training_is_kept_until_the_buffer_changes() -> None:
    stream = toy_stream("class")
    learner = trained(stream)
    method = learner.methods[0]
    for _ in range(2):
        learner.predict(every(stream))
    assert method.fits == 1
    assert method.fit_seconds > 0
    x, y = batches(stream, 2)[0]
    learner.begin_task("more", classes=(4, 5))
    learner.step(x, y)  # classes 4 and 5 have their share of 30 already
    assert method.buffer.seen == 128
    learner.predict(every(stream))
    assert method.fits == 1
    learner.step(x, torch.full((8,), 1), first_pass=False)
    learner.predict(every(stream))
    assert method.fits == 1
    method.buffer.resize(36)
    learner.step(x, y)
    learner.predict(every(stream))
    assert method.fits == 2


def test_predictions_do_not_depend_on_what_shares_their_batch_and_leave_no_trace() -> None:
    stream = toy_stream("class")
    model = toy_model(norm=True)
    model.body.append(nn.Dropout(0.3))
    learner = trained(stream, model)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with perdure.methods.side_passes.eval_mode(model):
        x = every(stream)
        together = learner.methods[0].outputs(x)
        alone = torch.cat([learner.methods[0].outputs(x[i : i + 1]) for i in range(len(x))])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert learner.parameters.theta.grad is None
    assert all(p.grad is None for p in model.parameters())


def test_a_query_in_evaluation_mode_trains_in_training_mode_but_layers_at_rest_stay_so() -> None:
    stream = toy_stream("class")
    found = []
    for resting in (False, True):
        model = toy_model(norm=True)
        model.body[1].train(not resting)
        learner = trained(stream, model)
        with perdure.methods.side_passes.eval_mode(model):
            learner.predict(every(stream))
        found.append(int(learner.methods[0].fitted["body.1.num_batches_tracked"]))
    assert found == [8, 0]


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_only_seen_classes_are_predicted_and_in_a_task_only_its_own(scenario: str) -> None:
    stream = toy_stream(scenario)
    learner = perdure.Learner(toy_model(6), paper, [GDumb(capacity=30, epochs=2)], scenario=scenario)
    assert learner.predict(every(stream)).shape == (30,)  # an empty buffer: the untrained model
    for task in stream[:2]:
        learner.fit_task(task, batch_size=8)
    assert set(learner.predict(every(stream)).tolist()) <= {0, 1, 2, 3}
    assert set(learner.predict(every(stream), 1).tolist()) <= {2, 3}
    with pytest.raises(perdure.errors.UsageError, match="task 2 has not begun"):
        learner.predict(every(stream), 2)


def test_it_learns_what_the_buffer_holds() -> None:
    stream = toy_stream("class", rows=200)
    results = perdure.Learner(toy_model(), paper, [GDumb(capacity=120, epochs=32)]).fit(stream, batch_size=8)
    assert results.matrix[2].mean() > 0.4  # of six classes; fine-tuning knows the last two alone
    assert results.matrix[2].min() > 0.2
    assert results.class_incremental["matrix"][2].mean() <= results.task_restricted["matrix"][2].mean()


def test_saved_and_loaded_it_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    stream = toy_stream("class")
    learner = trained(stream)
    x = every(stream)
    state = learner.methods[0].state_dict()
    assert state["fitted"] is None
    tensors = sum(value.numel() for value in state["buffer"]["columns"].values())
    assert tensors == 30 * (5 + 2)  # inputs, label, task: nothing else of the size of a model
    for asked in (False, True):
        if asked:
            learner.predict(x)
        learner.save(tmp_path / "state")
        other = perdure.Learner.load(tmp_path / "state", toy_model(seed=5))
        assert (other.methods[0].fitted is not None) == asked
        assert torch.equal(other.methods[0].outputs(x), learner.methods[0].outputs(x))
        assert other.methods[0].fits == (0 if asked else 1)


def test_what_is_cut_out_comes_from_the_other_rows_and_counts_by_its_area() -> None:
    draw = np.random.default_rng(0)
    x = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 12, 10).float()
    other = torch.tensor([1, 2, 3, 0])
    sizes = []
    for keep in (0.1, 0.5, 0.9) * 20:
        mixed, share = cut_and_mix(x, other, keep, draw)
        changed = mixed != x
        assert (mixed[changed] == x[other][changed]).all()
        assert float(changed.float().mean()) == pytest.approx(1 - share)
        rows, columns = changed[0, 0].any(1).nonzero()[:, 0], changed[0, 0].any(0).nonzero()[:, 0]
        assert int(changed[0, 0].sum()) == len(rows) * len(columns)
        sizes.append(share)
    assert sizes[0::3] < sizes[2::3] or np.mean(sizes[0::3]) < np.mean(sizes[2::3])
    assert torch.equal(x, torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 12, 10).float())


def test_mixed_images_are_scored_on_both_labels() -> None:
    """With every batch mixed, one step from the start against the formula."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    start = copy.deepcopy(model)
    method = GDumb(capacity=12, epochs=1, batch_size=12, cutmix=1.0, clip_norm=1e9)
    learner = perdure.Learner(model, partial(torch.optim.SGD, lr=1.0), [method], scenario="online")
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randint(0, 256, (12, 6, 6), generator=draw, dtype=torch.uint8), torch.arange(12) % 3
    learner.step(x, y)
    after = method.outputs(x)

    rows = next(iter(draw_plan(12, (derive(0, "gdumb", "fit"), "plan"), batch_size=12)))
    numbers = np.random.default_rng(derive(0, "gdumb", "cutmix"))
    numbers.random()
    other = torch.from_numpy(numbers.permutation(12))
    mixed, share = cut_and_mix(x[rows], other, numbers.beta(1.0, 1.0), numbers)
    logits = start(mixed.float() / 255)
    loss = share * F.cross_entropy(logits, y[rows]) + (1 - share) * F.cross_entropy(logits, y[rows][other])
    loss.backward()
    with torch.no_grad():
        for p in start.parameters():
            p -= 0.1 * p.grad  # the first pass has a tenth of the rate
    assert torch.allclose(after, start(x.float() / 255), atol=1e-5)


def test_refusals_name_both_and_say_what_to_do() -> None:
    model = toy_model()
    with pytest.raises(perdure.errors.IncompatibleError, match="pass a factory instead"):
        perdure.Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), [GDumb()])
    for other in (Replay(), SI(), LwF(), MIR()):
        with pytest.raises(
            perdure.errors.IncompatibleError, match=f"'gdumb' replaces the whole step, so '{other.name}'"
        ):
            perdure.Learner(toy_model(), paper, [GDumb(), other])
    with pytest.raises(perdure.errors.UsageError, match="epochs is 0"):
        GDumb(epochs=0)


def test_switched_off_it_is_fine_tuning() -> None:
    stream = toy_stream("class")
    ours, plain = toy_model(norm=True), toy_model(norm=True)
    perdure.Learner(ours, torch.optim.SGD(ours.parameters(), lr=0.1), [GDumb(capacity=0)]).fit(stream, batch_size=8)
    perdure.Learner(plain, sgd).fit(stream, batch_size=8)
    assert same_bits(ours, plain)


def test_the_time_of_the_training_on_the_buffer_is_training_time() -> None:
    stream = perdure.benchmarks.split_digits(seed=0)
    method = GDumb(capacity=50, epochs=3)
    learner = perdure.Learner(perdure.models.MLP(64, [16], 10, seed=0), partial(torch.optim.SGD, lr=0.05), [method])
    results = learner.fit(stream, batch_size=64)
    assert method.fit_seconds > 0
    assert results.seconds["train"] >= method.fit_seconds
    assert results.seconds["evaluate"] > 0
