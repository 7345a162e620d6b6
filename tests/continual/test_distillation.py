"""The wrapper of knowledge distillation: higher alpha means more of the teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from wrapped import adam, batches, build, by_hand, loss_fn, train, weights

from perdure.continual import KnowledgeDistillation


def divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 2.0), (0.25, 1.0), (1.0, 4.0), (0.0, 2.0)])
def test_the_second_task_is_the_weighted_sum_of_the_document(alpha: float, temperature: float) -> None:
    ours, theirs = build(dtype=torch.float64), build(dtype=torch.float64)
    data = [[(x.double(), y) for x, y in batches(task)] for task in (1, 2)]
    mine, other = adam(ours), adam(theirs)
    distillation = KnowledgeDistillation(ours, temperature=temperature, alpha=alpha)
    train(distillation, mine, data[0], 1)
    by_hand(theirs, other, data[0])
    assert torch.equal(weights(ours), weights(theirs)), "the first task is the plain loss whatever alpha is"
    distillation.register_task(1, data[0])
    teacher = copy.deepcopy(theirs)
    for x, y in data[1]:
        other.zero_grad()
        outputs = theirs(x)
        loss = (1 - alpha) * F.cross_entropy(outputs, y)
        loss = loss + alpha * divergence(teacher(x).detach(), outputs, temperature)
        loss.backward()
        other.step()
        found = distillation.train_step(mine, loss_fn, x, y, task_id=2)
        torch.testing.assert_close(found, loss.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-7, atol=1e-9)


def test_the_distance_is_zero_before_a_teacher_and_for_the_teacher_itself() -> None:
    model = build()
    distillation, x = KnowledgeDistillation(model), batches(2)[0][0]
    outputs = model(x)
    none = distillation.get_distillation_loss(x, outputs)
    assert none.item() == 0.0
    (outputs.sum() * 0 + none).backward()
    by_hand(model, adam(model), batches(1))
    distillation.register_task(1)
    outputs = model(x)
    distance = distillation.get_distillation_loss(x, outputs)
    assert abs(distance.item()) < 1e-6
    assert torch.autograd.grad(distance, outputs)[0].abs().max() < 1e-6


def test_the_distance_differentiates_and_the_teacher_does_not() -> None:
    model = build()
    distillation, optimizer = KnowledgeDistillation(model, temperature=3.0, alpha=0.0), adam(model)
    by_hand(model, optimizer, batches(1))
    teacher = copy.deepcopy(model)
    distillation.register_task(1)
    by_hand(model, optimizer, batches(2))
    x = batches(3)[0][0]
    outputs = model(x)
    found = distillation.get_distillation_loss(x, outputs)
    torch.testing.assert_close(found, divergence(teacher(x).detach(), outputs, 3.0), rtol=1e-4, atol=1e-7)
    assert found.item() > 0
    # Hinton et al.: the gradient is T (q - p), a mean over the rows.
    p, q = (teacher(x) / 3).softmax(-1), (outputs / 3).softmax(-1)
    torch.testing.assert_close(torch.autograd.grad(found, outputs)[0], 3 * (q - p) / len(x), rtol=1e-3, atol=1e-6)


def test_the_teacher_is_the_model_as_it_was_when_its_task_ended() -> None:
    model = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 3))
    distillation, optimizer = KnowledgeDistillation(model), adam(model)
    train(distillation, optimizer, batches(1), 1)
    frozen = copy.deepcopy(model).eval()
    distillation.register_task(2)
    train(distillation, optimizer, batches(2), 2)
    by_hand(model, optimizer, batches(3))
    x = batches(4)[0][0]
    found = distillation.get_distillation_loss(x, frozen(x))
    assert abs(found.item()) < 1e-6, "teacher in training mode, moved, or with later running statistics"
    distillation.register_task(3)
    assert distillation.get_distillation_loss(x, frozen(x)).item() > 1e-6, "the second task's end is the new teacher"


def test_more_alpha_stays_closer_to_the_teacher() -> None:
    def distance(alpha: float) -> float:
        model = build()
        distillation, optimizer = KnowledgeDistillation(model, alpha=alpha), adam(model)
        train(distillation, optimizer, batches(1, count=30), 1)
        train(distillation, optimizer, batches(2, count=30), 2)
        x = torch.cat([x for x, _ in batches(2, count=30)])
        return distillation.get_distillation_loss(x, model(x)).item()

    assert distance(0.9) < distance(0.5) < distance(0.0)
