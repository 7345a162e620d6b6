"""PackNet: who owns which weight, what stays bit for bit, the training after pruning, and what one task needs alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_problems import FEATURES, Watcher, batches, same_bits, sgd_step, toy_model, toy_stream, values
from torch import Tensor, nn
from torch.nn import functional as F

import perdure
from perdure.data.examples import Examples
from perdure.errors import CapacityExhausted, DataError, IncompatibleError, PerdureWarning, UsageError
from perdure.methods import LwF, PackNet, Replay
from perdure.methods.owners import claim, smallest
from perdure.methods.substitutes import Substitutes
from perdure.models.heads import MultiHead
from perdure.models.task_norm import TaskNorm
from perdure.streams.task import Stream, Task, draw_plan

SGD = partial(torch.optim.SGD, lr=0.1)
OPTIMIZERS = {
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "adamw_fused": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "adamw_alone": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, foreach=False),
}


def deep(head: str | None = None, norm: bool = False, seed: int = 1) -> Any:
    model: Any = perdure.models.MLP(FEATURES, [9, 8], 6, head=head, seed=seed)
    if norm:
        model.body.insert(1, nn.BatchNorm1d(9))
    return model


def learner(method: PackNet | None, make: Any = SGD, model: Any = None, more: Any = (), **options: Any) -> Any:
    methods = [*more] if method is None else [method, *more]
    made = perdure.Learner(deep() if model is None else model, make, methods, scenario="task", **options)
    made.forward.prepare = lambda x: x
    return made


def rows(task: Task) -> Tensor:
    found: Tensor = task.train.gather(torch.arange(20))[0]
    return found


def logits(made: Any, task: Task) -> Tensor:
    found: Tensor = made.outputs(rows(task), task.index)[:, list(task.classes)]
    return found


def owners(method: PackNet) -> dict[str, Tensor]:
    views = method.parameters.views(method.owner)
    return {name: views[f"{name}.weight"].clone() for name in method.packed}


# -- owners -------------------------------------------------------------------------------------------------------


def test_every_weight_has_one_owner_and_each_task_keeps_exactly_its_share() -> None:
    stream, method = toy_stream("task"), PackNet(prune=(0.5, 0.7, 0.25))
    made = learner(method)
    free = {"body.0": 5 * 9, "body.2": 9 * 8}
    before: dict[str, Tensor] = {}
    for task, share in zip(stream, (0.5, 0.7, 0.25), strict=True):
        made.fit_task(task, batch_size=8)
        for name, owner in owners(method).items():
            given_back = round(share * free[name])
            assert int((owner == task.index + 1).sum()) == free[name] - given_back
            assert int((owner == 0).sum()) == given_back
            free[name] = given_back
            kept = before.get(name, torch.zeros_like(owner))
            assert torch.equal(owner[kept > 0], kept[kept > 0]), "what was owned keeps its owner"
            weight = made.model.get_submodule(name).weight
            assert not weight[owner == 0].any()
        before = owners(method)
    counts = method.capacity()
    assert counts["body.0"]["weights"] == 45
    assert counts["body.0"]["tasks"] == {i: int((before["body.0"] == i + 1).sum()) for i in range(3)}
    assert counts["total"]["free"] == sum(free.values())
    assert sum(counts["total"]["tasks"].values()) + counts["total"]["free"] == counts["total"]["weights"] == 45 + 72


def test_what_is_kept_is_the_largest_and_equal_ones_go_by_index() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 7, generator=draw)
    owned = torch.rand(6, 7, generator=draw) < 0.6
    drop = smallest(weight, owned, 0.4)
    cutoff = weight[owned].abs().kthvalue(round(0.4 * int(owned.sum()))).values
    assert torch.equal(drop, owned & (weight.abs() <= cutoff))
    tied = smallest(torch.ones(2, 3), torch.tensor([[True, False, True], [True, True, True]]), 0.6)
    assert tied.tolist() == [[True, False, True], [True, False, False]]
    assert not smallest(weight, owned, 0.0).any()
    assert torch.equal(smallest(weight, owned, 1.0), owned)
    across = weight.t().contiguous().t()  # another order in memory
    assert torch.equal(smallest(across, owned, 0.4), drop)


def test_fill_shares_the_weights_among_all_tasks() -> None:
    stream, method = toy_stream("task"), PackNet(prune="fill", retrain=0)
    made = learner(method)
    made.fit(stream, batch_size=8)
    counts = method.capacity()["body.0"]
    assert (counts["tasks"], counts["free"]) == ({0: 15, 1: 15, 2: 15}, 0)
    alone = learner(PackNet(prune="fill"))
    with pytest.raises(UsageError, match="give tasks=, or prune as a number"):
        alone.fit_task(stream[0])
    told = PackNet(prune="fill", tasks=2, retrain=0)
    made = learner(told)
    made.fit_task(stream[0])
    made.fit_task(stream[1])
    assert told.capacity()["body.2"]["tasks"] == {0: 36, 1: 36}


def test_the_owner_map_takes_more_than_255_tasks() -> None:
    everywhere = torch.ones(3, dtype=torch.bool)
    owner = claim(torch.tensor([0, 255, 3], dtype=torch.uint8), everywhere, 300)
    assert owner.tolist() == [300, 255, 3]
    assert claim(torch.zeros(3, dtype=torch.uint8), everywhere, 255).dtype == torch.uint8


def test_keeping_all_or_nothing_is_defined() -> None:
    stream = toy_stream("task")
    all_kept, plain = learner(PackNet(prune=0.0)), learner(None)
    for made in (all_kept, plain):
        made.fit_task(stream[0], batch_size=8)
    assert same_bits(all_kept.model, plain.model), "without pruning, the first task is plain training"
    method = PackNet(prune=1.0)
    made = learner(method)
    made.fit_task(stream[0], batch_size=8)
    assert not made.model.body[0].weight.any()
    assert method.capacity()["total"]["tasks"] == {0: 0}


# -- capacity -----------------------------------------------------------------------------------------------------


def test_a_network_that_is_too_small_is_noticed_before_the_first_step() -> None:
    stream = toy_stream("task")
    made = learner(PackNet(prune=(0.5, 0.0)))
    before = made.parameters.theta.clone()
    with pytest.raises(CapacityExhausted, match=r"none of the 45 weights of layer 'body\.0' is left for task 3 of 3; "):
        made.fit(stream)
    assert torch.equal(made.parameters.theta, before)
    assert made.passes["steps"] == 0
    learner(PackNet(prune=(0.5, 0.5, 0.0))).fit(stream)  # the last one may keep the rest


def test_without_a_stream_it_is_noticed_before_the_task_that_finds_nothing() -> None:
    stream = toy_stream("task")
    made = learner(PackNet(prune=0.0))
    made.fit_task(stream[0], batch_size=8)
    kept = logits(made, stream[0])
    with pytest.raises(CapacityExhausted, match="task 2; prune more, use prune='fill', or widen the layer"):
        made.begin_task(stream[1])
    assert torch.equal(logits(made, stream[0]), kept)
    with pytest.raises(CapacityExhausted, match="task 2 of 3"):
        learner(PackNet(prune=0.0, tasks=3)).begin_task(stream[0])


# -- old tasks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch_norm"])
@pytest.mark.parametrize("head", [None, "multi"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_old_logits_keep_their_bits(make: Any, head: str | None, norm: bool) -> None:
    for options in ({}, {"precision": "bfloat16"}, {"micro_batches": 3, "clip_norm": 0.5}):
        stream = toy_stream("task")
        made = learner(PackNet(prune=0.6), make, deep(head, norm), **options)
        kept: dict[int, Tensor] = {}
        for task in stream:
            made.fit_task(task, epochs=2, batch_size=8)
            for old in stream[: task.index + 1]:
                now = logits(made, old)
                assert old.index not in kept or torch.equal(now, kept[old.index])
                kept[old.index] = now
                made.model.train()
                made.model(rows(task))  # a call by hand, in training mode, while an old task is shown
        assert not torch.equal(kept[0], kept[1])


def test_old_logits_of_a_convolutional_network_keep_their_bits() -> None:
    stream = perdure.benchmarks.split_digits(scenario="task", seed=0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 10)
    )
    made = perdure.Learner(model, OPTIMIZERS["adamw"], [PackNet()])
    made.adopt(stream)
    kept: dict[int, Tensor] = {}
    for task in stream[:3]:
        made.fit_task(task, batch_size=64)
        for old in stream[: task.index + 1]:
            now = logits(made, old)
            assert old.index not in kept or torch.equal(now, kept[old.index])
            kept[old.index] = now


def test_an_old_task_is_shown_the_union_of_the_owners_up_to_it() -> None:
    stream, method = toy_stream("task"), PackNet(prune=0.6)
    made = learner(method)
    for task in stream:
        made.fit_task(task, batch_size=8)
    first, second, head = made.model.body[0], made.model.body[2], made.model.head
    own = owners(method)
    x = rows(stream[0])
    for index in range(3):
        weights = [
            torch.where((own[name] >= 1) & (own[name] <= index + 1), layer.weight, torch.zeros(()))
            for name, layer in (("body.0", first), ("body.2", second))
        ]
        h = torch.relu(F.linear(x, weights[0], first.bias))
        h = torch.relu(F.linear(h, weights[1], second.bias))
        assert torch.equal(made.outputs(x, index), F.linear(h, head.weight, head.bias))
    assert "weight" not in vars(first)
    alone = torch.where(own["body.0"] == 2, first.weight, torch.zeros(()))
    assert not torch.equal(torch.relu(F.linear(x, alone, first.bias)), torch.relu(F.linear(x, weights[0], first.bias)))


def test_what_an_open_task_may_not_change_has_no_gradient_and_does_not_move() -> None:
    stream, method, watcher = toy_stream("task"), PackNet(prune=0.6, retrain=0), Watcher()
    made = learner(method, OPTIMIZERS["momentum"], more=[watcher])
    made.fit_task(stream[0], batch_size=8)
    watcher.steps.clear()
    made.fit_task(stream[1], batch_size=8)
    held = torch.zeros_like(made.parameters.theta, dtype=torch.bool)
    views = made.parameters.views(held)
    for name, owner in owners(method).items():
        views[f"{name}.weight"][owner == 1] = True
        views[f"{name}.bias"].fill_(True)
    for name in ("head.weight", "head.bias"):
        views[name][[0, 1]] = True
    others = made.parameters.mask() & ~held
    for step in watcher.steps:
        assert not step["final"][held].any()
        assert torch.equal(step["final"][others], step["raw"][others])
        assert torch.equal(step["after"][held], step["before"][held])
    assert any(not torch.equal(step["after"], step["before"]) for step in watcher.steps)


def test_replayed_rows_of_old_tasks_move_nothing_of_theirs() -> None:
    stream = toy_stream("task")
    with pytest.warns(PerdureWarning, match="'replay' beside it can only hold the new one back"):
        made = learner(PackNet(prune=0.6), SGD, deep("multi", norm=True), [Replay(capacity=30)])
    made.fit_task(stream[0], batch_size=8)
    kept, statistics = logits(made, stream[0]), made.model.body[1].norms["task_0"].running_mean.clone()
    made.fit_task(stream[1], batch_size=8)
    assert torch.equal(logits(made, stream[0]), kept)
    assert torch.equal(made.model.body[1].norms["task_0"].running_mean, statistics)
    assert not torch.equal(made.model.body[1].norms["task_1"].running_mean, statistics)


@pytest.mark.filterwarnings("ignore::perdure.errors.PerdureWarning")
def test_a_teacher_is_masked_with_its_own_tensors() -> None:
    layer = nn.Linear(2, 1, bias=False)
    Substitutes({"": layer}, lambda _, each: {"weight": each._parameters["weight"] * torch.tensor([1.0, 0.0])})
    teacher = {"weight": torch.tensor([[5.0, 7.0]])}
    assert torch.func.functional_call(layer, teacher, torch.ones(1, 2)).item() == 5.0
    with pytest.raises(RuntimeError):
        layer(torch.ones(1, 3))
    assert "weight" not in vars(layer), "not after an error either"
    stream, method = toy_stream("task"), PackNet(prune=0.6)
    made = learner(method, more=[LwF(strength=1.0)])
    for task in stream:
        made.fit_task(task, batch_size=8)
    assert made.parameters.theta.isfinite().all()


def test_weights_that_are_read_past_forward_belong_to_the_first_task() -> None:
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(1, 8)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.head = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.embed(x[..., None])).mean(1))

    torch.manual_seed(0)
    stream, method = toy_stream("task"), PackNet(prune=0.6)
    made = learner(method, OPTIMIZERS["adamw"], Attentive())
    kept: dict[int, Tensor] = {}
    for task in stream:
        made.fit_task(task, batch_size=8)
        for old in stream[: task.index + 1]:
            now = logits(made, old)
            assert old.index not in kept or torch.equal(now, kept[old.index])
            kept[old.index] = now
    assert method.packed == ["embed", "block.linear1", "block.linear2"]


def test_biases_of_each_task() -> None:
    stream = toy_stream("task")
    shared, own = learner(PackNet(prune=0.6)), learner(PackNet(prune=0.6, train_biases=True))
    kept = {}
    for made in (shared, own):
        made.fit_task(stream[0], batch_size=8)
        kept[made] = made.model.body[0].bias.detach().clone(), logits(made, stream[0])
        made.fit_task(stream[1], batch_size=8)
        assert torch.equal(logits(made, stream[0]), kept[made][1])
    assert torch.equal(shared.model.body[0].bias, kept[shared][0])
    assert not torch.equal(own.model.body[0].bias, kept[own][0])


# -- training after pruning ---------------------------------------------------------------------------------------


def test_a_task_is_trained_pruned_and_trained_again_as_by_hand() -> None:
    stream, method = toy_stream("task"), PackNet(prune=0.6, retrain=0.5, retrain_lr=0.25)
    made, model = learner(method), deep()
    made.fit_task(stream[0], epochs=2, batch_size=8)

    def step(x: Tensor, y: Tensor, lr: float) -> None:
        loss = F.cross_entropy(model(x)[:, :2], y)
        found = torch.autograd.grad(loss, list(model.parameters()))
        sgd_step(model, torch.cat([g.flatten() for g in found]), lr)

    taken = [stream[0].train.gather(chosen) for chosen in draw_plan(40, (0, "plan", 0), epochs=2, batch_size=8)]
    for x, y in taken:
        step(x, y, 0.1)
    masks = []
    for layer in (model.body[0], model.body[2]):
        size = layer.weight.detach().abs()
        masks.append(size > size.flatten().kthvalue(round(0.6 * size.numel())).values)
    for chosen in draw_plan(40, (0, "packnet", 0), batch_size=8, steps=round(0.5 * len(taken))):
        for layer, mask in zip((model.body[0], model.body[2]), masks, strict=True):
            layer.weight.data.mul_(mask)
        step(*stream[0].train.gather(chosen), 0.025)
    for layer, mask in zip((model.body[0], model.body[2]), masks, strict=True):
        layer.weight.data.mul_(mask)
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(values(made.parameters, made.parameters.theta), mine, rtol=0, atol=1e-6)
    assert made.passes["steps"] == len(taken) + len(taken) // 2


def test_the_second_training_leaves_schedules_rates_modes_and_buffers_alone() -> None:
    stream = toy_stream("task")
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    buffer = Replay(capacity=100)
    with pytest.warns(PerdureWarning):
        made = learner(PackNet(prune=0.6, retrain=2.0), more=[buffer], scheduler=schedule)
    made.begin_task(stream[0])
    for x, y in batches(stream, 0):
        made.step(x, y)
    made.model.eval()
    rate = made.optimizers.all[0].param_groups[0]["lr"]
    assert rate == pytest.approx(0.1 * 0.5**5)
    made.end_task()
    assert made.passes["steps"] == 15
    assert made.optimizers.all[0].param_groups[0]["lr"] == rate
    assert made.schedulers[0].last_epoch == 5
    assert not made.model.training
    assert len(buffer.buffer) == 40
    assert all(p.grad is None for p in made.model.parameters())


def test_whoever_prunes_before_the_end_has_the_second_training_in_his_own_steps() -> None:
    stream, method = toy_stream("task"), PackNet(prune=0.6)
    made = learner(method, OPTIMIZERS["momentum"])
    made.begin_task(stream[0])
    for number, (x, y) in enumerate(batches(stream, 0, epochs=2)):
        if number == 6:
            method.prune_now()
            free = {name: owner == 0 for name, owner in owners(method).items()}
        made.step(x, y)
    with pytest.raises(UsageError, match="once in an open task"):
        method.prune_now()
    made.end_task()
    assert made.passes["steps"] == 10
    for name, pruned in free.items():
        assert torch.equal(owners(method)[name] == 0, pruned)
        assert not made.model.get_submodule(name).weight[pruned].any()


def test_a_loader_is_trained_on_again_and_an_iterator_cannot_be() -> None:
    stream = toy_stream("task")
    loader = batches(stream, 0)
    for data, steps in ((loader, 7), (iter(loader), None)):
        made = learner(PackNet(retrain=0.4 if steps else 1.0))
        made.begin_task("a", data, (0, 1))
        for x, y in loader:
            made.step(x, y)
        if steps:
            made.end_task()
            assert made.passes["steps"] == steps
        else:
            next(iter(data), None)
            list(data)
            with pytest.raises(DataError, match="pass a loader, not an iterator"):
                made.end_task()
    with pytest.raises(UsageError, match="reads the task's data"):
        learner(PackNet()).begin_task("a", None, (0, 1))


# -- on disk and alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [None, "multi"])
def test_saved_in_the_middle_of_a_task_and_loaded_it_goes_on_to_the_same_bits(tmp_path: Path, head: str | None) -> None:
    stream = toy_stream("task")

    def second(made: Any, since: int, until: int) -> None:
        for x, y in batches(stream, 1)[since:until]:
            made.step(x, y)

    made = learner(PackNet(prune=0.6, train_biases=True), OPTIMIZERS["adamw"], deep(head, norm=True))
    made.fit_task(stream[0], batch_size=8)
    made.begin_task(stream[1])
    second(made, 0, 2)
    kept = logits(made, stream[0])
    made.save(tmp_path / "saved")
    loaded = perdure.Learner.load(tmp_path / "saved", deep(head, norm=True, seed=5), prepare=lambda x: x)
    assert torch.equal(logits(loaded, stream[0]), kept)
    loaded.begin_task(stream[1])
    for each in (made, loaded):
        second(each, 2, 5)
        each.end_task()
        each.fit_task(stream[2], batch_size=8)
        assert torch.equal(logits(each, stream[0]), kept)
    assert torch.equal(made.parameters.theta, loaded.parameters.theta)
    assert torch.equal(made.methods[0].owner, loaded.methods[0].owner)
    assert same_bits(made.model, loaded.model)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("head", [None, "multi"])
def test_an_exported_task_is_a_plain_model_with_the_same_logits(head: str | None, biases: bool) -> None:
    stream, method = toy_stream("task"), PackNet(prune=0.6, train_biases=biases)
    made = learner(method, OPTIMIZERS["momentum"], deep(head, norm=True))
    early = []
    for task in stream:
        made.fit_task(task, batch_size=8)
        early.append(method.export(task.index))
    for task, before in zip(stream, early, strict=True):
        for alone in (before, method.export(task.index)):
            found = alone(rows(task))
            found = found if head == "multi" else found[:, list(task.classes)]
            assert torch.equal(found, logits(made, task))
            assert not alone.training
            for module in alone.modules():
                assert not isinstance(module, (TaskNorm, MultiHead))
                assert not module._forward_pre_hooks
                assert not module._forward_hooks
            assert not any(p.data_ptr() == q.data_ptr() for p in alone.parameters() for q in made.model.parameters())
    assert torch.equal(logits(made, stream[0]), logits(made, stream[0])), "the model still works"
    with pytest.raises(UsageError, match="has no weights for task 7"):
        method.export(7)


def test_a_second_learner_starts_afresh() -> None:
    stream, method = toy_stream("task"), PackNet(prune=0.6)
    model = deep()
    first = learner(method, model=model)
    first.fit_task(stream[0], batch_size=8)
    second = learner(method, model=deep())
    assert method.begun == []
    assert not method.owner.any()
    assert not any(module._forward_pre_hooks for module in model.modules())
    second.fit_task(stream[0], batch_size=8)
    assert torch.equal(first.parameters.theta, second.parameters.theta)


# -- refused ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_packed_is_refused() -> None:
    stream = toy_stream("task")
    tied = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 6))
    tied[2].weight = tied[0].weight
    with pytest.raises(IncompatibleError, match="which two layers share; untie it"):
        learner(PackNet(), model=tied)
    with pytest.raises(IncompatibleError, match="nothing to pack"):
        learner(PackNet(), model=nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 6)))
    with pytest.raises(IncompatibleError, match="needs a head whose rows belong to one task"):
        learner(PackNet(), model=nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)))
    compiled = toy_model()
    compiled.compile(backend="eager")
    for model in (torch.compile(toy_model(), backend="eager"), compiled):
        with pytest.raises(IncompatibleError, match="model does not see; pass the plain model"):
            learner(PackNet(), model=model)
    made = learner(PackNet(), model=toy_model())
    made.fit_task(stream[0], batch_size=8)
    with pytest.raises(UsageError, match="has no weights for task 1; there are some for 0"):
        made.outputs(rows(stream[0]), 1)
    with pytest.raises(UsageError, match="has packed task 0 already"):
        made.begin_task(stream[0])
    again = learner(PackNet(), model=toy_model())
    again.fit_task(stream[0], batch_size=8)
    same = Task(1, "again", stream[0].train, stream[0].test, (0, 1))
    with pytest.raises(IncompatibleError, match="has columns of an older one; build the model with a multi head"):
        again.begin_task(same)
    model = toy_model()
    with pytest.raises(IncompatibleError, match="cannot be attached"):
        perdure.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [PackNet()])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prune": 1.5}, "prune is 1.5, it must be between 0 and 1"),
        ({"prune": (0.5, -1)}, "prune is -1, it must be between 0 and 1"),
        ({"prune": "half"}, "prune is 'half', it must be shares between 0 and 1, or 'fill'"),
        ({"prune": ()}, "prune is an empty list"),
        ({"retrain": -1}, "retrain is -1"),
        ({"tasks": 0}, "tasks is 0"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        PackNet(**arguments)


def test_tasks_with_the_same_columns_have_heads_of_their_own() -> None:
    made = []
    for index in range(2):
        draw = torch.Generator().manual_seed(index)
        data = Examples(torch.randn(24, FEATURES, generator=draw), torch.arange(24) % 2)
        made.append(Task(index, f"t{index}", data, data, (0, 1)))
    stream = Stream(made, scenario="task", seed=0)
    trained = learner(PackNet(), OPTIMIZERS["adamw"], deep("multi"))
    trained.fit_task(stream[0], batch_size=8)
    kept = logits(trained, stream[0])
    trained.fit_task(stream[1], batch_size=8)
    assert torch.equal(logits(trained, stream[0]), kept)
