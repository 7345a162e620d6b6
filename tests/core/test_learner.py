"""The learner around the step: own loops, precision, accumulation, growth, scenarios, refusals, persistence."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.batch import Batch
from perdure.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    IncompatibleError,
    ModelError,
    PerdureWarning,
    StorageError,
    UsageError,
)
from perdure.methods import AGEM, DER, EWC, GEM, L2, SI, DERpp, Joint, LwF, Method, Replay
from perdure.models.heads import GrowingHead, MultiHead

SGD = partial(torch.optim.SGD, lr=0.1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*alone on a class-incremental:perdure.errors.PerdureWarning"),
    pytest.mark.filterwarnings("ignore:.*each pull the same weights:perdure.errors.PerdureWarning"),
    pytest.mark.filterwarnings("ignore:.*both distil:perdure.errors.PerdureWarning"),
]


def mlp(head: nn.Module | str | None = None) -> nn.Module:
    return perdure.models.MLP(64, [20], 10, head=head, seed=3)


def digits(scenario: str = "class") -> perdure.Stream:
    return perdure.benchmarks.split_digits(scenario=scenario, seed=0)


def close(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.allclose(x, y, rtol=0, atol=tolerance) if tolerance else torch.equal(x, y) for x, y in pairs)


def trained(methods: list[Method], scenario: str = "class", **options: Any) -> nn.Module:
    model = mlp()
    learner = perdure.Learner(model, SGD, methods, **options)
    learner.fit(digits(scenario), steps=12, batch_size=16)
    return model


# -- loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [list, lambda: [EWC(strength=1), Replay(50)], lambda: [DERpp(30)]])
def test_own_loop_fit_task_and_fit_are_the_same_training(build: Callable[[], list[Method]]) -> None:
    stream = digits()
    models = [mlp(), mlp(), mlp()]
    perdure.Learner(models[0], SGD, build()).fit(stream, epochs=2, batch_size=16)
    by_task = perdure.Learner(models[1], SGD, build(), scenario="class")
    by_step = perdure.Learner(models[2], SGD, build(), scenario="class")
    by_task.forward.prepare = by_step.forward.prepare = stream.prepare
    for task in stream:
        by_task.fit_task(task, epochs=2, batch_size=16)
        by_step.begin_task(task)
        for number, rows in enumerate(stream.plan(task, epochs=2, batch_size=16)):
            x, y = task.train.gather(rows)
            by_step.step(x, y, first_pass=number < len(task.train) / 16)
        by_step.end_task()
    assert close(models[0], models[1])
    assert close(models[0], models[2])


def test_any_loader_can_be_the_tasks_data() -> None:
    x, y = torch.randn(60, 64), torch.arange(60) % 10
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=20)
    learner = perdure.Learner(mlp(), SGD, [EWC(strength=1)])
    learner.begin_task("2026-11", loader)
    for a, b in loader:
        loss = learner.step(a, b)
    learner.end_task()
    assert loss.dim() == 0
    assert not loss.requires_grad
    assert float(learner.methods[0].importance.sum()) > 0


def test_partial_fit_and_predict_take_arrays() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    learner = perdure.Learner(perdure.models.MLP(2, [16], 2, seed=0), SGD, [Replay(50)])
    for _ in range(200):
        learner.partial_fit(x, y)
    assert (learner.predict(x).numpy() == y).mean() > 0.95


def test_dictionary_inputs_and_logits_attribute() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.out = nn.Linear(6, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            hidden = self.embed(input_ids) * attention_mask[..., None]
            return type("Output", (), {"logits": self.out(hidden)})()

    torch.manual_seed(0)
    x = {"input_ids": torch.randint(0, 11, (8, 5)), "attention_mask": torch.ones(8, 5)}
    y = x["input_ids"].roll(1, 1).clone()
    y[:, -1] = -100
    learner = perdure.Learner(Tied(), SGD, [Replay(6), SI(strength=0.1)])
    assert len(learner.parameters.members) == 1
    learner.begin_task("a")
    losses = [float(learner.step(x, y)) for _ in range(40)]
    learner.end_task()
    assert losses[-1] < 0.8 * losses[0]


def test_a_row_of_a_sequence_is_the_mean_over_its_unmasked_tokens() -> None:
    torch.manual_seed(0)
    outputs, y = torch.randn(3, 4, 5), torch.randint(0, 5, (3, 4))
    y[0, 2:] = -100
    learner = perdure.Learner(nn.Linear(1, 1))
    ours = learner.criterion(outputs, Batch.current(outputs, y), lambda source, width: None)
    rows = [F.cross_entropy(outputs[i], y[i]) for i in range(3)]
    torch.testing.assert_close(ours, torch.stack(rows).mean())


def test_regression_with_the_callers_criterion() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    y = x @ torch.tensor([[1.0], [2.0], [-1.0]])
    ours, theirs = nn.Linear(3, 1), nn.Linear(3, 1)
    theirs.load_state_dict(ours.state_dict())
    learner = perdure.Learner(ours, SGD, criterion=F.mse_loss)
    optimizer = SGD(theirs.parameters())
    for _ in range(5):
        learner.partial_fit(x, y)
        optimizer.zero_grad()
        F.mse_loss(theirs(x), y).backward()
        optimizer.step()
    assert close(ours, theirs)


# -- precision, accumulation, clipping --------------------------------------------------------------------------------


ACCUMULATED = [
    list,
    lambda: [SI(strength=0.1), EWC(strength=1)],
    lambda: [DERpp(30)],
    lambda: [Replay(30)],
    lambda: [Replay(30, weighting="sum")],
    lambda: [LwF()],
    lambda: [AGEM(per_task=10)],
]


@pytest.mark.parametrize("build", ACCUMULATED)
@pytest.mark.parametrize("pieces", [3, 4])
def test_micro_batches_equal_one_batch_to_rounding(build: Callable[[], list[Method]], pieces: int) -> None:
    assert close(trained(build()), trained(build(), micro_batches=pieces), 2e-5)
    assert not close(trained(build()), mlp(), 1e-3)


def test_the_gradient_that_methods_see_is_unscaled() -> None:
    learner = perdure.Learner(mlp(), SGD, [SI(strength=0.1)])
    twin = perdure.Learner(mlp(), SGD, [SI(strength=0.1)])
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = torch.randn(16, 64), torch.arange(16) % 10
    for each in (learner, twin):
        each.begin_task("a")
        for _ in range(5):
            each.step(x, y)
    assert close(learner.model, twin.model), "a scale that is a power of two is exact"
    assert torch.equal(learner.methods[0].path, twin.methods[0].path)


def test_a_skipped_step_skips_every_hook() -> None:
    learner = perdure.Learner(mlp(), SGD, [SI(strength=0.1), EWC(strength=1)])
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = learner.parameters.theta.clone()
    learner.begin_task("a", (torch.randn(4, 64), torch.arange(4)))
    learner.step(torch.full((4, 64), torch.inf), torch.arange(4))
    assert torch.equal(learner.parameters.theta, before)
    assert not learner.methods[1].path.any()
    assert learner.scaler.get_scale() == 512
    learner.step(torch.randn(4, 64), torch.arange(4))
    assert not torch.equal(learner.parameters.theta, before)


def test_autocast_keeps_parameters_and_state_in_float32() -> None:
    model = trained([EWC(strength=1), DERpp(30)], precision="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not close(model, trained([EWC(strength=1), DERpp(30)]))
    assert close(model, trained([EWC(strength=1), DERpp(30)]), 0.2)


def test_more_micro_batches_than_remembered_rows() -> None:
    build = partial(Replay, 30, batch_size=2)
    assert close(trained([build()]), trained([build()], micro_batches=5), 2e-5)


def test_losses_are_float32_under_autocast() -> None:
    learner = perdure.Learner(mlp(), SGD, [DER(20)], precision="bfloat16")
    learner.partial_fit(torch.randn(8, 64), torch.arange(8))
    assert learner.methods[0].buffer.columns["logits"].dtype == torch.float32


def test_layers_frozen_in_evaluation_mode_stay_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.Linear(20, 10)).eval()
    learner = perdure.Learner(model, SGD)
    learner.fit_task("a", (torch.randn(20, 64), torch.arange(20) % 10))
    assert all(module.training for module in model), "a model in evaluation mode as a whole is switched"
    model[2].eval()
    statistics = model[2].running_mean.clone()
    learner.fit_task("b", (torch.randn(20, 64), torch.arange(20) % 10))
    assert torch.equal(model[2].running_mean, statistics)


def test_clipping_comes_after_the_methods() -> None:
    seen = []

    class Watch(Method):
        name = "watch"

        def project_gradient(self, grad: Tensor) -> None:
            seen.append(float(grad.norm()))

    learner = perdure.Learner(mlp(), partial(torch.optim.SGD, lr=1.0), [Watch()], clip_norm=0.01)
    before = learner.parameters.theta.clone()
    learner.step(torch.randn(8, 64), torch.arange(8))
    assert seen[0] > 0.1
    assert float((learner.parameters.theta - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_schedules_advance_with_every_update() -> None:
    learner = perdure.Learner(mlp(), SGD, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5))
    for _ in range(3):
        learner.partial_fit(torch.randn(4, 64), torch.arange(4))
    assert learner.optimizers.learning_rates()["head.bias"] == pytest.approx(0.0125)


# -- structure --------------------------------------------------------------------------------------------------------


def test_a_growing_head_remaps_every_aligned_state() -> None:
    model = mlp(GrowingHead(20, seed=1))
    methods: list[Method] = [EWC(strength=1), SI(strength=0.1), L2(strength=0.1), LwF(), DERpp(30)]
    learner = perdure.Learner(model, partial(torch.optim.Adam, lr=1e-2), methods)
    stream = digits()
    learner.adopt(stream)
    widths = []
    for task in stream[:3]:
        learner.begin_task(task)
        widths.append(model.head.out_features)
        names = learner.parameters.slices
        for method in learner.methods:
            for attribute, fill in method.aligned.items():
                vector = getattr(method, attribute)
                if vector is None:
                    continue
                assert vector.shape == learner.parameters.theta.shape
                new_rows = learner.parameters.views(vector)["head.weight"][widths[-1] - 2 :]
                expected = model.head.weight[widths[-1] - 2 :] if fill == "theta" else torch.full_like(new_rows, fill)
                assert torch.equal(new_rows, expected), (method.name, attribute)
        assert "head.weight" in names
        for rows in stream.plan(task, steps=5, batch_size=16):
            learner.step(*task.train.gather(rows))
        learner.end_task()
    assert widths == [2, 4, 6]
    assert learner.optimizers.all[0].state[model.head.weight]["exp_avg"].shape == (6, 20)


def test_freezing_a_layer_stops_it_and_thawing_finds_its_state() -> None:
    learner = perdure.Learner(
        mlp(), partial(torch.optim.AdamW, lr=0.01), [EWC(strength=1, solver="prox"), SI(strength=1)]
    )
    data = (torch.randn(40, 64), torch.arange(40) % 10)
    learner.fit_task("a", data)
    fisher = learner.parameters.views(learner.methods[0].importance)["body.0.weight"].clone()
    learner.model.body.requires_grad_(False)
    frozen = learner.model.body[0].weight.detach().clone()
    learner.fit_task("b", data)
    assert torch.equal(learner.model.body[0].weight, frozen)
    kept = learner.parameters.views(learner.methods[0].importance)["body.0.weight"]
    assert torch.equal(kept, fisher), "a frozen layer has no new importance and loses none"
    learner.model.body.requires_grad_(True)
    learner.fit_task("c", data)
    assert not torch.equal(learner.model.body[0].weight, frozen)


def test_a_model_that_changes_its_type_takes_every_state_along() -> None:
    methods: list[Method] = [EWC(strength=1), SI(strength=0.1), LwF(), DERpp(20)]
    learner = perdure.Learner(mlp(), partial(torch.optim.Adam, lr=0.01), methods)
    x, y = torch.randn(40, 64), torch.arange(40) % 10
    learner.fit_task("a", (x, y))
    kept = learner.methods[1].importance[learner.parameters.mask()]
    learner.model.double()
    learner.fit_task("b", (x.double(), y), epochs=2)
    assert learner.parameters.theta.dtype == torch.float64
    assert learner.methods[1].importance.dtype == torch.float64
    now = learner.methods[1].importance[learner.parameters.mask()]
    assert float((now >= kept).float().mean()) == 1
    state = learner.optimizers.all[0].state[learner.model.head.weight]
    assert state["exp_avg"].dtype == torch.float64


def test_values_loaded_with_assign_are_followed_at_the_next_step() -> None:
    learner = perdure.Learner(mlp(), partial(torch.optim.Adam, lr=0.01))
    x, y = torch.randn(8, 64), torch.arange(8)
    learner.partial_fit(x, y)
    learner.model.load_state_dict({k: v.clone() for k, v in mlp().state_dict().items()}, assign=True)
    learner.partial_fit(x, y)
    assert torch.equal(learner.parameters.views(learner.parameters.theta)["head.weight"], learner.model.head.weight)
    assert not torch.equal(learner.model.head.weight, mlp().head.weight)


def test_rows_of_several_tasks_go_through_their_own_heads() -> None:
    model = mlp(MultiHead(20, seed=1))
    learner = perdure.Learner(model, SGD, scenario="task")
    stream = digits("task")
    learner.adopt(stream)
    for task in stream[:3]:
        learner.begin_task(task)
        learner.end_task()
    learner.begin_task(stream[3])
    x, tasks = torch.rand(9, 64), torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1])
    batch = Batch.current(x[:2], torch.zeros(2), task=3).add("replay", x, torch.zeros(9), tasks=tasks)
    outputs = learner.forward.batch(batch, 3)
    for row, task_index in enumerate([3, 3, *tasks.tolist()]):
        model.head.activate(task_index)
        expected = model(torch.cat([x[:2], x])[row : row + 1])
        own = expected.isfinite()
        assert int(own.sum()) == 2
        torch.testing.assert_close(outputs[row : row + 1][own], expected[own])


def test_batch_norm_sees_rows_of_several_tasks_together() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8))
    learner = perdure.Learner(nn.Sequential(body, MultiHead(8, seed=1)), SGD, [Replay(40), DER(40)])
    results = learner.fit(digits("task"), epochs=3, batch_size=8)
    assert results.metrics()["final_average_accuracy"] > 0.9


def test_a_head_that_took_no_part_keeps_its_bits_beside_replay() -> None:
    model = mlp(MultiHead(20, seed=1))
    learner = perdure.Learner(model, partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1), scenario="task")
    stream = digits("task")
    learner.adopt(stream)
    for task in stream[:3]:
        learner.fit_task(task, steps=4, batch_size=8)
    learner.begin_task(stream[3])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batch = Batch.current(torch.rand(4, 64), torch.tensor([6, 7, 6, 7]), task=3)
    batch = batch.add("replay", torch.rand(4, 64), torch.tensor([0, 1, 0, 1]), tasks=torch.zeros(4, dtype=torch.int64))
    learner.parameters.release()
    learner.backward(batch)
    learner.apply_gradient()
    for name, parameter in model.named_parameters():
        idle = "task_1" in name or "task_2" in name
        assert torch.equal(parameter, before[name]) == idle, name


# -- what a method may not see, and may not do ------------------------------------------------------------------------


def test_evaluation_of_a_class_incremental_stream_names_no_task() -> None:
    named = []

    class Spy(Method):
        name = "spy"

        def activate(self, task: int | None) -> None:
            named.append(task)

    class Predictor(Spy):
        name = "predictor"
        owns = ("predict",)

        def predict(self, x: Any, task: int | None) -> Tensor:
            named.append(("predict", task))
            return torch.zeros(len(x), dtype=torch.int64)

    learner = perdure.Learner(mlp(), SGD, [Spy()])
    learner.fit(digits(), steps=2, batch_size=8)
    assert set(named) == {None}
    named.clear()
    learner = perdure.Learner(mlp(), SGD, [Predictor()])
    results = learner.fit(digits(), steps=2, batch_size=8)
    assert ("predict", None) in named
    assert results.matrix[4, 0] == pytest.approx(0.5, abs=0.02), "all zeros are right for half of the first task"


def test_predictions_stay_inside_the_classes_seen() -> None:
    learner = perdure.Learner(mlp(), SGD)
    stream = digits()
    learner.adopt(stream)
    x = stream[4].test.gather(torch.arange(50))[0]
    for task in stream[:2]:
        learner.fit_task(task, steps=3)
    assert set(learner.predict(x).tolist()) <= {0, 1, 2, 3}
    assert set(learner.predict(x, task=1).tolist()) <= {2, 3}
    with pytest.raises(UsageError, match="task 3 has not begun"):
        learner.predict(x, task=3)


def test_predictions_do_not_depend_on_the_test_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.Dropout(), nn.Linear(20, 10))
    learner = perdure.Learner(model, SGD)
    learner.fit(digits(), steps=5, batch_size=8)
    x = torch.rand(40, 64)
    alone = torch.cat([learner.predict(row[None]) for row in x])
    assert torch.equal(learner.predict(x), alone)
    assert model.training


def test_evaluation_touches_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.Dropout(), nn.Linear(20, 10))
    learner = perdure.Learner(model, SGD, [Replay(20)])
    stream = digits()
    learner.fit(stream, steps=5, batch_size=8)
    model[3].eval()
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    learner.evaluate(stream)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model] == [True, True, True, False, True]


def test_the_stream_does_not_depend_on_the_method() -> None:
    def plans(methods: list[Method], **options: Any) -> list[list[int]]:
        seen = []
        learner = perdure.Learner(mlp(), SGD, methods)
        step = learner.step

        def spy(x: Any, y: Any, **kwargs: Any) -> Tensor:
            seen.append(kwargs["index"].tolist())
            return step(x, y, **kwargs)

        learner.step = spy  # type: ignore[method-assign]
        learner.fit(digits(), steps=6, batch_size=8, **options)
        return seen

    plain = plans([])
    for methods in ([Replay(20)], [Replay(50), EWC(strength=1)], [GEM(per_task=5)], [DER(20), SI(strength=0.1)]):
        assert plans(methods) == plain
    assert plans([Replay(20)], evaluate_every=2, eval_future=False) == plain


def test_training_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    trained([Replay(20), EWC(strength=1), DERpp(20)])
    assert torch.equal(torch.get_rng_state(), state)


# -- refusals ---------------------------------------------------------------------------------------------------------


class Owner(Method):
    name = "owner"
    owns = ("predict",)

    def predict(self, x: Any, task: int | None) -> Tensor:
        return torch.zeros(len(x), dtype=torch.int64)


class OtherOwner(Owner):
    name = "other"


class NeedsId(Method):
    name = "needs_id"
    needs_test_task_id = True

    def end_task(self, task: perdure.Task) -> None:
        pass


def test_wrong_combinations_are_refused_before_training() -> None:
    with pytest.raises(IncompatibleError, match="'owner' and 'other' both own predict"):
        perdure.Learner(mlp(), SGD, [Owner(), OtherOwner()])
    with pytest.raises(IncompatibleError, match="'gem' and 'agem'"):
        perdure.Learner(mlp(), SGD, [GEM(), AGEM()])
    with pytest.raises(UsageError, match="'replay' is listed twice"):
        perdure.Learner(mlp(), SGD, [Replay(), Replay()])
    with pytest.raises(UsageError, match="not a method"):
        perdure.Learner(mlp(), SGD, ["ewc"])  # type: ignore[list-item]
    with pytest.raises(IncompatibleError, match="needs the task of every test example"):
        perdure.Learner(mlp(), SGD, [NeedsId()]).fit(digits())
    with pytest.raises(IncompatibleError, match="needs task boundaries"):
        perdure.Learner(mlp(), SGD, [EWC()], scenario="online")


def test_a_regulariser_alone_on_a_class_incremental_stream_is_warned_about() -> None:
    with pytest.warns(PerdureWarning, match="ewc alone on a class-incremental stream.*add replay"):
        perdure.Learner(mlp(), SGD, [EWC(strength=0)]).fit(digits(), steps=1)


def test_bad_input_is_one_sentence() -> None:
    learner = perdure.Learner(mlp(), SGD)
    with pytest.raises(DataError, match="target 10 is not a column of the model's 10 outputs"):
        learner.partial_fit(torch.randn(4, 64), torch.full((4,), 10))
    with pytest.raises(UsageError, match="pass criterion="):
        learner.partial_fit(torch.randn(4, 64), torch.randn(4))
    with pytest.raises(ModelError, match="gives 4 outputs, but the classes so far need 6"):
        perdure.Learner(perdure.models.MLP(64, [8], 4, seed=0), SGD).fit(digits(), steps=1)
    for options in ({"epochs": 0}, {"batch_size": -1}, {"steps": 0}):
        with pytest.raises(UsageError, match="must be a whole number of at least 1"):
            perdure.Learner(mlp(), SGD).fit(digits(), **options)
    with pytest.raises(UsageError, match="'fp8', it must be one of"):
        perdure.Learner(mlp(), precision="fp8")
    learner.begin_task("a")
    with pytest.raises(UsageError, match="still open"):
        learner.begin_task("b")
    with pytest.raises(UsageError, match="reads the task's data"):
        perdure.Learner(mlp(), SGD, [EWC()]).begin_task("a")
    with pytest.raises(UsageError, match="needs the class columns of task 'a'"):
        perdure.Learner(mlp(), SGD, scenario="task").begin_task("a")
    with pytest.raises(UsageError, match="the task-incremental scenario needs to know where tasks begin"):
        perdure.Learner(mlp(), SGD, scenario="task").partial_fit(torch.randn(4, 64), torch.arange(4))
    with pytest.raises(UsageError, match="call begin_task"):
        perdure.Learner(mlp(), SGD, [EWC()]).partial_fit(torch.randn(4, 64), torch.arange(4))


def test_a_guarantee_that_the_optimizer_breaks_is_warned_about() -> None:
    with pytest.warns(PerdureWarning, match="'agem' constrains the gradient, and Adam steps along another direction"):
        perdure.Learner(mlp(), partial(torch.optim.Adam, lr=0.01), [AGEM()])


def test_divergence_is_an_error_and_not_a_result() -> None:
    learner = perdure.Learner(mlp(), partial(torch.optim.SGD, lr=1e20))
    with pytest.raises(DivergedError, match="training diverged: the loss is"):
        learner.fit(digits(), steps=5)


# -- persistence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["wide", "growing"])
def test_a_saved_learner_goes_on_as_if_nothing_had_happened(head: str, tmp_path: Path) -> None:
    stream = digits()
    learner = perdure.Learner(
        mlp(head), partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1), [EWC(strength=1), DERpp(20)]
    )
    learner.adopt(stream)
    learner.fit_task(stream[0])
    learner.begin_task(stream[1])
    plan = list(stream.plan(stream[1], batch_size=16))
    for rows in plan[:3]:
        learner.step(*stream[1].train.gather(rows))
    learner.save(tmp_path / "saved")
    other = perdure.Learner.load(tmp_path / "saved", model=perdure.models.MLP(64, [20], 10, head=head, seed=77))
    other.forward.prepare = stream.prepare
    assert [m.name for m in other.methods] == ["derpp", "ewc"]
    assert other.optimizers.all[0].param_groups[0]["weight_decay"] == 0.1
    other.begin_task(stream[1])
    for each in (learner, other):
        for rows in plan[3:]:
            each.step(*stream[1].train.gather(rows))
        each.end_task()
        each.fit_task(stream[2])
    assert close(learner.model, other.model)
    assert torch.equal(learner.methods[1].importance, other.methods[1].importance)


def test_loading_into_something_else_is_refused(tmp_path: Path) -> None:
    perdure.Learner(mlp(), SGD, [Replay(10)]).save(tmp_path / "s")
    with pytest.raises(UsageError, match=r"saved methods are \['replay'\], this learner has none"):
        perdure.Learner.load(tmp_path / "s", model=mlp(), methods=[])
    with pytest.raises(UsageError, match="the saved model and this one differ"):
        perdure.Learner.load(tmp_path / "s", model=nn.Linear(3, 2))
    with pytest.raises(UsageError, match="saved optimizer is SGD, this learner has Adam"):
        perdure.Learner.load(tmp_path / "s", model=mlp(), optimizer=partial(torch.optim.Adam, lr=1e-3))
    with pytest.raises(CheckpointError, match="there is no folder"):
        perdure.Learner.load(tmp_path / "nowhere", model=mlp())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no saved learner"):
        perdure.Learner.load(tmp_path / "empty", model=mlp())


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    perdure.Learner(mlp(), SGD).fit(digits(), steps=2, folder=tmp_path)
    with pytest.raises(UsageError, match="steps = 2, this one has 3"):
        perdure.Learner(mlp(), SGD).fit(digits(), steps=3, folder=tmp_path, resume=True)


def test_joint_reaches_more_than_fine_tuning() -> None:
    fine = perdure.Learner(mlp(), SGD).fit(digits(), epochs=3, batch_size=16)
    joint = perdure.Learner(mlp(), SGD, [Joint()]).fit(digits(), epochs=3, batch_size=16)
    assert fine.metrics()["final_average_accuracy"] < 0.3
    assert joint.metrics()["final_average_accuracy"] > 0.8
    assert fine.metrics()["task_restricted_accuracy"] > 0.8


# -- what users do to models and folders ------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A layer with a low-rank detour, as adapters put it in a layer's place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def test_a_layer_that_moves_into_an_adapter_keeps_its_state() -> None:
    learner = perdure.Learner(mlp(), partial(torch.optim.Adam, lr=0.01), [EWC(strength=1)])
    data = (torch.randn(40, 64), torch.arange(40) % 10)
    learner.fit_task("a", data)
    importance = learner.parameters.views(learner.methods[0].importance)["head.weight"].clone()
    moment = learner.optimizers.all[0].state[learner.model.head.weight]["exp_avg"].clone()
    learner.model.head = Adapted(learner.model.head)
    learner.begin_task("b", data)
    assert set(learner.parameters.members) > {"head.base.weight", "head.up.weight"}
    views = learner.parameters.views(learner.methods[0].importance)
    assert torch.equal(views["head.base.weight"], importance)
    assert not views["head.down.weight"].any()
    assert torch.equal(learner.optimizers.all[0].state[learner.model.head.base.weight]["exp_avg"], moment)
    for _ in range(3):
        learner.step(*data)
    learner.end_task()
    assert learner.model.head.up.weight.any()


def test_a_saved_adapter_run_loads_into_a_fresh_adapted_model(tmp_path: Path) -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(4)
        model = mlp()
        model.head = Adapted(model.head)
        model.body.requires_grad_(False)
        return model

    data = (torch.randn(40, 64), torch.arange(40) % 10)
    model = adapted()
    learner = perdure.Learner(model, partial(torch.optim.Adam, lr=0.01), [EWC(strength=1)])
    learner.fit_task("a", data)
    model.body.requires_grad_(True)
    learner.fit_task("b", data)
    model.head.base.requires_grad_(False)
    learner.fit_task("c", data)
    learner.save(tmp_path / "s")
    other = perdure.Learner.load(tmp_path / "s", model=adapted())
    for each in (learner, other):
        each.fit_task("d", data)
    assert close(learner.model, other.model)
    assert torch.equal(learner.methods[0].importance, other.methods[0].importance)


def test_parameters_beside_the_model_are_the_optimizers_alone() -> None:
    class Margin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.scale * outputs, y, reduction="none")

    ours, theirs, margin, twin = mlp(), mlp(), Margin(), Margin()
    learner = perdure.Learner(ours, SGD([*ours.parameters(), *margin.parameters()]), criterion=margin)
    optimizer = SGD([*theirs.parameters(), *twin.parameters()])
    for _ in range(3):
        x, y = torch.randn(8, 64), torch.arange(8)
        learner.partial_fit(x, y)
        optimizer.zero_grad()
        twin(theirs(x), y).mean().backward()
        optimizer.step()
    assert close(ours, theirs)
    assert torch.equal(margin.scale, twin.scale)


def test_a_new_run_in_an_old_folder_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    perdure.Learner(mlp(), SGD).fit(digits(), steps=9, folder=tmp_path)
    perdure.Learner(mlp(), SGD).fit(digits(), steps=2, folder=tmp_path)
    results = perdure.Learner(mlp(), SGD).fit(digits(), steps=2, folder=tmp_path, resume=True)
    again = perdure.Learner(mlp(), SGD).fit(digits(), steps=2)
    assert np.array_equal(results.matrix, again.matrix, equal_nan=True)


def test_a_regression_stream_trains_and_has_no_accuracy() -> None:
    from perdure.data.examples import Examples

    draw = torch.Generator().manual_seed(0)
    parts = [Examples(torch.randn(30, 3, generator=draw), torch.randn(30, generator=draw)[:, None]) for _ in range(4)]
    tasks = [perdure.Task(i, str(i), parts[i], parts[i + 2], ()) for i in range(2)]
    stream = perdure.Stream(tasks, scenario="domain")
    learner = perdure.Learner(nn.Linear(3, 1), SGD, [Replay(10)], criterion=F.mse_loss)
    results = learner.fit(stream, steps=3, batch_size=8)
    assert np.isnan(results.matrix).all()
    assert results.metrics()["final_average_accuracy"] is None


def test_evaluating_another_stream_leaves_training_as_it_was() -> None:
    learner = perdure.Learner(mlp(), SGD)
    stream, other = digits(), digits("domain")
    learner.fit(stream, steps=3)
    learner.evaluate(other)
    assert learner.stream is stream
    assert learner.scenario == "class"


class Plain(Method):
    """A class with an ordinary constructor."""

    name = "plain"

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def add_gradient(self, grad: Tensor) -> None:
        grad.mul_(self.factor)


def test_a_method_with_an_ordinary_constructor_keeps_what_it_was_given(tmp_path: Path) -> None:
    learner = perdure.Learner(mlp(), SGD, [Plain(0.0)])
    before = learner.parameters.theta.clone()
    learner.fit(digits(), steps=2)
    assert torch.equal(learner.parameters.theta, before)
    learner.save(tmp_path / "s")
    with pytest.raises(UsageError, match=r"'plain' is not registered here; pass methods=\[...\].*perdure.register"):
        perdure.Learner.load(tmp_path / "s", model=mlp())
    other = perdure.Learner.load(tmp_path / "s", model=mlp(), methods=[Plain()])
    assert other.methods[0].factor == 0.0


def test_saving_never_replaces_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    learner = perdure.Learner(mlp(), SGD)
    learner.save(tmp_path / "models" / "old")
    learner.save(tmp_path / "models" / "old")
    for path, sentence in ((tmp_path / "models", "it holds 'old'"), (tmp_path / "note.txt", "a file of that name")):
        (tmp_path / "note.txt").write_text("keep me")
        with pytest.raises(StorageError, match=sentence):
            learner.save(path)
    assert (tmp_path / "note.txt").read_text() == "keep me"
    assert perdure.Learner.load(tmp_path / "models" / "old", model=mlp())


def test_a_loaded_learner_has_every_setting(tmp_path: Path) -> None:
    stream = digits()
    options = {"clip_norm": 0.1, "micro_batches": 2, "active_classes": "seen"}
    learner = perdure.Learner(mlp(), SGD, **options)
    learner.fit(stream, steps=2)
    learner.save(tmp_path / "s")
    other = perdure.Learner.load(tmp_path / "s", model=mlp())
    x, _ = stream[0].test.gather(torch.arange(20))
    assert torch.equal(learner.outputs(x), other.outputs(x)), "digits are divided by 16, not by 255"
    assert (other.clip_norm, other.micro_batches, other.classes.active) == (0.1, 2, "seen")
    perdure.Learner(mlp(), SGD, criterion=F.cross_entropy).save(tmp_path / "c")
    with pytest.raises(UsageError, match="pass criterion="):
        perdure.Learner.load(tmp_path / "c", model=mlp())


def test_misuse_of_the_learner_is_one_sentence() -> None:
    class Nameless(Method):
        def add_gradient(self, grad: Tensor) -> None:
            grad.zero_()

    class Typo(Method):
        name = "typo"

        def add_gradients(self, grad: Tensor) -> None:
            grad.zero_()

    for methods, sentence in (
        ([Nameless()], "has no name; write name = 'nameless'"),
        ([Typo()], r"overrides no hook.*did you mean 'add_gradient'"),
        (Replay(), "pass a list: methods="),
    ):
        with pytest.raises(UsageError, match=sentence):
            perdure.Learner(mlp(), SGD, methods)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="capacity is 'a', it must be a whole number"):
        Replay(capacity="a")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"optimizer is 'adam'; pass functools\.partial"):
        perdure.Learner(mlp(), "adam")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"pass a torch\.nn\.Module"):
        perdure.Learner(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="fit needs a Stream and got a tuple"):
        perdure.Learner(mlp(), SGD).fit((torch.randn(4, 64), torch.arange(4)))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="8 rows of inputs but 7 targets"):
        perdure.Learner(mlp(), SGD).step(torch.randn(8, 64), torch.arange(7))
    with pytest.raises(UsageError, match="'ewc' needs to know where tasks begin"):
        perdure.Learner(mlp(), SGD, [EWC(strength=1)]).step(torch.randn(8, 64), torch.arange(8))
    with pytest.warns(PerdureWarning, match="'joint' trains on all data so far"):
        perdure.Learner(mlp(), SGD, [Joint(), Replay()])


def test_a_loop_that_met_nan_is_told_at_the_end_of_the_task() -> None:
    learner = perdure.Learner(mlp(), SGD)
    learner.begin_task("a")
    learner.step(torch.full((4, 64), torch.nan), torch.arange(4))
    with pytest.raises(DivergedError, match="look for NaN in the inputs"):
        learner.end_task()


def test_small_things_that_people_try() -> None:
    learner = perdure.Learner(mlp(), SGD)
    assert learner.predict(torch.empty(0, 64)).shape == (0,)
    with pytest.raises(UsageError, match="waits for a score"):
        perdure.Learner(mlp(), SGD, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    joint = perdure.Learner(mlp(), SGD, [Joint()])
    joint.fit(digits(), steps=2)
    with pytest.raises(UsageError, match="knows the stream's 5 tasks alone"):
        joint.fit_task("more", (torch.randn(8, 64), torch.arange(8)))


def test_resuming_with_another_strength_is_refused(tmp_path: Path) -> None:
    perdure.Learner(mlp(), SGD, [Replay(10)]).fit(digits(), steps=2, folder=tmp_path)
    with pytest.raises(UsageError, match="holds a run with replay"):
        perdure.Learner(mlp(), SGD, [Replay(20)]).fit(digits(), steps=2, folder=tmp_path, resume=True)


def test_a_state_of_another_type_keeps_it_through_growth() -> None:
    class Master(torch.optim.SGD):
        """Keeps float32 master weights of bfloat16 parameters."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        master = self.state[p].setdefault("master", p.detach().float())
                        master.sub_(p.grad.float(), alpha=group["lr"])
                        p.data.copy_(master)

    model = mlp(GrowingHead(20, seed=1)).to(torch.bfloat16)
    learner = perdure.Learner(model, partial(Master, lr=0.1))
    for name, classes in (("a", (0, 1)), ("b", (2, 3))):
        learner.begin_task(name, None, classes)
        learner.step(torch.randn(8, 64), torch.tensor(classes * 4))
        learner.end_task()
    assert learner.optimizers.all[0].state[model.head.weight]["master"].dtype == torch.float32
