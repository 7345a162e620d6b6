"""Streams in which nobody says where a task begins: one pass, blurred phases, or a steady change from one to the next.

A task of such a stream is a part after which it is evaluated, on the test set of the task it was made of.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from perdure.data.joined import pooled
from perdure.errors import UsageError
from perdure.seeding import generator
from perdure.streams.task import Stream


def online(stream: Stream, *, transition: float = 0.0) -> Stream:
    """One pass over a stream whose boundaries nobody announces.

    Parameters
    ----------
    transition
        0: tasks follow one another abruptly. Above, up to 1: around every boundary, over that part of the shorter of
        the two tasks on each side of it, the share of the next task rises linearly from 0 to 1, and the rows arrive in
        an order that is drawn from the seed once. Every row still arrives once, and as many as before in every part.

    Source of the gradual form: C. Zeno, I. Golan, E. Hoffer, D. Soudry, Task Agnostic Continual Learning Using Online
    Variational Bayes, 2018, arXiv:1803.10123.

    Raises
    ------
    UsageError
        If `transition` is not between 0 and 1.

    >>> import perdure
    >>> stream = online(perdure.benchmarks.split_digits(), transition=1.0)
    >>> stream.scenario, len(stream), [int(y) for y in stream[0].train.targets.unique()]
    ('online', 5, [0, 1, 2, 3])
    """
    if not 0 <= transition <= 1:
        raise UsageError(f"transition={transition} should be between 0 (abrupt) and 1 (always changing)")
    if not transition or len(stream) == 1:
        return stream.replace(stream.tasks, scenario="online")
    sizes = [len(task.train) for task in stream]
    arrival = torch.cat([_arrivals(sizes, task, transition, stream.seed) for task in range(len(sizes))])
    parts = pooled([task.train for task in stream], arrival.argsort(stable=True))
    rows = torch.split(torch.arange(len(parts)), sizes)
    tasks = [replace(task, train=parts.subset(own)) for task, own in zip(stream, rows, strict=True)]
    return stream.replace(tasks, scenario="online", shuffle=False)


def _arrivals(sizes: list[int], task: int, transition: float, seed: int) -> Tensor:
    """When every row of a task arrives, float64 [n], on a clock that ticks once a row of the whole stream.

    A task comes in linearly around its beginning, is alone in between, and goes out linearly around its end. Its k-th
    row comes where that density has summed up to k + u, with u between 0 and 1.
    """
    draw = generator(seed, "transition", task)
    count = sizes[task]
    start = float(sum(sizes[:task]))
    into = transition / 2 * min(count, sizes[task - 1]) if task > 0 else 0.0
    out = transition / 2 * min(count, sizes[task + 1]) if task + 1 < len(sizes) else 0.0
    mass = torch.randperm(count, generator=draw) + torch.rand(count, generator=draw, dtype=torch.float64)
    # A ramp over [-h, h] has the mass h; x into it, it has (x + h)^2 / (4 h).
    rising = start - into + 2 * (into * mass).sqrt()
    falling = start + count + out - 2 * (out * (count - mass)).sqrt()
    flat = start + mass
    return torch.where(mass < into, rising, torch.where(mass > count - out, falling, flat))


def blurry(stream: Stream, *, share: float = 0.1) -> Stream:
    """Phases that are mostly one task and partly all others, without boundaries.

    Of every class of every task `share` of the rows, drawn from the seed, are dealt out evenly to the other phases. So
    every row still arrives once, and with balanced tasks `share` of a phase is foreign to it.

    Source: J. Bang, H. Kim, Y. Yoo, J.-W. Ha, J. Choi, Rainbow Memory: Continual Learning with a Memory of Diverse
    Samples, 2021, arXiv:2103.17230 (there "blurry-M", with M the share in percent).

    Raises
    ------
    UsageError
        If `share` is not at least 0 and below 1.

    >>> import perdure
    >>> phases = blurry(perdure.benchmarks.split_digits(), share=0.1)
    >>> [int((phase.train.targets // 2 != phase.index).sum()) for phase in phases]
    [25, 25, 26, 27, 26]
    """
    if not 0 <= share < 1:
        raise UsageError(f"share={share} should be at least 0 and below 1: the part of a phase that is foreign to it")
    count = len(stream)
    if count == 1 or not share:
        return stream.replace(stream.tasks, scenario="blurry")
    dealt: list[list[Tensor]] = [[] for _ in range(count)]
    start = 0
    for position, task in enumerate(stream):  # the place in this stream: an index may be that in a longer one
        draw = generator(stream.seed, "blurry", position)
        others = torch.tensor([phase for phase in range(count) if phase != position])
        turn = int(torch.randint(count - 1, (), generator=draw))
        for rows in by_class(task.train.targets):
            rows = start + rows[torch.randperm(len(rows), generator=draw)]
            away = round(share * len(rows))
            dealt[position].append(rows[away:])
            to = others[(turn + torch.arange(away)) % (count - 1)]
            for phase in others.tolist():
                dealt[phase].append(rows[:away][to == phase])
            turn += away
        start += len(task.train)
    # A phase's own order means nothing: its plan shuffles it.
    phases = [torch.cat(found).sort().values for found in dealt]
    parts = pooled([task.train for task in stream], torch.cat(phases))
    own = torch.split(torch.arange(len(parts)), [len(found) for found in phases])
    tasks = [replace(task, train=parts.subset(rows)) for task, rows in zip(stream, own, strict=True)]
    return stream.replace(tasks, scenario="blurry")


def by_class(targets: Tensor) -> list[Tensor]:
    """The rows int64 [n] of each class, ascending; all rows in one piece where the targets are no classes."""
    if targets.ndim != 1 or targets.is_floating_point():
        return [torch.arange(len(targets))]
    return [(targets == label).nonzero().flatten() for label in torch.unique(targets)]
