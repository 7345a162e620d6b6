"""HAT: gates, their annealing and gradient, what stays still for old tasks, and where gating is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_problems import batches, toy_model, toy_stream
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.errors import IncompatibleError, PerdureWarning, UsageError
from perdure.methods import HAT
from perdure.models.slim_resnet import SlimResNet18
from perdure.models.small_cnn import SmallCNN
from perdure.streams.task import Stream, Task

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}
SMAX = 20.0


def deep(head: Any = None) -> Any:
    return perdure.models.MLP(5, [7, 6], 6, head=head, seed=1)


def learner(method: HAT, make: Any = OPTIMIZERS["sgd"], model: Any = None, more: Any = ()) -> perdure.Learner:
    made = perdure.Learner(model or deep(), make, [method, *more], scenario="task")
    made.forward.prepare = lambda x: x
    return made


def embeddings(method: HAT, task: int) -> dict[str, Tensor]:
    return {name: gate.embedding(task).detach() for name, gate in method.gates().items()}


def gated(model: Any, x: Tensor, gates: dict[str, Tensor]) -> Tensor:
    """The network's outputs by hand."""
    first, _, second, _ = model.body
    h = torch.relu(F.linear(x, first.weight, first.bias)) * gates["body.0"]
    h = torch.relu(F.linear(h, second.weight, second.bias)) * gates["body.2"]
    return F.linear(h, model.head.weight, model.head.bias)


def saturate(method: HAT, task: int) -> None:
    """Every second unit fully on, the others fully off."""
    with torch.no_grad():
        for e in embeddings(method, task).values():
            e.copy_(torch.where(torch.arange(len(e)) % 2 == 0, 6.0, -6.0))


def test_units_are_multiplied_by_the_sigmoid_of_their_embedding_after_the_activation() -> None:
    stream, method = toy_stream("task"), HAT(smax=SMAX)
    made = learner(method)
    made.fit_task(stream[0], batch_size=8)
    made.begin_task(stream[1])
    x, _ = stream[1].train.gather(torch.arange(10))
    for task in (0, 1):
        gates = {name: torch.sigmoid(SMAX * e) for name, e in embeddings(method, task).items()}
        torch.testing.assert_close(made.outputs(x, task), gated(made.model, x, gates))
    assert not torch.allclose(made.outputs(x, 0), made.outputs(x, 1))


def slopes(run: Any, **arguments: Any) -> list[float]:
    """s at every update of a run."""

    class Noting(HAT):
        name = "hat"

        def on_update(self, before: Tensor, theta: Tensor) -> None:
            seen.append(self.slope())
            super().on_update(before, theta)

    seen: list[float] = []
    run(learner(Noting(smax=SMAX, **arguments)))
    return seen


def annealed(steps: int, period: int) -> list[float]:
    return [1 / SMAX + (SMAX - 1 / SMAX) * (i % period) / period for i in range(steps)]


def test_the_slope_rises_within_each_pass_over_the_data() -> None:
    stream = toy_stream("task")

    def by_hand(made: perdure.Learner, data: Any) -> None:
        made.begin_task("a", data, (0, 1))
        for x, y in batches(stream, 0, epochs=2, batch_size=16):
            made.step(x, y)

    loader = [(x, y) for x, y in batches(stream, 0, batch_size=16)]
    rows = stream[0].train.gather(torch.arange(40))
    assert slopes(lambda made: made.fit_task(stream[0], epochs=2, batch_size=16)) == pytest.approx(annealed(6, 3))
    assert slopes(lambda made: made.fit_task(stream[0], steps=2, batch_size=16)) == pytest.approx(annealed(2, 2))
    assert slopes(lambda made: made.fit_task(stream[0], epochs=2, batch_size=16, drop_last=True)) == pytest.approx(
        annealed(4, 2)
    )
    assert slopes(lambda made: made.fit(stream, epochs=2, batch_size=16)) == pytest.approx(annealed(6, 3) * 3)
    assert slopes(lambda made: by_hand(made, loader)) == pytest.approx(annealed(6, 3))
    assert slopes(lambda made: by_hand(made, rows)) == pytest.approx(annealed(6, 3))
    assert slopes(lambda made: by_hand(made, None), anneal_steps=4) == pytest.approx(annealed(6, 4))
    with pytest.raises(UsageError, match="how long a pass is"):
        slopes(lambda made: by_hand(made, None))


@pytest.mark.parametrize("where", ["first task", "second task"])
def test_the_gradient_is_autograds_with_the_regulariser_and_the_compensation(where: str) -> None:
    stream, method = toy_stream("task"), HAT(strength=0.3, smax=SMAX)
    made = learner(method)
    task = stream[0]
    if where == "second task":
        made.fit_task(stream[0], batch_size=8)
        task = stream[1]
    made.begin_task(task)
    for step, (x, y) in enumerate(batches(stream, task.index)):
        s = 1 / SMAX + (SMAX - 1 / SMAX) * step / 5
        e = {name: value.clone().requires_grad_() for name, value in embeddings(method, task.index).items()}
        a = {name: torch.sigmoid(s * value) for name, value in e.items()}
        c = {name: method.used.get(name, torch.zeros(len(value))) for name, value in e.items()}
        first = task.classes[0]
        loss = F.cross_entropy(gated(made.model, x, a)[:, first : first + 2], y - first)
        pull = sum((a[k] * (1 - c[k])).sum() for k in a) / sum((1 - c[k]).sum() for k in a)
        if where == "first task":
            torch.testing.assert_close(pull, torch.cat(list(a.values())).mean())
        weight = made.model.body[2].weight
        found = torch.autograd.grad(loss + 0.3 * pull, [*e.values(), weight])
        made.step(x, y)
        views = {name: p.grad for name, p in made.parameters.members.items()}
        torch.testing.assert_close(views["body.2.weight"], found[-1], rtol=1e-4, atol=1e-7)
        for (name, value), raw in zip(e.items(), found, strict=False):
            steep = torch.cosh((s * value).clamp(-50, 50)) + 1
            expected = raw * (SMAX / s) * steep / (torch.cosh(value) + 1)
            ours = views[f"{name}.hat_gate.embeddings.task_{task.index}"]
            assert ours is not None
            assert ours.any()
            torch.testing.assert_close(ours, expected.detach(), rtol=2e-3, atol=1e-4)


def test_the_protection_is_the_smaller_of_the_two_units_attentions() -> None:
    stream, method = toy_stream("task"), HAT(smax=2.0)
    made = learner(method)
    made.fit_task(stream[0], batch_size=8)
    first = {name: torch.sigmoid(2.0 * e) for name, e in embeddings(method, 0).items()}
    made.fit_task(stream[1], batch_size=8)
    made.begin_task(stream[2])
    used = {name: torch.maximum(first[name], torch.sigmoid(2.0 * e)) for name, e in embeddings(method, 1).items()}
    made.step(*batches(stream, 2)[0])
    a = method.protection()
    assert a is not None
    views = made.parameters.views(a)
    torch.testing.assert_close(views["body.0.weight"], used["body.0"][:, None].expand(7, 5))
    torch.testing.assert_close(views["body.0.bias"], used["body.0"])
    pairs = torch.tensor([[min(i, j) for j in used["body.0"].tolist()] for i in used["body.2"].tolist()])
    torch.testing.assert_close(views["body.2.weight"], pairs)
    assert views["head.weight"].mean(1).tolist() == [1, 1, 1, 1, 0, 0]
    for layer in ("body.0", "body.2"):
        ends = [views[f"{layer}.hat_gate.embeddings.task_{task}"].mean() for task in range(3)]
        assert ends == [1, 1, 0]


def images(tasks: int = 2, rows: int = 12, size: int = 8) -> Stream:
    made = []
    for index in range(tasks):
        draw = torch.Generator().manual_seed(index)
        y = torch.arange(rows) % 2
        x = torch.rand(rows, 1, size, size, generator=draw) + 0.5 * y.view(-1, 1, 1, 1)
        data = perdure.data.examples.Examples(x, y + 2 * index)
        made.append(Task(index, f"t{index}", data, data, (2 * index, 2 * index + 1)))
    return Stream(made, scenario="task", seed=0)


class Flattened(nn.Module):
    """A convolution whose map a linear layer reads, with functions between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.hidden = nn.Linear(48, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.norm(self.conv(x))), 2)
        out: Tensor = self.head(F.gelu(self.hidden(x.flatten(1))))
        return out


MODELS = {
    "mlp": (lambda: perdure.models.MLP(64, [7, 6], 4, seed=0), 8),
    "mlp with a head a task": (lambda: perdure.models.MLP(64, [7, 6], 4, head="multi", seed=0), 8),
    "convolutions with batch norm": (lambda: SmallCNN(1, 4, width=6, seed=0), 8),
    "a flattened map": (lambda: (torch.manual_seed(0), Flattened())[1], 8),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_what_a_task_uses_alone_keeps_its_bits_and_its_outputs(name: str, optimizer: str) -> None:
    """With gates that are 0 or 1, nothing that the old task's answers depend on may move."""
    build, size = MODELS[name]
    stream, method = images(size=size), HAT()
    made = learner(method, OPTIMIZERS[optimizer], build())
    made.begin_task(stream[0])
    for x, y in batches(stream, 0, batch_size=6):
        made.step(x, y)
    saturate(method, 0)
    made.end_task()
    x, _ = stream[0].train.gather(torch.arange(12))
    before, weights = made.outputs(x, 0)[:, :2], {n: p.detach().clone() for n, p in made.parameters.members.items()}
    assert before.std() > 0
    made.begin_task(stream[1])
    for x_new, y_new in batches(stream, 1, epochs=4, batch_size=6):
        made.step(x_new, y_new)
    made.end_task()
    assert torch.equal(made.outputs(x, 0)[:, :2], before)
    for layer, used in method.used.items():
        weight, old = made.parameters.members[f"{layer}.weight"], weights[f"{layer}.weight"]
        source = method._links[layer].source
        columns = torch.ones(weight.shape[1], dtype=torch.bool)
        if source is not None:
            columns = method._links[layer].spread(torch.arange(len(method.used[source])) % 2 == 0)
        rows = torch.arange(len(used)) % 2 == 0
        assert torch.equal(weight[rows][:, columns], old[rows][:, columns])
        assert not torch.equal(weight[~rows], old[~rows])


def test_old_outputs_drift_the_less_the_steeper_the_gates() -> None:
    stream, drifts = toy_stream("task"), []
    for smax in (2.0, 20.0, 2000.0):
        method = HAT(smax=smax)
        made = learner(method, OPTIMIZERS["adamw"])
        made.fit_task(stream[0], batch_size=8, epochs=3)
        x, _ = stream[0].train.gather(torch.arange(40))
        before = made.outputs(x, 0)[:, :2]
        for task in stream[1:]:
            made.fit_task(task, batch_size=8, epochs=10)
        drifts.append(float((made.outputs(x, 0)[:, :2] - before).abs().max()))
    assert drifts[0] > 2 * drifts[1] > 100 * drifts[2], drifts


def test_attention_accumulates_and_capacity_counts_the_units_in_use() -> None:
    stream, method = toy_stream("task"), HAT()
    made = learner(method)
    assert method.capacity() == {"body.0": 0, "body.2": 0, "total": 0}
    last = {"body.0": torch.zeros(7), "body.2": torch.zeros(6)}
    for task in stream:
        made.fit_task(task, batch_size=8)
        assert all((method.used[name] >= last[name]).all() for name in last)
        last = {name: value.clone() for name, value in method.used.items()}
    method.used = {"body.0": torch.tensor([1.0] * 3 + [0.4] * 4), "body.2": torch.ones(6)}
    assert method.capacity() == {"body.0": 3 / 7, "body.2": 1.0, "total": 9 / 13}
    method.used["body.0"] = torch.ones(7)
    with pytest.warns(PerdureWarning, match="100% of the units are used"):
        made.begin_task("late", (torch.zeros(2, 5), torch.tensor([4, 5])), (6, 7))


def test_embeddings_stay_within_bounds_are_drawn_privately_and_rest_when_finished() -> None:
    stream, method = toy_stream("task"), HAT(strength=1e6)
    made = learner(method, OPTIMIZERS["adamw"])
    drawn = torch.get_rng_state()
    made.fit_task(stream[0], batch_size=8)
    old = {name: e.clone() for name, e in embeddings(method, 0).items()}
    steep = partial(torch.optim.SGD, lr=1e3)
    bounded = HAT()
    learner(bounded, steep).fit_task(stream[0], batch_size=8, steps=2)
    assert all((e.abs() <= 6).all() for e in embeddings(bounded, 0).values())
    assert any((e.abs() == 6).any() for e in embeddings(bounded, 0).values())
    made.fit_task(stream[1], batch_size=8)
    assert all(torch.equal(e, old[name]) for name, e in embeddings(method, 0).items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert method.memory_bytes() >= 4 * 13 * 3


def test_a_saved_learner_predicts_the_same_for_every_task(tmp_path: Path) -> None:
    stream = images()
    made = learner(HAT(), OPTIMIZERS["adamw"], SmallCNN(1, 4, width=6, seed=0))
    for task in stream:
        made.fit_task(task, batch_size=6)
    made.save(tmp_path / "saved")
    again = perdure.Learner.load(tmp_path / "saved", SmallCNN(1, 4, width=6, seed=5), prepare=lambda x: x)
    x, _ = stream[0].train.gather(torch.arange(12))
    for task in (0, 1):
        assert torch.equal(made.outputs(x, task), again.outputs(x, task))


def test_attached_to_a_foreign_loop_it_does_what_it_does_in_the_learner() -> None:
    stream = toy_stream("task")
    made = learner(HAT(), OPTIMIZERS["momentum"])
    for task in stream:
        made.begin_task(task.name, batches(stream, task.index), task.classes)
        for x, y in batches(stream, task.index, epochs=2):
            made.step(x, y)
        made.end_task()
    model = deep()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    guard = perdure.attach(model, optimizer, [HAT()])
    for task in stream:
        first = task.classes[0]
        with guard.task(task.name, batches(stream, task.index), task.classes):
            for x, y in batches(stream, task.index, epochs=2):
                optimizer.zero_grad()
                F.cross_entropy(model(x)[:, first : first + 2], y - first).backward()
                optimizer.step()
    torch.testing.assert_close(made.parameters.theta, guard.learner.parameters.theta, rtol=1e-3, atol=1e-3)


def test_switched_off_it_leaves_the_model_as_it_is() -> None:
    model = toy_model(norm=True)
    names = list(model.state_dict())
    learner(HAT(strength=0), model=model)
    assert list(model.state_dict()) == names


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 4), nn.Linear(9, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([torch.relu(self.first(x)), x], 1)
        out: Tensor = self.head(torch.relu(self.second(h)))
        return out


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.again(self.again(self.first(x))))
        return out


class Around(nn.Module):
    """Two layers give the outputs, and only one of them is the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.side, self.head = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        out: Tensor = self.head(h) + self.side(h)
        return out


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 6))
    model[2].weight = model[0].weight
    return model


def frozen_layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 6))


REFUSED = {
    "skip connections": (lambda: SlimResNet18(1, 4, filters=2, seed=0), "ways lead from"),
    "concatenation": (Concatenated, "ways lead from"),
    "called twice": (Twice, "is called twice"),
    "around the head": (Around, "around the head|no layer that reads"),
    "tied": (tied, "two layers share"),
    "mixed": (frozen_layer_norm, "are mixed before"),
    "layer norm": (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 6)), "'1.weight' is not one"),
    "groups": (lambda: nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Flatten(), nn.Linear(2, 6)), "has 2 groups"),
    "no layer": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(5, 6)), "nothing to gate"),
    "deep head": (
        lambda: perdure.models.MLP(5, [4], 6, head=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 6))),
        None,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_gated_are_refused_in_a_sentence(name: str) -> None:
    build, message = REFUSED[name]
    x = torch.rand(4, 1, 8, 8) if name == "skip connections" else torch.rand(4, 5)

    def run() -> None:
        made = learner(HAT(anneal_steps=2), model=build())
        made.begin_task("a", None, (0, 1))
        made.step(x, torch.tensor([0, 1, 0, 1]))

    if message is None:  # its last layer is the head
        run()
    else:
        with pytest.raises(IncompatibleError, match=message):
            run()


def test_a_part_that_cannot_be_gated_may_learn_in_the_first_task_alone() -> None:
    model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 6))
    stream, method = toy_stream("task"), HAT(first_task_only=("0",))
    made = learner(method, OPTIMIZERS["adamw"], model)
    start = model[0].weight.detach().clone()
    made.fit_task(stream[0], batch_size=8)
    first = model[0].weight.detach().clone()
    assert not torch.equal(start, first)
    made.fit_task(stream[1], batch_size=8)
    assert torch.equal(model[0].weight, first)


def test_refused_where_gates_have_no_task_or_heads_are_shared() -> None:
    with pytest.raises(IncompatibleError, match="'hat' is not defined on a class-incremental"):
        perdure.Learner(deep(), OPTIMIZERS["sgd"], [HAT()], scenario="class")
    with pytest.raises(IncompatibleError, match="compiled"):
        perdure.Learner(torch.compile(deep(), backend="eager"), OPTIMIZERS["sgd"], [HAT()])  # type: ignore[arg-type]
    with pytest.raises(IncompatibleError, match="mask_on is 'gradient'"):
        learner(HAT(mask_on="gradient"), OPTIMIZERS["momentum"])
    with pytest.raises(UsageError, match=r"smax is 0\.5"):
        HAT(smax=0.5)
    stream = toy_stream("task")
    made = learner(HAT())
    made.fit_task(stream[0], batch_size=8)
    with pytest.raises(UsageError, match="no task was named; give predict"):
        made.predict(torch.zeros(2, 5))
    with pytest.raises(IncompatibleError, match="columns of an older one"):
        made.begin_task("again", (torch.zeros(2, 5), torch.tensor([0, 1])), (0, 1))
