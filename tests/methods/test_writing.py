"""Methods with a buffer under every writing policy: what is chosen, from what, when, and that it survives a restart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_problems import (
    FEATURES,
    batches,
    gradient_of,
    momentum,
    same_bits,
    sgd,
    sgd_step,
    toy_model,
    toy_stream,
    weights,
)
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.checkpoint import load_state, save_state
from perdure.errors import IncompatibleError, UsageError
from perdure.memory import Buffer
from perdure.memory.buffer import WRITING
from perdure.memory.selection import herding, k_center, nearest_mean
from perdure.methods import DER, DERpp, Replay
from perdure.methods.base import Method
from perdure.methods.replay import check_buffer
from perdure.saving import learner_state, load_learner_state
from perdure.seeding import derive
from perdure.testing import MethodSuite

SELECT = {"herding": herding, "nearest_mean": nearest_mean, "k_center": k_center}
KINDS = {"replay": Replay, "der": DER, "derpp": DERpp}


def noisy_model() -> Any:
    """With dropout and batch normalisation, so that a pass in the wrong mode shows."""
    model = toy_model(norm=True)
    model.body.insert(3, nn.Dropout(0.5))
    return model


def expected(model: nn.Module, task: Any, count: int, select: Any) -> dict[int, Tensor]:
    """The best rows of every class, in order, by an independent pass."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        phi = twin.body(task.train.x)
    phi = phi / phi.norm(dim=1, keepdim=True)
    found = {}
    for label in task.classes:
        own = (task.train.targets == label).nonzero()[:, 0]
        found[label] = task.train.x[own[select(phi[own], count)]]
    return found


@pytest.mark.parametrize("writing", list(SELECT))
def test_every_class_keeps_the_best_rows_of_the_model_that_its_task_ended_with(writing: str) -> None:
    stream = toy_stream("class")
    model, plain = noisy_model(), noisy_model()
    method = Replay(capacity=12, writing=writing)
    learner, other = perdure.Learner(model, sgd, [method]), perdure.Learner(plain, sgd)
    best: dict[int, Tensor] = {}
    for each in (learner, other):
        each.set_scenario("class")
        torch.manual_seed(5)  # dropout
        each.fit_task(stream[0], batch_size=8)
    assert same_bits(model, plain), "choosing rows left a trace in the model"
    assert [m.training for m in model.modules()] == [m.training for m in plain.modules()]
    for task in range(3):
        if task:
            learner.fit_task(stream[task], batch_size=8)
        best |= expected(model, stream[task], 6, SELECT[writing])
        share = 12 // len(best)
        for label, rows in best.items():
            kept = method.buffer.view("x")[method.buffer.view("y") == label]
            assert {tuple(row) for row in kept.tolist()} == {tuple(row) for row in rows[:share].tolist()}
        assert len(method.buffer) == 12
        assert method.buffer.view("task").tolist() == (method.buffer.view("y") // 2).tolist()


def test_a_model_without_features_is_judged_by_its_outputs() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 7), nn.ReLU(), nn.Linear(7, 6))
    method = Replay(capacity=8, writing="herding")
    learner = perdure.Learner(model, sgd, [method], scenario="class")
    task = toy_stream("class")[0]
    learner.fit_task(task, batch_size=8)
    with torch.no_grad():
        phi = F.normalize(model(task.train.x))
    for label in (0, 1):
        own = (task.train.targets == label).nonzero()[:, 0]
        rows = task.train.x[own[herding(phi[own], 4)]]
        kept = method.buffer.view("x")[method.buffer.view("y") == label]
        assert {tuple(row) for row in kept.tolist()} == {tuple(row) for row in rows.tolist()}


@pytest.mark.parametrize("kind", [DER, DERpp])
def test_chosen_rows_are_stored_with_the_logits_of_that_moment(kind: Any) -> None:
    stream = toy_stream("class")
    model = noisy_model()
    method = kind(capacity=10, writing="herding")
    learner = perdure.Learner(model, sgd, [method], scenario="class")
    learner.fit_task(stream[0], batch_size=8)
    with torch.no_grad():
        now = copy.deepcopy(model).eval()(method.buffer.view("x"))
    assert torch.allclose(method.buffer.view("logits"), now, atol=1e-6)
    before = {tuple(x): z for x, z in zip(method.buffer.view("x").tolist(), method.buffer.view("logits"), strict=True)}
    learner.fit_task(stream[1], batch_size=8)
    old = (method.buffer.view("task") == 0).nonzero()[:, 0].tolist()
    assert len(old) == 6
    for slot in old:
        assert torch.equal(method.buffer.view("logits")[slot], before[tuple(method.buffer.view("x")[slot].tolist())])


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_per_class_the_buffer_grows_by_the_best_rows(scenario: str) -> None:
    stream = toy_stream(scenario)
    model = toy_model(2 if scenario == "domain" else 6)
    method = Replay(None, per_class=3, writing="herding")
    learner = perdure.Learner(model, sgd, [method], scenario=scenario)
    for task in stream:
        learner.fit_task(task, batch_size=8)
        best = torch.cat(list(expected(model, task, 3, herding).values()))
        kept = method.buffer.view("x")[method.buffer.view("task") == task.index]
        assert {tuple(row) for row in kept.tolist()} == {tuple(row) for row in best.tolist()}
        assert len(method.buffer) == 6 * (task.index + 1)
    with pytest.raises(UsageError, match="writing with per_class is 'ring'"):
        Replay(None, per_class=3, writing="ring")


def test_a_budget_in_bytes_is_filled_when_the_first_task_ends() -> None:
    method = DER(None, bytes_budget=10 * (FEATURES * 4 + 8 + 8 + 6 * 4 + 8) + 7, writing="herding")
    learner = perdure.Learner(toy_model(), sgd, [method], scenario="class")
    for count, task in enumerate(toy_stream("class"), 1):
        learner.fit_task(task, batch_size=8)
        assert len(method.buffer) == 10
        assert len(set(method.buffer.view("y").tolist())) == 2 * count


def test_rows_of_a_loader_that_shuffles_are_those_that_were_measured() -> None:
    task = toy_stream("class")[0]
    pairs = torch.utils.data.TensorDataset(task.train.x, task.train.targets)
    loader = torch.utils.data.DataLoader(pairs, batch_size=7, shuffle=True)
    model = toy_model()
    method = Replay(capacity=8, writing="herding")
    learner = perdure.Learner(model, sgd, [method])
    learner.begin_task("first", loader)
    for x, y in loader:
        learner.step(x, y)
    assert len(method.buffer) == 0
    learner.end_task()
    best = torch.cat(list(expected(model, task, 4, herding).values()))
    assert {tuple(x) for x in method.buffer.view("x").tolist()} == {tuple(x) for x in best.tolist()}


def test_what_chooses_at_a_tasks_end_needs_its_end_its_data_and_classes() -> None:
    with pytest.raises(IncompatibleError, match="'replay' needs task boundaries"):
        perdure.Learner(toy_model(), sgd, [Replay(writing="herding")], scenario="online")
    learner = perdure.Learner(toy_model(), sgd, [Replay(writing="k_center")])
    x, y = batches(toy_stream(), 0)[0]
    with pytest.raises(UsageError, match="needs to know where tasks begin"):
        learner.step(x, y)
    with pytest.raises(UsageError, match="reads the task's data when it ends"):
        learner.begin_task("a")
    regression = perdure.Learner(toy_model(1), sgd, [Replay(writing="herding")], criterion=nn.MSELoss())
    with pytest.raises(UsageError, match="no integer classes"):
        regression.fit_task("a", (torch.randn(8, FEATURES), torch.randn(8, 1)))
    # The same classes need nothing of it by themselves.
    assert not Replay.needs_boundaries
    assert not Replay().needs_task_data
    perdure.Learner(toy_model(), sgd, [Replay(writing="greedy_balanced")], scenario="online")


def test_a_detector_that_finds_the_tasks_is_enough() -> None:
    """At an alarm the rows of the task are those that the detector kept from before the change."""
    draw = torch.Generator().manual_seed(0)
    method = Replay(capacity=10, writing="herding", batch_size=4)
    detector = perdure.detection.PageHinkley(threshold=20.0, cool_down=30, min_instances=1)
    learner = perdure.Learner(toy_model(2), sgd, [method], boundaries=detector)
    for step in range(150):
        x = torch.randn(16, FEATURES, generator=draw)
        learner.step(x, ((x[:, 0] > 0).long() + step // 80) % 2)
    assert learner.boundaries is not None
    assert len(learner.boundaries.found) == 1
    assert method.buffer.stats()["classes"] == {0: 5, 1: 5}
    assert bool(((method.buffer.view("x")[:, 0] > 0).long() == method.buffer.view("y")).all())


def test_methods_that_store_rows_only_after_a_step_refuse_what_needs_more() -> None:
    class Own(Method):
        name = "own"
        capacity, batch_size, bytes_budget, reading, forward = 10, None, None, "uniform", "joint"
        writing = "reservoir"

    check_buffer(Own())
    for writing in ("herding", "loss_aware"):
        Own.writing = writing
        with pytest.raises(UsageError, match=f"own: writing='{writing}' works with replay, der and derpp"):
            check_buffer(Own())


@pytest.mark.parametrize("epochs", [1, 2])
def test_loss_aware_replay_equals_a_hand_written_loop(epochs: int) -> None:
    """Every stored loss is that of the last step that saw the row, whether it was new or remembered then."""
    stream = toy_stream("class")
    ours, theirs = toy_model(), toy_model()
    method = Replay(capacity=15, batch_size=6, writing="loss_aware")
    perdure.Learner(ours, sgd, [method]).fit(stream, batch_size=8, epochs=epochs)
    memory = Buffer(15, seed=derive(0, "buffer", "replay"), writing="loss_aware")
    for task in stream:
        for step, (x, y) in enumerate(batches(stream, task.index, epochs=epochs)):
            old = memory.sample(6) if len(memory) else {"x": x[:0], "y": y[:0], "slot": torch.zeros(0).long()}
            losses = F.cross_entropy(theirs(torch.cat([x, old["x"]])), torch.cat([y, old["y"]]), reduction="none")
            if len(memory):
                memory.update(old["slot"], {"loss": losses[len(x) :].detach()})
            if step < 5:  # the first pass
                memory.add({"x": x, "y": y, "task": task.index, "loss": losses[: len(x)].detach()})
            sgd_step(theirs, gradient_of(losses.mean(), theirs))
    assert torch.allclose(weights(ours), weights(theirs), atol=2e-6)
    assert torch.equal(method.buffer.view("x"), memory.view("x"))
    assert torch.allclose(method.buffer.view("loss"), memory.view("loss"), atol=1e-5)


@pytest.mark.parametrize("scenario", ["class", "task"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_stored_losses_are_those_of_the_rows_own_columns(kind: str, scenario: str) -> None:
    """With a learning rate of nothing every row's loss can be computed again at the end."""
    stream = toy_stream(scenario)
    model = toy_model()
    method = KINDS[kind](capacity=15, batch_size=6, writing="loss_aware")
    perdure.Learner(model, lambda named: torch.optim.SGD(named, lr=0.0), [method]).fit(stream, batch_size=8)
    buffer = method.buffer
    logits = model(buffer.view("x")).detach()
    if scenario == "task":
        own = buffer.view("task")[:, None] * 2 == torch.arange(6) // 2 * 2
        logits = logits.masked_fill(~own, -torch.inf)
    assert torch.allclose(buffer.view("loss"), F.cross_entropy(logits, buffer.view("y"), reduction="none"), atol=1e-5)


@pytest.mark.parametrize("writing", sorted(set(WRITING) - {"reservoir"}))
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_policy_trains_and_resumes_inside_a_task_to_the_same_bits(
    kind: str, writing: str, tmp_path: Path
) -> None:
    stream = toy_stream("class")

    def made() -> perdure.Learner:
        return perdure.Learner(toy_model(), momentum, [KINDS[kind](capacity=14, writing=writing)], scenario="class")

    def run(learner: perdure.Learner, since: tuple[int, int], until: tuple[int, int]) -> perdure.Learner:
        for task in stream:
            for step, (x, y) in enumerate(batches(stream, task.index)):
                if since <= (task.index, step) < until:
                    if step == 0 or learner.restored:
                        learner.begin_task(task)
                    learner.step(x, y)
                    if step == 4:
                        learner.end_task()
        return learner

    whole, cut = run(made(), (0, 0), (9, 0)), run(made(), (0, 0), (2, 2))
    save_state(tmp_path / "state", learner_state(cut))
    other = made()
    load_learner_state(other, load_state(tmp_path / "state"))
    run(other, (2, 2), (9, 0))
    assert torch.equal(whole.parameters.theta, other.parameters.theta)
    ours, theirs = (learner.methods[0].buffer for learner in (whole, other))  # type: ignore[attr-defined]
    assert len(ours) == 14
    assert all(torch.equal(ours.view(name), theirs.view(name)) for name in ours.columns)


@pytest.mark.parametrize("writing", ["herding", "loss_aware"])
class TestConformance(MethodSuite):
    @pytest.fixture(autouse=True)
    def _choose(self, writing: str) -> None:
        self.writing = writing

    def on(self) -> Method:
        return DERpp(capacity=30, writing=self.writing)

    def off(self) -> Method | None:
        return Replay(capacity=0, writing=self.writing)
