"""Streams whose inputs are row numbers, so that a test can see which rows arrive where."""

from __future__ import annotations

from typing import Any

import torch

from perdure.data.examples import Examples
from perdure.streams.task import Stream, Task


def numbered(sizes: list[int], classes: int = 2, scenario: str = "class") -> Stream:
    """Tasks whose inputs are the number of the row in the whole stream; `classes` new columns a task."""
    tasks, start = [], 0
    for index, size in enumerate(sizes):
        own = tuple(range(index * classes, (index + 1) * classes)) if scenario != "domain" else tuple(range(classes))
        y = torch.arange(size) % classes + own[0]
        x = torch.arange(start, start + size).float().unsqueeze(1)
        tasks.append(Task(index, f"t{index}", Examples(x, y), Examples(x[:1], y[:1]), own))
        start += size
    return Stream(tasks, scenario=scenario, seed=3)


def arrived(stream: Stream, **plan: Any) -> list[list[int]]:
    """The rows of each part in the order of the plan, by their inputs."""
    return [
        [int(row) for x, _, _ in task.train.batches(stream.plan(task, batch_size=4, **plan)) for row in x[:, 0]]
        for task in stream
    ]
