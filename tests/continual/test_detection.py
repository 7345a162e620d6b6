"""Boundaries found by the drop of accuracy, and what a wrapper makes of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from wrapped import WRAPPERS, Batches, build, by_hand, loss_fn

from perdure.continual import EWC, detect_task_boundary
from perdure.detection import Boundary
from perdure.errors import DataError, UsageError

CHANGE = 60
WINDOW = 20


def stream(batches: int = 2 * CHANGE, rows: int = 16) -> Batches:
    """Three classes; from batch 60 on, what was class c looks like class c + 1 did."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for number in range(batches):
        y = torch.randint(3, (rows,), generator=draw)
        x = torch.randn(rows, 5, generator=draw) * 0.3
        x[torch.arange(rows), (y + (number >= CHANGE)) % 3] += 2.0
        made.append((x, y))
    return made


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def run(wrapper: object, data: Batches, found: list[Boundary], **options: float) -> Iterator[int]:
    model = wrapper.model  # type: ignore[attr-defined]
    optimizer = sgd(model)
    numbered = detect_task_boundary(
        model, data, WINDOW, wrapper=wrapper, on_boundary=lambda boundary, task: found.append(boundary), **options
    )
    for task_id, x, y in numbered:
        wrapper.train_step(optimizer, loss_fn, x, y, task_id)  # type: ignore[attr-defined]
        yield task_id


def test_one_change_is_one_boundary_soon_after_it_and_an_estimate_beside_it() -> None:
    model, optimizer, found = build(), None, list[tuple[Boundary, int]]()
    optimizer = sgd(model)
    tasks = []
    numbered = detect_task_boundary(model, stream(), WINDOW, on_boundary=lambda b, task: found.append((b, task)))
    for task_id, x, y in numbered:
        by_hand(model, optimizer, [(x, y)])
        tasks.append(task_id)
    ((boundary, task),) = found
    assert task == 2
    assert CHANGE < boundary.step <= CHANGE + WINDOW
    assert abs(boundary.change_point - CHANGE) <= 2
    assert tasks == [1] * boundary.step + [2] * (2 * CHANGE - boundary.step)


def test_detecting_leaves_the_training_as_it_is() -> None:
    ours, theirs = build(), build()
    ours.eval()  # the mode that it is in, whatever it is
    optimizer = sgd(ours)
    for _, x, y in detect_task_boundary(ours, stream(), WINDOW):
        assert not ours.training
        by_hand(ours, optimizer, [(x, y)])
    by_hand(theirs, sgd(theirs), stream())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper_learns_of_the_boundary(name: str) -> None:
    wrapper, found = WRAPPERS[name](build()), list[Boundary]()
    assert set(run(wrapper, stream(), found)) == {1, 2}
    assert len(found) == 1
    assert wrapper._boundaries.done == [1]
    assert wrapper._boundaries.open == 2


def test_the_anchor_and_the_fisher_are_of_weights_and_rows_from_before_the_change() -> None:
    model, data, found = build(), stream(), list[Boundary]()
    ewc = EWC(model, importance=0.1, fisher_sample_size=10_000)
    thetas = []
    for task_id in run(ewc, data, found):
        if task_id == 1:
            thetas.append(ewc.learner.parameters.theta.clone())
        else:
            break
    ((boundary),) = found
    # The newest snapshot that is not younger than the estimated change: one is taken every second batch.
    lagged = boundary.change_point - boundary.change_point % 2
    assert ewc.method.anchor is not None
    assert torch.equal(ewc.method.anchor, thetas[lagged - 1])
    known = {tuple(row) for x, _ in data[: boundary.change_point] for row in x.tolist()}
    rows = ewc._data[1].gather(torch.arange(len(ewc._data[1])))[0].tolist()
    assert len(rows) > 500
    assert {tuple(row) for row in rows} <= known
    by_hand_twin = EWC(build(), importance=0.1, fisher_sample_size=10_000)
    optimizer = sgd(by_hand_twin.model)
    for x, y in data[:lagged]:
        by_hand_twin.train_step(optimizer, loss_fn, x, y, 1)
    clean = [torch.cat(column) for column in zip(*data[: boundary.change_point], strict=True)]
    by_hand_twin.register_task(1, [tuple(clean)])
    expected = by_hand_twin.method.importance
    assert ewc.method.importance is not None
    assert expected is not None
    # Another order of the rows draws other signs for them: the same Fisher but for that.
    ratio = float(ewc.method.importance.sum() / expected.sum())
    assert 0.8 < ratio < 1.25
    # Training went on from the weights as they were at the alarm.
    assert not torch.equal(ewc.learner.parameters.theta, thetas[lagged - 1])


def test_the_path_of_si_is_divided_at_the_change() -> None:
    wrapper, twin, data = WRAPPERS["si"](build()), WRAPPERS["si"](build()), stream()
    at_alarm = list[tuple[Boundary, Tensor]]()
    optimizer = sgd(wrapper.model)
    numbered = detect_task_boundary(
        wrapper.model,
        data,
        WINDOW,
        wrapper=wrapper,
        on_boundary=lambda boundary, task: at_alarm.append((boundary, wrapper.method.path.clone())),
    )
    for task_id, x, y in numbered:
        if task_id == 2:
            break
        wrapper.train_step(optimizer, loss_fn, x, y, task_id)
    ((boundary, begun),) = at_alarm
    lagged = boundary.change_point - boundary.change_point % 2
    optimizer = sgd(twin.model)
    for x, y in data[:lagged]:
        twin.train_step(optimizer, loss_fn, x, y, 1)
    path = twin.method.path.clone()
    for x, y in data[lagged : boundary.step]:
        twin.train_step(optimizer, loss_fn, x, y, 1)
    moved = wrapper.method.anchor - twin._snapshot
    torch.testing.assert_close(wrapper.method.importance, (path / (moved.square() + 0.1)).relu())
    torch.testing.assert_close(begun, twin.method.path - path)
    assert float(begun.abs().sum()) > 0


def test_wrong_input_is_refused_in_one_sentence() -> None:
    with pytest.raises(UsageError, match="another model"):
        detect_task_boundary(build(), stream(), wrapper=EWC(build()))
    with pytest.raises(UsageError, match="window"):
        detect_task_boundary(build(), stream(), window_size=1)
    with pytest.raises(DataError, match="class numbers"):
        next(detect_task_boundary(build(), [(torch.ones(2, 5), torch.ones(2))]))
