"""The examples of the Neurenix document as they stand there, with torch in place of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import CrossEntropyLoss, Linear, ReLU, Sequential
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from perdure.continual import EWC, ExperienceReplay, KnowledgeDistillation, L2Regularization, SynapticIntelligence


def dataset(task: int) -> TensorDataset:
    """A task of two classes that can be told apart, in inputs and outputs of the document's sizes."""
    draw = torch.Generator().manual_seed(task)
    y = torch.arange(96) % 2 + 2 * task
    x = 0.3 * torch.rand(96, 784, generator=draw)
    x[torch.arange(96), y] += 3.0
    return TensorDataset(x, y)


task1_dataset, task2_dataset = dataset(0), dataset(1)


@pytest.fixture(autouse=True)
def _seed() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def create() -> tuple[nn.Module, Any, DataLoader[Any], DataLoader[Any]]:
    model = Sequential(Linear(784, 256), ReLU(), Linear(256, 10))
    loss_fn = CrossEntropyLoss()
    return (
        model,
        loss_fn,
        DataLoader(task1_dataset, batch_size=32, shuffle=True),
        DataLoader(task2_dataset, batch_size=32, shuffle=True),
    )


def test_ewc() -> None:
    model, loss_fn, task1_dataloader, task2_dataloader = create()
    ewc = EWC(model, importance=1000.0)
    optimizer = Adam(model.parameters(), lr=0.001)
    ewc.register_task(task_id=1, dataloader=task1_dataloader)
    for _ in range(4):
        for inputs, targets in task1_dataloader:
            ewc.train_step(optimizer, loss_fn, inputs, targets, task_id=1)
    assert ewc.get_ewc_loss().item() == 0.0
    trained = [p.detach().clone() for p in model.parameters()]
    ewc.register_task(task_id=2, dataloader=task2_dataloader)
    for _ in range(4):
        for inputs, targets in task2_dataloader:
            ewc.train_step(optimizer, loss_fn, inputs, targets, task_id=2)
    assert ewc.get_ewc_loss().item() > 0
    assert ewc.method.anchor is not None
    anchors = ewc.learner.parameters.views(ewc.method.anchor).values()
    assert all(torch.equal(a, p) for a, p in zip(anchors, trained, strict=True)), "the Fisher of an untrained network"


def test_ewc_as_in_the_tutorial() -> None:
    model, loss_fn, task1_loader, task2_loader = create()
    ewc = EWC(model, importance=1000.0, fisher_sample_size=200)
    optimizer = Adam(model.parameters(), lr=0.001)
    for _ in range(4):
        model.train()
        for inputs, targets in task1_loader:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            loss.backward()
            optimizer.step()
    ewc.register_task(task_id=1, dataloader=task1_loader)
    assert ewc.method.importance is not None
    for _ in range(4):
        model.train()
        for inputs, targets in task2_loader:
            ewc.train_step(optimizer, loss_fn, inputs, targets, task_id=2)
    assert ewc.get_ewc_loss().item() > 0


def test_replay() -> None:
    model, loss_fn, task1_dataloader, task2_dataloader = create()
    replay = ExperienceReplay(model, memory_size=1000, replay_ratio=0.5)
    optimizer = Adam(model.parameters(), lr=0.001)
    for _ in range(4):
        for inputs, targets in task1_dataloader:
            replay.add_to_memory(inputs, targets, task_id=1)
            replay.train_step(optimizer, loss_fn, inputs, targets, task_id=1)
    assert len(replay.method.buffer) == 96, "later epochs stored copies"
    for _ in range(4):
        for inputs, targets in task2_dataloader:
            replay.add_to_memory(inputs, targets, task_id=2)
            replay.train_step(optimizer, loss_fn, inputs, targets, task_id=2)
    assert replay.method.buffer.stats()["tasks"] == {0: 96, 1: 96}
    x, y = task1_dataset.tensors
    assert (model(x).argmax(dim=1) == y).float().mean() > 0.9


def test_l2_regularization() -> None:
    model, loss_fn, task1_dataloader, task2_dataloader = create()
    l2_reg = L2Regularization(model, importance=1.0)
    optimizer = Adam(model.parameters(), lr=0.001)
    for _ in range(2):
        for inputs, targets in task1_dataloader:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            loss.backward()
            optimizer.step()
    l2_reg.register_task(task_id=1)
    for _ in range(2):
        for inputs, targets in task2_dataloader:
            l2_reg.train_step(optimizer, loss_fn, inputs, targets, task_id=2)
    assert l2_reg.get_regularization_loss().item() > 0


def test_knowledge_distillation() -> None:
    model, loss_fn, task1_dataloader, task2_dataloader = create()
    distillation = KnowledgeDistillation(model, temperature=2.0, alpha=0.5)
    optimizer = Adam(model.parameters(), lr=0.001)
    for _ in range(2):
        for inputs, targets in task1_dataloader:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            loss.backward()
            optimizer.step()
    distillation.register_task(task_id=1, dataloader=task1_dataloader)
    for _ in range(2):
        for inputs, targets in task2_dataloader:
            distillation.train_step(optimizer, loss_fn, inputs, targets, task_id=2)
    x = task2_dataset.tensors[0]
    assert distillation.get_distillation_loss(x, model(x)).item() > 0


def test_synaptic_intelligence() -> None:
    model, loss_fn, task1_dataloader, task2_dataloader = create()
    si = SynapticIntelligence(model, importance=1.0, xi=0.1)
    optimizer = Adam(model.parameters(), lr=0.001)
    si.register_task(task_id=1)
    for _ in range(2):
        for inputs, targets in task1_dataloader:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            loss.backward()
            si.update_importance(loss)
            optimizer.step()
    si.register_task(task_id=2)
    assert si.method.importance is not None
    assert si.method.importance.sum() > 0
    for _ in range(2):
        for inputs, targets in task2_dataloader:
            si.train_step(optimizer, loss_fn, inputs, targets, task_id=2)
    assert si.get_regularization_loss().item() > 0


def test_a_boundary_that_was_detected_has_no_data_at_hand() -> None:
    model, loss_fn, task1_dataloader, _ = create()
    ewc = EWC(model, importance=1000.0)
    optimizer = Adam(model.parameters(), lr=0.001)
    current_task_id = 1
    for inputs, targets in task1_dataloader:
        ewc.train_step(optimizer, loss_fn, inputs, targets, current_task_id)
    current_task_id += 1
    ewc.register_task(current_task_id, dataloader=None)  # We'll update Fisher later
    assert ewc.method.importance is not None, "the last batches should have stood in for the loader"
    before = ewc.method.importance
    ewc.update_fisher(1, task1_dataloader)
    assert not torch.equal(ewc.method.importance, before)


@pytest.mark.parametrize(
    ("create_wrapper", "kind"),
    [
        (lambda model: EWC(model, importance=1000.0), "memory_limited"),
        (lambda model: ExperienceReplay(model, memory_size=1000), "memory_available"),
        (lambda model: KnowledgeDistillation(model, temperature=2.0), "otherwise"),
    ],
)
def test_choosing_the_right_method(create_wrapper: Callable[[nn.Module], Any], kind: str) -> None:
    model, loss_fn, task1_dataloader, _ = create()
    continual_method = create_wrapper(model)
    optimizer = Adam(model.parameters(), lr=0.001)
    first = last = 0.0
    for number, (inputs, targets) in enumerate([*task1_dataloader] * 4):
        loss = continual_method.train_step(optimizer, loss_fn, inputs, targets, task_id=kind)
        first, last = (loss.item(), last) if number == 0 else (first, loss.item())
    assert last < 0.5 * first
