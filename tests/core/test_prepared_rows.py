"""Rows that a method made are prepared already; stored rows beside them are prepared, each once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from perdure.batch import Batch, Source
from perdure.forward import Forward
from perdure.models import MLP
from perdure.models.heads import MultiHead


def to_signed(x: Tensor) -> Tensor:
    """Not the same when done twice."""
    return x.float() / 127.5 - 1


def draw(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def forward_of(model: nn.Module, channels_last: bool = False) -> Forward:
    forward = Forward(model, torch.zeros(1), "float32", channels_last)
    forward.prepare = to_signed
    forward.heads = [module for module in model.modules() if hasattr(module, "activate")]
    return forward


def batch_of(shape: tuple[int, ...], tasks: bool, separate: bool) -> Batch:
    stored = (draw(3, *shape) * 255).to(torch.uint8)
    old = torch.tensor([0, 1, 0, 1]) if tasks else None
    batch = Batch.current(stored, torch.zeros(3, dtype=torch.int64), 1)
    batch = batch.add("made", draw(4, *shape), torch.zeros(4), prepared=True, tasks=old, separate=separate)
    return batch.add("kept", stored[:2], torch.zeros(2), tasks=None if old is None else old[:2])


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("tasks", [False, True])
def test_each_source_is_prepared_once_at_most(tasks: bool, separate: bool) -> None:
    model = MLP(5, [4], 6, seed=0)
    batch = batch_of((5,), tasks, separate)
    outputs = forward_of(model).batch(batch, 1)
    for source in batch.sources:
        wanted = model(source.x if source.prepared else to_signed(source.x))
        torch.testing.assert_close(batch.part(source.name, outputs), wanted)


@pytest.mark.parametrize("shared", [False, True])
def test_so_it_is_where_rows_are_grouped_by_task(shared: bool) -> None:
    """Heads with columns of their own answer in one pass, heads that share columns one by one."""
    head = MultiHead(4, seed=0)
    head.add(0, (0, 1))
    head.add(1, (0, 1) if shared else (2, 3))
    model = MLP(5, [4], 4, head=head, seed=0)
    forward, batch = forward_of(model), batch_of((5,), True, False)
    outputs = forward.batch(batch, 1)
    for source in batch.sources:
        tasks = torch.ones(source.size, dtype=torch.int64) if source.tasks is None else source.tasks
        rows = source.x if source.prepared else to_signed(source.x)
        for k, task in enumerate(tasks.tolist()):
            head.activate(task)
            own = model(rows[k : k + 1])[0]
            written = own.isfinite()
            torch.testing.assert_close(batch.part(source.name, outputs)[k][written], own[written])


def test_pieces_of_a_prepared_source_are_prepared() -> None:
    pieces = list(batch_of((5,), True, False).pieces(2))
    assert [piece.find("made").prepared for piece in pieces] == [True, True]  # type: ignore[union-attr]


def test_a_function_runs_in_the_place_of_the_model() -> None:
    batch = batch_of((5,), False, True)
    found = forward_of(MLP(5, [4], 6, seed=0)).batch(batch, None, lambda x: x.sum(1, keepdim=True))
    wanted = torch.cat([to_signed(batch.now.x), batch.sources[1].x, to_signed(batch.sources[2].x)]).sum(1, keepdim=True)
    torch.testing.assert_close(found, wanted)


def test_images_keep_the_layout_of_a_convolutional_model() -> None:
    forward = forward_of(nn.Conv2d(2, 3, 3), channels_last=True)
    x, prepared = forward.joined(batch_of((2, 6, 6), False, False).sources)
    assert prepared
    assert forward.inputs(x, prepared).is_contiguous(memory_format=torch.channels_last)
    only_stored, prepared = forward.joined((Source("a", torch.zeros(2, 2, 6, 6, dtype=torch.uint8), None),))
    assert not prepared
    assert only_stored.dtype == torch.uint8
