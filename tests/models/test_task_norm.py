"""Normalisation with a copy a task."""

import pytest
import torch
from torch import nn

from perdure.errors import UnknownNameError
from perdure.models.task_norm import TaskNorm, split_norms


def test_every_task_has_statistics_and_parameters_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    split_norms(model)
    norm = model[1]
    assert isinstance(norm, TaskNorm)
    x = torch.randn(8, 3)
    norm.add(0)
    model(x)
    first = {k: v.clone() for k, v in norm.norms["task_0"].state_dict().items()}
    norm.add(1)
    assert all(torch.equal(v, first[k]) for k, v in norm.norms["task_1"].state_dict().items()), "starts as the latest"
    model(10 * x)
    assert all(torch.equal(v, first[k]) for k, v in norm.norms["task_0"].state_dict().items())
    assert not torch.equal(norm.norms["task_1"].running_mean, first["running_mean"])
    model.eval()
    norm.activate(0)
    expected = nn.functional.batch_norm(
        model[0](x), first["running_mean"], first["running_var"], first["weight"], first["bias"]
    )
    torch.testing.assert_close(model(x), expected)
    norm.activate(None)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(UnknownNameError, match="task 7 has no normalisation of its own; there is one for 0, 1"):
        norm.activate(7)


def test_a_fresh_layer_takes_the_structure_of_what_it_loads() -> None:
    old, new = TaskNorm(nn.BatchNorm1d(2)), TaskNorm(nn.BatchNorm1d(2))
    for task in (*range(9), 10):
        old.add(task)
        old(torch.rand(4, 2) * task)
    new.load_state_dict(old.state_dict())
    assert list(new.norms) == [*(f"task_{i}" for i in range(9)), "task_10"]
    assert all(torch.equal(v, new.state_dict()[k]) for k, v in old.state_dict().items())
    assert len({id(norm) for norm in new.norms.values()}) == 10
    old.load_state_dict(TaskNorm(nn.BatchNorm1d(2)).state_dict())
    assert list(old.norms) == ["start"]


def test_what_was_frozen_or_keeps_nothing_is_left_to_all_tasks_and_splitting_twice_changes_nothing() -> None:
    frozen = nn.BatchNorm1d(4).eval().requires_grad_(False)
    model = nn.Sequential(frozen, nn.BatchNorm1d(4), nn.InstanceNorm1d(4), nn.LayerNorm(4))
    split_norms(model)
    split_norms(model)
    assert [type(m).__name__ for m in model] == ["BatchNorm1d", "TaskNorm", "InstanceNorm1d", "LayerNorm"]
    assert type(model[1].norms["start"]) is nn.BatchNorm1d
