"""What is true of all five wrappers."""

from __future__ import annotations

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from wrapped import OFF, WRAPPERS, adam, batches, build, by_hand, loss_fn, register, train, two_tasks, weights

import perdure
import perdure.continual as nx_continual
from perdure.checkpoint import load_state, save_state
from perdure.continual.wrapper import Wrapper
from perdure.errors import ModelError, PerdureWarning, UsageError
from perdure.methods import EWC, L2, SI, Method, Replay
from perdure.models.heads import GrowingHead

every = pytest.mark.parametrize("name", WRAPPERS)

# The document's own list: (class, constructor arguments with defaults, methods with arguments).
DOCUMENT: dict[str, tuple[dict[str, Any], dict[str, list[str]]]] = {
    "EWC": (
        {"importance": 1000.0, "fisher_sample_size": 1000},
        {
            "register_task": ["task_id", "dataloader"],
            "update_fisher": ["task_id", "dataloader"],
            "get_ewc_loss": [],
        },
    ),
    "ExperienceReplay": (
        {"memory_size": 1000, "replay_ratio": 0.5},
        {"add_to_memory": ["inputs", "targets", "task_id"], "get_replay_batch": ["batch_size"]},
    ),
    "L2Regularization": ({"importance": 1.0}, {"register_task": ["task_id"], "get_regularization_loss": []}),
    "KnowledgeDistillation": (
        {"temperature": 2.0, "alpha": 0.5},
        {"register_task": ["task_id", "dataloader"], "get_distillation_loss": ["inputs", "outputs"]},
    ),
    "SynapticIntelligence": (
        {"importance": 1.0, "xi": 0.1},
        {"register_task": ["task_id"], "update_importance": ["loss"], "get_regularization_loss": []},
    ),
}


@pytest.mark.parametrize("name", DOCUMENT)
def test_names_arguments_and_defaults_are_those_of_the_document(name: str) -> None:
    kind = getattr(nx_continual, name)
    arguments, methods = DOCUMENT[name]
    found = inspect.signature(kind).parameters
    assert list(found) == ["model", *arguments, "device"]
    assert {key: found[key].default for key in arguments} == arguments
    assert found["device"].default is None
    methods = methods | {"train_step": ["optimizer", "loss_fn", "inputs", "targets", "task_id"]}
    for method, names in methods.items():
        positional = [
            key
            for key, parameter in inspect.signature(getattr(kind, method)).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and key != "self"
        ]
        assert positional == names, method
    own = {key for key in dir(kind) if not key.startswith("_")} - {"method"}
    assert own == {*methods, "memory_bytes", "state_dict", "load_state_dict"}


@every
def test_the_first_task_is_the_loop_by_hand_bit_for_bit(name: str) -> None:
    ours, theirs = build(), build()
    wrapper = WRAPPERS[name](ours)
    register(wrapper, 1, batches(1))
    optimizer = adam(ours)
    for x, y in batches(1):
        wrapper.train_step(optimizer, loss_fn, x, y, 1)
    by_hand(theirs, adam(theirs), batches(1))
    assert torch.equal(weights(ours), weights(theirs))


@every
def test_switched_off_it_is_fine_tuning_and_on_it_is_not(name: str) -> None:
    plain = two_tasks(None)
    assert torch.equal(two_tasks(OFF[name]), plain)
    assert not torch.equal(two_tasks(WRAPPERS[name]), plain)


def _learner(method: Method) -> torch.Tensor:
    model = build()
    learner = perdure.Learner(model, adam(model), [method], criterion=loss_fn)
    for task in (1, 2, 3):
        learner.begin_task(task, batches(task))
        for x, y in batches(task):
            learner.step(x, y)
        learner.end_task()
    return weights(model)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ewc", lambda: EWC(strength=5.0, n_samples=40)),
        ("l2", lambda: L2(strength=0.5)),
        ("si", lambda: SI(strength=2.0)),
        ("replay", lambda: Replay(capacity=20, ratio=0.5)),
    ],
)
def test_it_is_the_learner_with_the_method_bit_for_bit(name: str, method: Any) -> None:
    model = build()
    wrapper, optimizer = WRAPPERS[name](model), adam(model)
    for task in (1, 2, 3):
        register(wrapper, task, batches(task))
        train(wrapper, optimizer, batches(task), task)
    assert torch.equal(weights(model), _learner(method()))


@every
def test_a_step_returns_the_whole_loss_without_a_graph(name: str) -> None:
    model = build()
    wrapper, optimizer = WRAPPERS[name](model), adam(model)
    for task in (1, 2):
        train(wrapper, optimizer, batches(task), task)
        register(wrapper, task + 1, batches(task + 1))
        if name == "ewc":
            wrapper.update_fisher(task, batches(task))
    train(wrapper, optimizer, batches(3)[:2], 3)
    x, y = batches(3)[2]
    if name == "replay":
        state = wrapper.state_dict()
        drawn_x, drawn_y = wrapper.get_replay_batch(4)
        wrapper.load_state_dict(state)
        expected = F.cross_entropy(model(torch.cat([x, drawn_x])), torch.cat([y, drawn_y]))
    elif name == "kd":
        expected = 0.5 * F.cross_entropy(model(x), y) + 0.5 * wrapper.get_distillation_loss(x, model(x))
    else:
        penalty = wrapper.get_ewc_loss if name == "ewc" else wrapper.get_regularization_loss
        assert penalty().item() > 0
        expected = F.cross_entropy(model(x), y) + penalty()
    loss = wrapper.train_step(optimizer, loss_fn, x, y, 3)
    assert loss.shape == ()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)


@every
@pytest.mark.parametrize("training", [True, False])
def test_modes_running_statistics_and_the_global_generator_are_left_alone(name: str, training: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 3))
    model.train(training)
    model[1].eval()
    statistics = {key: value.clone() for key, value in model.named_buffers()}
    wrapper, optimizer = WRAPPERS[name](model), adam(model)
    for task in (1, 2):
        before = torch.get_rng_state()
        register(wrapper, task, batches(task))
        assert torch.equal(torch.get_rng_state(), before)
        train(wrapper, optimizer, batches(task), task)
    assert [module.training for module in model] == [training, False, training, training]
    assert all(torch.equal(value, statistics[key]) for key, value in model.named_buffers())


@every
def test_registering_again_changes_nothing(name: str) -> None:
    def run(times: int) -> torch.Tensor:
        model = build()
        wrapper, optimizer = WRAPPERS[name](model), adam(model)
        for task in (1, 2, 3):
            for _ in range(times):
                register(wrapper, task, batches(task))
            train(wrapper, optimizer, batches(task), task)
        return weights(model)

    assert torch.equal(run(1), run(3))


@every
def test_it_resumes_inside_a_task_to_the_same_bits(name: str, tmp_path: Path) -> None:
    def begin() -> tuple[nn.Module, Any, Any]:
        model = build()
        return model, WRAPPERS[name](model), adam(model)

    def finish(wrapper: Any, optimizer: Any) -> None:
        train(wrapper, optimizer, batches(2)[2:], 2)
        register(wrapper, 3, batches(3))
        train(wrapper, optimizer, batches(3), 3)

    model, wrapper, optimizer = begin()
    train(wrapper, optimizer, batches(1), 1)
    register(wrapper, 2, batches(2))
    train(wrapper, optimizer, batches(2)[:2], 2)
    save_state(tmp_path / "state", {"wrapper": wrapper.state_dict(), "model": dict(model.state_dict())})
    moments = copy.deepcopy(optimizer.state_dict())
    other, loaded, theirs = begin()
    state = load_state(tmp_path / "state")
    other.load_state_dict(state["model"])
    loaded.load_state_dict(state["wrapper"])
    theirs.load_state_dict(moments)
    if name == "ewc":
        loaded.update_fisher(2, batches(2))  # a loader is not part of the state
    finish(wrapper, optimizer)
    finish(loaded, theirs)
    assert torch.equal(weights(other), weights(model))


@every
def test_the_optimizer_may_change_between_steps(name: str) -> None:
    ours, theirs = build(), build()
    wrapper = OFF[name](ours)
    for model, steps in ((ours, train), (theirs, None)):
        first = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        second = torch.optim.Adam(model.parameters(), lr=0.01)
        for optimizer in (first, second, first):
            if steps is not None:
                steps(wrapper, optimizer, batches(1), 1)
            else:
                by_hand(model, optimizer, batches(1))
    assert torch.equal(weights(ours), weights(theirs))


@every
def test_it_follows_a_head_that_grows_between_tasks(name: str) -> None:
    head = GrowingHead(9, 3, seed=1)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), head)
    wrapper = WRAPPERS[name](model)
    train(wrapper, adam(model), batches(1), 1)
    register(wrapper, 1, batches(1))
    old = wrapper._snapshot.clone()
    head.grow(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(wrapper, adam(model), [(x, y + 2) for x, y in batches(2)], 2)
    register(wrapper, 3, batches(3))
    assert model(batches(1)[0][0]).shape == (8, 5)
    assert wrapper._snapshot.shape == wrapper.learner.parameters.theta.shape != old.shape
    if isinstance(wrapper.method, (EWC, SI)):
        before = wrapper.method.state_dict()
        assert before["importance"].shape == wrapper._snapshot.shape


def test_growing_alone_is_not_training() -> None:
    head = GrowingHead(9, 3, seed=1)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), head)
    l2 = nx_continual.L2Regularization(model)
    by_hand(model, adam(model), batches(1))
    l2.register_task(1)
    head.grow(5)
    l2.register_task(2)
    assert l2._boundaries.done == [1]
    assert l2._boundaries.open == 2


@every
def test_two_wrappers_of_one_model_do_not_lose_each_others_weights(name: str) -> None:
    ours, theirs = build(), build()
    first, second = WRAPPERS[name](ours), OFF["l2"](ours)
    wrapper = WRAPPERS[name](theirs)
    mine, other = adam(ours), adam(theirs)
    second.register_task(1)
    for x, y in batches(1):
        train(first, mine, [(x, y)], 1)
        train(wrapper, other, [(x, y)], 1)
        second.train_step(torch.optim.SGD(ours.parameters(), lr=0.01), loss_fn, x, y, 1)
        by_hand(theirs, torch.optim.SGD(theirs.parameters(), lr=0.01), [(x, y)])
    assert torch.equal(weights(ours), weights(theirs))


@every
def test_a_scheduler_of_the_callers_goes_on_working(name: str) -> None:
    ours, theirs = build(), build()
    wrapper = OFF[name](ours)
    for model, own in ((ours, True), (theirs, False)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        for batch in batches(1):
            train(wrapper, optimizer, [batch], 1) if own else by_hand(model, optimizer, [batch])
            schedule.step()
        assert schedule.get_last_lr() == [pytest.approx(0.2 * 0.1**2)]
    assert torch.equal(weights(ours), weights(theirs))


@every
def test_float64_models_stay_exact(name: str) -> None:
    model = build(dtype=torch.float64)
    wrapper, optimizer = WRAPPERS[name](model), adam(model)
    for task in (1, 2):
        train(wrapper, optimizer, [(x.double(), y) for x, y in batches(task)], task)
    assert weights(model).dtype == torch.float64
    assert weights(model).isfinite().all()


@every
def test_what_it_keeps_is_counted(name: str) -> None:
    model = build()
    wrapper = WRAPPERS[name](model)
    size = wrapper.learner.parameters.theta.nbytes
    empty = wrapper.memory_bytes()
    register(wrapper, 1, batches(1))
    train(wrapper, adam(model), batches(1), 1)
    register(wrapper, 2, batches(2))
    kept = {"ewc": 2 * size, "l2": 2 * size, "si": size, "kd": sum(p.nbytes for p in model.parameters())}
    if name == "replay":
        wrapper.get_replay_batch(1)
        assert wrapper.memory_bytes() - empty >= 20 * (5 * 4 + 8 + 8)
    else:
        assert wrapper.memory_bytes() - empty >= kept[name]


def test_inputs_reach_the_model_as_they_are() -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == torch.uint8
            return self.layer(x.float() / 10)

    model = Bytes()
    replay = nx_continual.ExperienceReplay(model, memory_size=20)
    data = [((x * 9).abs().to(torch.uint8), y) for x, y in batches(1)]
    train(replay, adam(model), data, 1)
    assert replay.method.buffer.view("x").dtype == torch.uint8


def test_training_outside_without_a_name_is_warned_about_once() -> None:
    model = build()
    l2, optimizer = nx_continual.L2Regularization(model), adam(model)
    by_hand(model, optimizer, batches(1))
    with pytest.warns(PerdureWarning, match=r"trained outside .* task 2"):
        train(l2, optimizer, batches(2), 2)
    assert l2.method.anchor is None
    l2.register_task(2)
    by_hand(model, optimizer, batches(3))
    train(l2, optimizer, batches(4), 4)


def test_bad_calls_are_refused_in_one_sentence() -> None:
    model = build()
    l2, (x, y) = nx_continual.L2Regularization(model), batches(1)[0]
    with pytest.raises(UsageError, match="task_id is None"):
        l2.register_task(None)
    with pytest.raises(UsageError, match=r"task_id is \[1\]"):
        l2.train_step(adam(model), loss_fn, x, y, [1])
    with pytest.raises(UsageError, match="pass a torch optimizer over"):
        l2.train_step(torch.optim.Adam, loss_fn, x, y, 1)
    with pytest.raises(ModelError, match="does not hold the trainable parameter"):
        l2.train_step(torch.optim.SGD(model[0].parameters(), lr=0.1), loss_fn, x, y, 1)
    assert l2.train_step(adam(model), loss_fn, x, y, 1).isfinite()
    for wrong in (
        lambda: nx_continual.EWC(model, importance=-1),
        lambda: nx_continual.EWC(model, fisher_sample_size=0),
        lambda: nx_continual.ExperienceReplay(model, memory_size=-1),
        lambda: nx_continual.KnowledgeDistillation(model, alpha=1.5),
        lambda: nx_continual.KnowledgeDistillation(model, temperature=0),
        lambda: nx_continual.SynapticIntelligence(model, xi=0),
    ):
        with pytest.raises(UsageError, match="must be"):
            wrong()


def test_the_base_has_no_method_of_its_own_kind() -> None:
    assert not {"register_task", "add_to_memory"} & set(dir(Wrapper))
