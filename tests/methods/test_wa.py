"""WA: how the loss is divided, and that only the length of new output rows is corrected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_problems import momentum, same_bits, sgd, toy_model, toy_stream, weights
from torch import nn
from torch.nn import functional as F

import perdure
from perdure.memory.selection import herding
from perdure.methods import WA, ICaRL, Method
from perdure.methods.wa import align
from perdure.models.heads import CosineHead
from perdure.streams.task import draw_plan


@pytest.mark.parametrize("options", [{}, {"alpha": 0.3, "rescale": False}], ids=str)
def test_training_and_alignment_equal_a_hand_written_loop(options: dict[str, Any]) -> None:
    stream = toy_stream("class")
    ours, theirs = toy_model(), toy_model()
    method = WA(capacity=12, **options)
    perdure.Learner(ours, sgd, [method]).fit(stream, batch_size=8, epochs=2)

    kept: dict[int, torch.Tensor] = {}
    for task in stream:
        x = torch.cat([task.train.x, *kept.values()])
        y = torch.cat([task.train.targets, *(torch.full((len(rows),), label) for label, rows in kept.items())])
        old, seen = 2 * task.index, 2 * task.index + 2
        share = options.get("alpha", old / seen) if old else 0.0
        teacher = toy_model()
        teacher.load_state_dict(theirs.state_dict())
        optimizer = sgd(theirs.parameters())
        for rows in draw_plan(len(y), (0, "plan", task.index), epochs=2, batch_size=8):
            z = theirs(x[rows])
            loss = (1 - share) * F.cross_entropy(z, y[rows])
            if old:
                with torch.no_grad():
                    p = (teacher(x[rows])[:, :old] / 2).softmax(1)
                distance = (p * (p.log() - (z[:, :old] / 2).log_softmax(1))).sum(1).mean()
                loss = loss + share * (1 if options else 4) * distance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            head = theirs.head.weight
            if old:
                before = head.clone()
                head[old:seen] *= head[:old].norm(dim=1).mean() / head[old:seen].norm(dim=1).mean()
                assert not torch.allclose(head, before, atol=1e-3)
            kept = {label: rows[: 12 // seen] for label, rows in kept.items()}
            for label in task.classes:
                rows = task.train.x[task.train.targets == label]
                phi = F.normalize(theirs.features(rows), dim=1)
                kept[label] = rows[herding(phi, 12 // seen, F.normalize(phi.mean(0), dim=0))]
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-5)
    assert all(torch.equal(method.exemplars.rows[label], rows) for label, rows in kept.items())


def test_afterwards_the_mean_lengths_are_equal_old_rows_keep_their_bits_and_new_ones_their_direction() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    before = weight.clone()
    align(weight, [0, 1, 4], [2, 5])
    lengths = weight.norm(dim=1)
    assert float(lengths[[2, 5]].mean() / lengths[[0, 1, 4]].mean()) == pytest.approx(1.0)
    assert torch.equal(weight[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    factors = weight[[2, 5]] / before[[2, 5]]
    assert torch.allclose(factors, factors[0, 0].expand_as(factors))
    zero = torch.zeros(2, 3)
    align(zero, [0], [1])
    assert not zero.any()


class Lengths(Method):
    """Reads the output layer when a task ends, after WA."""

    name = "zz_lengths"

    def end_task(self, task: Any) -> None:
        self.head = self.learner.model.head
        self.found = self.head.weight.norm(dim=1), self.head.bias.clone()


@pytest.mark.parametrize("head", [None, "growing"])
def test_in_training_it_is_the_weights_of_the_tasks_classes_that_are_aligned(head: str | None) -> None:
    stream = toy_stream("class")
    lengths = Lengths()
    learner = perdure.Learner(toy_model(head=head), momentum, [WA(capacity=12), lengths], scenario="class")
    for task in stream:
        learner.begin_task(task)
        for rows in draw_plan(len(learner.task.train), (0,), batch_size=8):
            learner.step(*learner.task.train.gather(rows))
        bias = learner.model.head.bias.clone()
        before = learner.model.head.weight.detach().clone()
        learner.end_task()
        assert torch.equal(lengths.found[1], bias)
        now, old = learner.model.head.weight.detach(), 2 * task.index
        assert torch.equal(now[:old], before[:old])
        if old:
            assert float(now[old : old + 2].norm(dim=1).mean() / now[:old].norm(dim=1).mean()) == pytest.approx(1.0)
        assert torch.equal(now[old + 2 :], before[old + 2 :])


@pytest.mark.parametrize("off", [{"capacity": 0}, {"capacity": None, "per_class": 0}], ids=str)
def test_without_exemplars_it_is_fine_tuning(off: dict[str, Any]) -> None:
    stream = toy_stream("class")
    ours, plain = toy_model(norm=True), toy_model(norm=True)
    perdure.Learner(ours, momentum, [WA(**off)]).fit(stream, batch_size=8)
    perdure.Learner(plain, momentum).fit(stream, batch_size=8)
    assert same_bits(ours, plain)


def test_refusals() -> None:
    incompatible = perdure.errors.IncompatibleError
    with pytest.raises(incompatible, match="'wa' is not defined on a task-incremental"):
        perdure.Learner(toy_model(), sgd, [WA()], scenario="task")
    with pytest.raises(incompatible, match="'wa' and 'icarl' both own training_data"):
        perdure.Learner(toy_model(), sgd, [WA(), ICaRL()])
    model = toy_model()
    model.head = CosineHead(7, 6)
    with pytest.raises(perdure.errors.ModelError, match="use a wide or a growing head"):
        perdure.Learner(model, sgd, [WA(capacity=12)]).fit(toy_stream("class"), batch_size=8)
    nothing = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 6, 5), nn.Flatten())
    with pytest.raises(perdure.errors.ModelError, match="no linear layer"):
        perdure.Learner(nothing, sgd, [WA(capacity=12)]).fit(toy_stream("class"), batch_size=8)
