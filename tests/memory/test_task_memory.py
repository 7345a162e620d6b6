"""The memory of finished tasks: what a saved one finds when it is loaded on another machine."""

from __future__ import annotations

import torch

from perdure.memory.task_memory import TaskMemory


def of_one_task(device: str) -> TaskMemory:
    memory = TaskMemory(0)
    memory.open(0, 4)
    memory.add({"x": torch.rand(4, 2, device=device), "y": torch.zeros(4, dtype=torch.int64, device=device), "task": 0})
    memory.close()
    return memory


def devices(columns: dict[str, torch.Tensor]) -> list[str]:
    return [str(columns[name].device) for name in ("x", "y", "task")]


def test_every_column_returns_to_its_own_device_and_is_drawn_with_those_of_later_tasks() -> None:
    """Inputs are on an accelerator ("meta" stands for it here), task numbers on the CPU."""
    saved = of_one_task("meta").state_dict()
    loaded = TaskMemory(0)
    loaded.load_state_dict(saved)
    assert devices(loaded.finished[0]) == devices(saved["finished"][0]) == ["meta", "meta", "cpu"]
    loaded.open(1, 4)
    loaded.add({"x": torch.rand(4, 2, device="meta"), "y": torch.zeros(4, dtype=torch.int64, device="meta"), "task": 1})
    loaded.close()
    drawn = loaded.draw(8, torch.Generator())
    assert drawn is not None
    assert sorted(drawn["task"].tolist()) == [0] * 4 + [1] * 4


def test_what_was_saved_on_a_device_that_is_missing_here_lies_on_the_cpu() -> None:
    saved = of_one_task("cpu").state_dict()
    saved["devices"] = {"x": f"cuda:{torch.cuda.device_count()}", "y": "cpu", "task": "cpu"}
    loaded = TaskMemory(0)
    loaded.load_state_dict(saved)
    assert devices(loaded.finished[0]) == ["cpu"] * 3
    assert loaded.finished[0]["x"].data_ptr() != saved["finished"][0]["x"].data_ptr()


def test_later_tasks_join_the_first_where_it_lies() -> None:
    """A run that was begun on the CPU and goes on elsewhere."""
    memory = of_one_task("meta")
    memory.open(1, 4)
    memory.add({"x": torch.rand(4, 2), "y": torch.ones(4, dtype=torch.int64), "task": 1})
    memory.close()
    assert devices(memory.finished[1]) == ["meta", "meta", "cpu"]
    assert memory.draw(8, torch.Generator()) is not None
