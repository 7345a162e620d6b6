"""The wrapper of experience replay: what is staged, what can be drawn, what is a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from wrapped import adam, batches, build, loss_fn, weights

from perdure.continual import ExperienceReplay


def stored(replay: ExperienceReplay) -> Tensor:
    if not len(replay.method.buffer):
        return torch.empty(0, 5)
    x: Tensor = replay.method.buffer.view("x")
    return x


def run(order: str, epochs: int = 1, memory_size: int = 20) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    model = build()
    replay, optimizer, losses = ExperienceReplay(model, memory_size), adam(model), []
    for task in (1, 2):
        for _ in range(epochs):
            for x, y in batches(task):
                if order == "add first":
                    replay.add_to_memory(x, y, task_id=task)
                losses.append(replay.train_step(optimizer, loss_fn, x, y, task_id=task).item())
                if order == "step first":
                    replay.add_to_memory(x, y, task_id=task)
    replay.add_to_memory(*batches(9)[0], task_id=9)
    return weights(model), stored(replay), replay.method.buffer.view("task"), losses


def test_adding_before_or_after_the_step_is_the_same() -> None:
    for epochs in (1, 3):
        first, second = run("add first", epochs), run("step first", epochs)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        assert first[3] == second[3]


def test_a_batch_is_not_replayed_in_its_own_step() -> None:
    model = build()
    replay, (x, y) = ExperienceReplay(model, replay_ratio=1.0), batches(1)[0]
    replay.add_to_memory(x, y, task_id=1)
    assert replay.get_replay_batch(4) is None
    expected = F.cross_entropy(model(x), y).item()
    assert replay.train_step(adam(model), loss_fn, x, y, task_id=1).item() == expected
    assert len(replay.method.buffer) == 8
    drawn = replay.get_replay_batch(100)
    assert drawn is not None
    assert sorted(drawn[0].tolist()) == sorted(x.tolist())


def test_a_batch_that_is_trained_elsewhere_can_be_drawn_from_the_next_call_on() -> None:
    model = build()
    replay = ExperienceReplay(model)
    for number, (x, y) in enumerate(batches(1)):
        replay.add_to_memory(x, y, task_id=1)
        assert len(replay.method.buffer) == 8 * number
    x, y = batches(2)[0]
    loss = replay.train_step(adam(model), loss_fn, x, y, task_id=2)
    assert len(replay.method.buffer) == 40
    assert loss.item() != F.cross_entropy(build()(x), y).item(), "nothing was replayed"


def test_copies_within_a_task_are_passed_over() -> None:
    once, thrice = run("step first", memory_size=500), run("add first", epochs=3, memory_size=500)
    assert len(once[1]) == len(thrice[1]) == 80
    assert torch.equal(once[1], thrice[1])
    assert len({tuple(row) for row in thrice[1].tolist()}) == 80


def test_a_copy_is_the_same_inputs_and_target_in_the_same_task() -> None:
    replay, (x, y) = ExperienceReplay(build()), batches(1)[0]

    def size() -> int:
        replay._store_staged()
        return len(replay.method.buffer)

    replay.add_to_memory(torch.cat([x, x]), torch.cat([y, y]), task_id=1)
    assert size() == 8
    replay.add_to_memory(x, (y + 1) % 3, task_id=1)
    assert size() == 16
    replay.add_to_memory(x, y, task_id=2)
    assert size() == 24
    replay.add_to_memory(x + 1, y, task_id=2, sample_index=torch.arange(8))
    assert size() == 32
    replay.add_to_memory(x + 2, y, task_id=2, sample_index=torch.arange(4, 12))
    assert size() == 36


def test_what_is_remembered_is_a_copy() -> None:
    replay, (x, y) = ExperienceReplay(build()), batches(1)[0]
    mine, labels = x.clone(), y.clone()
    replay.add_to_memory(mine, labels, task_id=1)
    mine.zero_()
    labels.zero_()
    replay._store_staged()
    assert torch.equal(stored(replay), x)
    assert torch.equal(replay.method.buffer.view("y"), y)


def test_the_memory_is_a_fair_sample_of_both_tasks_and_knows_them() -> None:
    _, rows, tasks, _ = run("step first", memory_size=20)
    assert len(rows) == 20
    assert set(tasks.tolist()) == {0, 1}
    everything = ExperienceReplay(build(), memory_size=100)
    for task in ("a", "b"):
        for x, y in batches(ord(task)):
            everything.add_to_memory(x, y, task_id=task)
    everything._store_staged()
    assert everything.method.buffer.stats()["tasks"] == {0: 40, 1: 40}


def test_as_many_rows_as_the_ratio_says_are_pooled() -> None:
    for ratio, expected in ((0.5, 4), (0.25, 2), (2.0, 16)):
        model = build()
        replay, optimizer = ExperienceReplay(model, replay_ratio=ratio), adam(model)
        sizes: list[int] = []

        def counting(outputs: Tensor, targets: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(targets))
            return loss_fn(outputs, targets)

        for x, y in batches(1):
            replay.train_step(optimizer, counting, x, y, task_id=1)
            replay.add_to_memory(x, y, task_id=1)
        available = [0, *[min(expected, 8 * n) for n in range(1, 5)]]
        assert sizes == [8 + extra for extra in available]


def test_a_replay_batch_is_drawn_without_replacement() -> None:
    replay = ExperienceReplay(build())
    assert replay.get_replay_batch(3) is None
    for x, y in batches(1):
        replay.add_to_memory(x, y, task_id=1)
    drawn: Any = replay.get_replay_batch(12)
    assert drawn[0].shape == (12, 5)
    assert drawn[1].shape == (12,)
    assert len({tuple(row) for row in drawn[0].tolist()}) == 12
    pairs = {(*row, label) for x, y in batches(1) for row, label in zip(x.tolist(), y.tolist(), strict=True)}
    assert {(*row, label) for row, label in zip(drawn[0].tolist(), drawn[1].tolist(), strict=True)} <= pairs
    assert len(replay.get_replay_batch(1000)[0]) == 32  # type: ignore[index]
