"""iCaRL: what it is trained on and towards, which exemplars it keeps, and how it classifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_problems import batches, momentum, same_bits, sgd, toy_model, toy_stream, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import perdure
from perdure.data.examples import Examples
from perdure.memory.selection import herding
from perdure.methods import ERACE, WA, BiC, ICaRL, Joint, Replay
from perdure.methods.features import features_of
from perdure.methods.icarl import almost_black
from perdure.methods.side_passes import eval_mode
from perdure.streams.task import Task, draw_plan


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def greedy(phi: Tensor, target: Tensor, count: int) -> list[int]:
    """Herding as the paper writes it: the row that brings the running mean closest to the target, none twice."""
    chosen: list[int] = []
    while len(chosen) < min(count, len(phi)):
        rest = [i for i in range(len(phi)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: float((phi[[*chosen, i]].double().mean(0) - target).norm())))
    return chosen


def trained(tasks: int = 3, **options: Any) -> tuple[perdure.Learner, Any]:
    stream = toy_stream("class", dtype=options.pop("dtype", torch.float32))
    learner = perdure.Learner(toy_model(), sgd, [ICaRL(**{"capacity": 18, **options})], scenario="class")
    for task in stream[:tasks]:
        learner.fit_task(task, batch_size=8)
    return learner, stream


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("reduce", "temperature"), [("mean", 1.0), ("sum", 2.0)])
def test_training_exemplars_and_predictions_equal_a_hand_written_loop(
    reduce: str, temperature: float, normalise: bool
) -> None:
    stream = toy_stream("class")
    ours, theirs = toy_model(), toy_model()
    method = ICaRL(capacity=14, reduce=reduce, temperature=temperature, normalise=normalise)
    learner = perdure.Learner(ours, sgd, [method])
    results = learner.fit(stream, batch_size=8, epochs=2, eval_future=False)

    kept: dict[int, Tensor] = {}
    for task in stream:
        x = torch.cat([task.train.x, *kept.values()])
        y = torch.cat([task.train.targets, *(torch.full((len(rows),), label) for label, rows in kept.items())])
        seen, old = 2 * task.index + 2, 2 * task.index
        teacher = toy_model()
        teacher.load_state_dict(theirs.state_dict())
        optimizer = sgd(theirs.parameters())
        for rows in draw_plan(len(y), (0, "plan", task.index), epochs=2, batch_size=8):
            targets = F.one_hot(y[rows], 6)[:, :seen].float()
            with torch.no_grad():
                targets[:, :old] = torch.sigmoid(teacher(x[rows])[:, :old] / temperature)
            z = theirs(x[rows])[:, :seen]
            bce = -(targets * F.logsigmoid(z) + (1 - targets) * F.logsigmoid(-z))
            optimizer.zero_grad()
            (bce.mean() if reduce == "mean" else bce.sum(1).mean()).backward()
            optimizer.step()
        kept = {label: rows[: 14 // seen] for label, rows in kept.items()}
        means = {}
        with torch.no_grad():
            for label in task.classes:
                rows = task.train.x[task.train.targets == label]
                phi = theirs.features(rows)
                target = unit(unit(phi).mean(0)) if normalise else phi.mean(0)
                kept[label] = rows[greedy(unit(phi) if normalise else phi, target, 14 // seen)]
            for label, rows in kept.items():
                phi = theirs.features(rows)
                means[label] = unit(unit(phi).mean(0)) if normalise else phi.mean(0)
            for past in stream[: task.index + 1]:
                phi = theirs.features(past.test.x)
                phi = unit(phi) if normalise else phi
                nearest = torch.stack([(phi - means[label]).norm(dim=1) for label in range(seen)], 1).argmin(1)
                score = float((nearest == past.test.targets).float().mean())
                assert results.class_incremental["matrix"][task.index, past.index] == pytest.approx(score)
                own = torch.stack([(phi - means[label]).norm(dim=1) for label in past.classes], 1).argmin(1)
                score = float((own + past.classes[0] == past.test.targets).float().mean())
                assert results.task_restricted["matrix"][task.index, past.index] == pytest.approx(score)
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-5)
    assert all(torch.equal(method.exemplars.rows[label], rows) for label, rows in kept.items())


def test_old_targets_are_the_old_models_for_exemplars_too_and_new_ones_are_one_hot() -> None:
    learner, stream = trained(1)
    method = learner.methods[0]
    old = learner.outputs(stream[1].train.x[:4])
    learner.begin_task(stream[1])
    train = learner.task.train
    assert len(train) == 58
    x, y = train.gather(torch.tensor([0, 1, 56, 57]))
    assert y.tolist() == [2, 3, 1, 1]
    batch = perdure.batch.Batch.current(x, y, 1)
    outputs = learner.forward.batch(batch, None)
    targets = method.targets(batch, outputs)
    assert torch.allclose(targets[:2, :2], torch.sigmoid(old[:2, :2]))
    assert torch.allclose(targets[:, :2], torch.sigmoid(outputs[:, :2]))  # the old model is still the present one
    assert targets[:, 2:4].tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]
    loss = method.criterion(outputs, batch)
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert not gradient[:, 4:].any(), "classes to come take no part"
    assert gradient[:, :2].abs().max() < 1e-7, "at the old model its own answers give no gradient"
    learner.step(x, y)
    assert torch.equal(method.teacher["head.weight"][:2], learner.methods[0].teacher["head.weight"][:2])


def test_the_teacher_keeps_its_bits_and_statistics() -> None:
    stream = toy_stream("class")
    learner = perdure.Learner(toy_model(norm=True), sgd, [ICaRL(capacity=18)], scenario="class")
    learner.fit_task(stream[0], batch_size=8)
    end = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    learner.begin_task(stream[1])
    for rows in draw_plan(len(learner.task.train), (0,), batch_size=8):
        learner.step(*learner.task.train.gather(rows))
    teacher = learner.methods[0].teacher
    assert all(torch.equal(teacher[name], end[name]) for name in teacher)
    assert not torch.equal(teacher["body.0.weight"], learner.model.body[0].weight)


@pytest.mark.parametrize("method", [ICaRL, WA, BiC])
def test_between_tasks_no_old_model_is_saved_and_a_resumed_run_is_the_same(method: Any, tmp_path: Path) -> None:
    stream = toy_stream("class")
    whole = perdure.Learner(toy_model(norm=True), sgd, [method(capacity=18)], scenario="class")
    for task in stream[:2]:
        whole.fit_task(task, batch_size=8)
    whole.save(tmp_path / "between")
    assert whole.methods[0].state_dict()["teacher"] is None
    model = toy_model(norm=True)
    cut = perdure.Learner.load(tmp_path / "between", model, optimizer=sgd, methods=[method(capacity=18)])
    x = torch.cat([task.test.x for task in stream[:2]])
    assert torch.equal(cut.predict(x), whole.predict(x))
    for learner in (whole, cut):
        learner.begin_task(stream[2])
        learner.step(*learner.task.train.gather(torch.arange(8)))
    saved = cut.methods[0].state_dict()["teacher"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in whole.methods[0].teacher.items())
    whole.save(tmp_path / "inside")
    inside = perdure.Learner.load(
        tmp_path / "inside", toy_model(norm=True), optimizer=sgd, methods=[method(capacity=18)]
    )
    inside.begin_task(stream[2])
    for learner in (whole, cut, inside):
        learner.step(*learner.task.train.gather(torch.arange(8, 16)))
    assert torch.equal(whole.parameters.theta, cut.parameters.theta)
    assert torch.equal(whole.parameters.theta, inside.parameters.theta)


def test_in_pieces_and_beside_replay_the_loss_is_that_of_all_rows() -> None:
    stream = toy_stream("class")
    found = []
    for pieces in (1, 3):
        model = toy_model()
        methods = [ICaRL(capacity=18), Replay(capacity=20, weighting="sum", weight=0.5)]
        perdure.Learner(model, sgd, methods, micro_batches=pieces).fit(stream, batch_size=8)
        found.append(weights(model))
    assert torch.allclose(found[0], found[1], atol=1e-5)


# -- exemplars ------------------------------------------------------------------------------------------------------


def test_exemplars_seen_in_training_are_the_stored_originals() -> None:
    learner, stream = trained(1, dtype=torch.uint8)
    learner.begin_task(stream[1])
    train = learner.task.train
    x, y = train.gather(torch.arange(40, len(train)))
    assert x.dtype == torch.uint8
    assert len(x) == 18
    for row, label in zip(x, y.tolist(), strict=True):
        same = (stream[0].train.x == row).all(1)
        assert stream[0].train.targets[same].tolist() == [label]


def test_a_smaller_quota_keeps_the_first_which_a_shorter_herding_would_have_chosen() -> None:
    learner, stream = trained(1)
    method = learner.methods[0]
    before = {label: x.clone() for label, x in method.exemplars.rows.items()}
    assert [len(x) for x in before.values()] == [9, 9]
    for label, x in before.items():
        rows = stream[0].train.x[stream[0].train.targets == label]
        phi = method.features(rows)
        assert torch.equal(rows[herding(phi, 4, method.mean(phi))], x[:4])
    learner.fit_task(stream[1], batch_size=8)
    learner.fit_task(stream[2], batch_size=8)
    assert {label: len(x) for label, x in method.exemplars.rows.items()} == dict.fromkeys(range(6), 3)
    assert all(torch.equal(method.exemplars.rows[label], x[:3]) for label, x in before.items())
    assert len(method.exemplars) == 18


def test_the_largest_product_and_the_closest_mean_choose_alike_for_features_of_length_one() -> None:
    phi = unit(torch.randn(60, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).abs())
    target = unit(phi.mean(0))
    w, free, chosen = target.clone(), torch.ones(60, dtype=torch.bool), []
    for _ in range(25):
        best = int((phi @ w).masked_fill(~free, -torch.inf).argmax())
        chosen.append(best)
        free[best] = False
        w = w + target - phi[best]
    assert herding(phi, 25, target).tolist() == chosen


def test_a_random_selection_is_uniform_and_so_is_what_a_smaller_quota_leaves() -> None:
    stream, counts = toy_stream("class"), torch.zeros(2, 40)
    for seed in range(200):
        method = ICaRL(capacity=18, selection="random")
        learner = perdure.Learner(toy_model(), sgd, [method], scenario="class", seed=seed)
        for number, task in enumerate(stream[:2]):
            learner.begin_task(task)
            learner.end_task()
            for label in (0, 1):
                for row in method.exemplars.rows[label]:
                    counts[number][(stream[0].train.x == row).all(1)] += 1
    # 9 and then 4 of 20 rows of a class: 90 and 40 times of 200, with standard deviations of 7.0 and 5.7.
    assert (counts[0] - 90).abs().max() < 4 * 7.0
    assert (counts[1] - 40).abs().max() < 4 * 5.7


def test_per_class_the_number_stays() -> None:
    learner, _ = trained(capacity=None, per_class=4)
    assert {len(x) for x in learner.methods[0].exemplars.rows.values()} == {4}


def test_a_class_that_comes_again_is_chosen_anew_from_old_and_new_rows() -> None:
    learner, stream = trained(2)
    method = learner.methods[0]
    old = method.exemplars.rows[0].clone()
    learner.fit_task(Task(2, "again", stream[0].train.subset(torch.arange(6)), None, (0, 1)), batch_size=8)
    assert method.old == [2, 3]
    kept = method.exemplars.rows[0]
    candidates = torch.cat([old, stream[0].train.x[0:6:2]])
    phi = method.features(candidates)
    assert torch.equal(kept, candidates[herding(phi, 4, method.mean(phi))])


# -- prediction -----------------------------------------------------------------------------------------------------


def test_the_nearest_mean_does_not_depend_on_the_features_scale_and_follows_the_network() -> None:
    learner, stream = trained()
    method, x = learner.methods[0], torch.cat([task.test.x for task in stream])
    _, means = method.class_means()
    before = method.predict(x, None)
    with torch.no_grad():
        learner.model.body[0].weight.mul_(3.0)
        learner.model.body[0].bias.mul_(3.0)
    assert torch.equal(method.predict(x, None), before)
    assert torch.allclose(method.class_means()[1], means, atol=1e-6)
    with torch.no_grad():
        learner.parameters.theta[:20] *= -1.0
    _, moved = method.class_means()
    assert not torch.allclose(moved, means, atol=1e-2)
    for label, mean in enumerate(moved):
        phi = unit(learner.model.features(method.exemplars.rows[label]))
        assert torch.allclose(mean, unit(phi.mean(0)), atol=1e-6)


def test_a_prediction_does_not_depend_on_what_shares_its_batch() -> None:
    stream = toy_stream("class")
    learner = perdure.Learner(toy_model(norm=True), sgd, [ICaRL(capacity=18)], scenario="class")
    for task in stream:
        learner.fit_task(task, batch_size=8)
    x = torch.cat([task.test.x for task in stream])
    together = learner.predict(x)
    assert torch.equal(torch.cat([learner.predict(x[i : i + 1]) for i in range(len(x))]), together)
    assert torch.equal(learner.predict(x.flip(0)).flip(0), together)
    assert learner.model.training


def test_classes_of_the_open_task_have_the_mean_of_their_training_rows() -> None:
    learner, stream = trained(1)
    method = learner.methods[0]
    learner.begin_task(stream[1])
    labels, means = method.class_means()
    assert labels == [0, 1, 2, 3]
    rows = stream[1].train.x[stream[1].train.targets == 3]
    assert torch.allclose(means[3], unit(unit(learner.model.features(rows)).mean(0)), atol=1e-6)


def test_before_anything_is_known_the_outputs_predict() -> None:
    learner = perdure.Learner(toy_model(), sgd, [ICaRL(capacity=18)], scenario="class")
    x = toy_stream("class")[0].test.x
    assert torch.equal(learner.predict(x), learner.model(x).argmax(1))


# -- parts of it, and combinations ----------------------------------------------------------------------------------


def test_beside_replay_its_prediction_alone_leaves_the_training_as_it_is() -> None:
    stream = toy_stream("class")
    ours, plain = toy_model(), toy_model()
    method = ICaRL(capacity=18, use="prediction")
    learner = perdure.Learner(ours, momentum, [Replay(capacity=20), method])
    learner.fit(stream, batch_size=8)
    perdure.Learner(plain, momentum, [Replay(capacity=20)]).fit(stream, batch_size=8)
    assert same_bits(ours, plain)
    x = torch.cat([task.test.x for task in stream])
    phi = unit(ours.features(x))
    means = torch.stack([unit(unit(ours.features(method.exemplars.rows[c])).mean(0)) for c in range(6)])
    assert torch.equal(learner.predict(x), torch.cdist(phi, means).argmin(1))
    assert not torch.equal(learner.predict(x), ours(x).argmax(1))
    # With its own loss given up, another owner of the loss is welcome.
    perdure.Learner(toy_model(), sgd, [ERACE(capacity=20), ICaRL(capacity=18, use="prediction")]).fit(
        stream, batch_size=8
    )


def test_its_training_alone_predicts_by_the_largest_output() -> None:
    both, stream = trained()
    alone, _ = trained(use="training")
    assert same_bits(both.model, alone.model)
    x = torch.cat([task.test.x for task in stream])
    assert torch.equal(alone.predict(x), alone.model(x).argmax(1))
    assert not torch.equal(alone.predict(x), both.predict(x))


@pytest.mark.parametrize("off", [{"capacity": 0}, {"capacity": None, "per_class": 0}], ids=str)
def test_without_exemplars_it_is_fine_tuning(off: dict[str, Any]) -> None:
    stream = toy_stream("class")
    ours, plain = toy_model(norm=True), toy_model(norm=True)
    perdure.Learner(ours, momentum, [ICaRL(**off)]).fit(stream, batch_size=8)
    perdure.Learner(plain, momentum).fit(stream, batch_size=8)
    assert same_bits(ours, plain)


def test_the_published_mistake_trains_on_almost_black_exemplars_and_classifies_with_the_true_ones() -> None:
    learner, stream = trained(1, dtype=torch.uint8, cast_exemplars=True, normalise=False)
    method = learner.methods[0]
    learner.begin_task(stream[1])
    x, _ = learner.task.train.gather(torch.arange(40, 58))
    assert x.dtype == torch.uint8
    assert int(x.max()) <= 1
    assert all(int(rows.max()) > 100 for rows in method.exemplars.rows.values())
    assert almost_black(torch.tensor([0, 1, 254, 255], dtype=torch.uint8)).tolist() == [0, 0, 0, 1]
    with pytest.raises(perdure.errors.UsageError, match="images of bytes"):
        trained(2, cast_exemplars=True)


def test_features_are_what_the_last_linear_layer_sees_or_a_named_one() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 6))
    learner = perdure.Learner(model, sgd)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(features_of(learner, x, normalise=False), model[:4](x))
    assert torch.allclose(features_of(learner, x, "2", normalise=False), model[:2](x))
    assert torch.allclose(features_of(learner, x).norm(dim=1), torch.ones(7))
    with pytest.raises(perdure.errors.UsageError, match="no layer 'fc'; there are 0, 1, 2, 3, 4"):
        features_of(learner, x, "fc")
    flat = nn.Sequential(nn.Conv1d(1, 1, 1))
    with pytest.raises(perdure.errors.ModelError, match="no linear layer"):
        features_of(perdure.Learner(flat, sgd), torch.ones(2, 1, 3))
    own = toy_model(norm=True)
    with eval_mode(own):
        expected = own.features(x)
    assert torch.equal(features_of(perdure.Learner(own, sgd), x, normalise=False), expected)


def test_with_a_growing_head_the_old_columns_are_the_old_models() -> None:
    stream = toy_stream("class")
    learner = perdure.Learner(toy_model(head="growing"), momentum, [ICaRL(capacity=18)], scenario="class")
    for task in stream[:2]:
        learner.fit_task(task, batch_size=8)
    end = learner.model.head.weight.detach().clone()
    learner.begin_task(stream[2])
    assert learner.model.head.weight.shape == (6, 7)
    assert torch.equal(learner.methods[0].teacher["head.weight"][:4], end)
    x, y = batches(stream, 2)[0]
    learner.step(x, y)
    assert not torch.equal(learner.model.head.weight[:4], end)
    learner.end_task()
    assert sorted(learner.methods[0].exemplars.rows) == [0, 1, 2, 3, 4, 5]


def test_refusals() -> None:
    stream = toy_stream("class")
    incompatible, usage = perdure.errors.IncompatibleError, perdure.errors.UsageError
    with pytest.raises(incompatible, match="'er_ace' and 'icarl' both own criterion"):
        perdure.Learner(toy_model(), sgd, [ERACE(), ICaRL()])
    with pytest.raises(incompatible, match="'joint' and 'icarl' both own training_data"):
        perdure.Learner(toy_model(), sgd, [Joint(), ICaRL()])
    with pytest.raises(incompatible, match="not defined on a domain-incremental"):
        perdure.Learner(toy_model(2), sgd, [ICaRL()], scenario="domain")
    with pytest.raises(incompatible, match="needs a task's data before it begins"):
        perdure.Learner(toy_model(), sgd, [ICaRL()], boundaries="page_hinkley")
    with pytest.raises(incompatible, match="one head for all classes"):
        perdure.Learner(toy_model(head="multi"), sgd, [ICaRL()]).fit(toy_stream("task"), batch_size=8)
    with pytest.raises(usage, match="capacity is 2000 and per_class is 5; give one"):
        ICaRL(per_class=5)
    with pytest.raises(usage, match="capacity is 3 and there are 4 classes"):
        trained(2, capacity=3)
    learner = perdure.Learner(toy_model(), sgd, [ICaRL()], scenario="class")
    x, y = batches(stream, 0)[0]
    with pytest.raises(usage, match="pass arrays or a data set"):
        learner.begin_task("a", DataLoader(TensorDataset(x, y)), classes=(0, 1))
    with pytest.raises(usage, match="give begin_task"):
        learner.begin_task("a", (x, y))
    with pytest.raises(perdure.errors.DataError, match="rows of class 1, which is none of"):
        learner.begin_task("a", Examples(x, y), classes=(0,))
