"""Columns in files: the same bits as in memory, nothing left behind, and checkpoints that need no memory for them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch

import perdure
from perdure.checkpoint import load_state, save_state
from perdure.errors import CheckpointError, StorageError, UsageError
from perdure.mapped import is_mapped
from perdure.memory import Buffer
from perdure.memory.buffer import WRITING
from perdure.methods import DERpp, Replay
from perdure.saving import learner_state, load_learner_state
from perdure.streams.benchmarks import split_digits


def batch(start: int, count: int, width: int = 3) -> dict[str, torch.Tensor]:
    rows = torch.arange(start, start + count)
    images = torch.stack([rows % 256, rows // 256 % 256], 1).to(torch.uint8)
    logits = rows[:, None].repeat(1, width).float()
    loss = (rows * 37 % 101).float()
    return {
        "x": {"image": images, "flag": rows % 3 == 0},
        "y": rows % 7,
        "task": rows // 60,
        "logits": logits,
        "loss": loss,
    }


def same(one: Buffer, other: Buffer) -> bool:
    state, theirs = one.state_dict(), other.state_dict()
    flat = [(a, b) for a, b in zip(_leaves(state["columns"]), _leaves(theirs["columns"]), strict=True)]
    return all(torch.equal(a, b) for a, b in flat) and one.stats() == other.stats()


def _leaves(tree: object) -> list[torch.Tensor]:
    return perdure.tree.leaves(tree)


@pytest.mark.parametrize("writing", list(WRITING))
def test_files_and_memory_hold_the_same_bits_and_give_the_same_draws(writing: str, tmp_path: Path) -> None:
    memory = Buffer(31, writing=writing, seed=4)
    mapped = Buffer(31, writing=writing, seed=4, storage="mapped", folder=tmp_path / "rows")
    for step in range(40):
        for buffer in (memory, mapped):
            buffer.add(batch(9 * step, 9, width=3 if step < 20 else 5))
            if step in (12, 30):
                buffer.resize(17 if step == 12 else 40)
        one, two = memory.sample(8), mapped.sample(8)
        assert torch.equal(one["slot"], two["slot"])
        assert torch.equal(one["x"]["image"], two["x"]["image"])
    assert same(memory, mapped)
    assert all(is_mapped(leaf) for leaf in _leaves(mapped.columns))
    assert not any(is_mapped(leaf) for leaf in _leaves(memory.columns) + _leaves(mapped.sample(4)))
    slots = torch.tensor([2, 5])
    for buffer in (memory, mapped):
        buffer.update(slots, {"y": torch.tensor([3, 4])})
    assert same(memory, mapped)
    assert list((tmp_path / "rows").iterdir()) == []


def test_merging_from_files_into_memory_and_back(tmp_path: Path) -> None:
    results = []
    for storage in ("memory", "mapped"):
        folder = tmp_path if storage == "mapped" else None
        one, two = (Buffer(12, seed=seed, storage=storage, folder=folder) for seed in (1, 2))
        for start in range(0, 90, 9):
            one.add(batch(start, 9))
            two.add(batch(500 + start, 9, width=5))
        one.merge(two)
        results.append(one)
    assert same(*results)


@pytest.mark.parametrize("method", [partial(Replay, writing="herding"), DERpp])
def test_training_with_files_is_training_with_memory_and_resumes_to_the_same_bits(method, tmp_path: Path) -> None:
    def learner(folder: Path | None) -> perdure.Learner:
        own = method(capacity=40, folder=None if folder is None else str(folder))
        return perdure.Learner(perdure.models.MLP(64, [12], 10, seed=3), partial(torch.optim.SGD, lr=0.05), [own])

    stream = split_digits(scenario="class", seed=0)

    def run(each: perdure.Learner, since: tuple[int, int] = (0, 0), until: tuple[int, int] = (9, 9)) -> None:
        each.adopt(stream)
        for task in stream[since[0] : 3]:
            each.begin_task(task)
            for step, rows in enumerate(stream.plan(task, steps=6, batch_size=16)):
                if (task.index, step) == until:
                    return
                if (task.index, step) >= since:
                    each.step(*task.train.gather(rows), index=rows)
            each.end_task()

    memory, mapped, cut = learner(None), learner(tmp_path / "rows"), learner(tmp_path / "rows")
    run(memory)
    run(mapped)
    assert torch.equal(memory.parameters.theta, mapped.parameters.theta)
    run(cut, until=(2, 3))
    for _ in range(2):  # the second one takes the place of the first
        save_state(tmp_path / "state", learner_state(cut))
    assert {"rows-0.bin", "state.json", "tensors.safetensors"} <= {file.name for file in (tmp_path / "state").iterdir()}
    for folder in (tmp_path / "rows", None):
        other = learner(folder)
        load_learner_state(other, load_state(tmp_path / "state"))
        run(other, since=(2, 3))
        assert torch.equal(other.parameters.theta, memory.parameters.theta)
        assert all(is_mapped(leaf) == (folder is not None) for leaf in _leaves(other.methods[0].buffer.columns))


def saved(folder: Path, rows: int = 20) -> Buffer:
    buffer = Buffer(30, storage="mapped", folder=folder / "rows")
    buffer.add(batch(0, rows))
    save_state(folder / "state", {"buffer": buffer.state_dict()})
    return buffer


def test_a_checkpoint_holds_the_filled_rows_of_its_moment(tmp_path: Path) -> None:
    buffer = saved(tmp_path)
    files = [file for file in (tmp_path / "state").iterdir() if file.suffix == ".bin"]
    assert sum(file.stat().st_size for file in files) == 20 * buffer.row_bytes()
    buffer.update(torch.arange(20), {"y": torch.zeros(20, dtype=torch.int64)})
    state = load_state(tmp_path / "state")["buffer"]
    save_state(tmp_path / "state", {"buffer": buffer.state_dict()})
    restored = Buffer(30)
    restored.load_state_dict(state)  # from files that have been replaced since
    assert restored.view("y").tolist() == [row % 7 for row in range(20)]


def test_damage_to_a_file_of_rows_is_noticed(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "state" / "rows-1.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"rows-1\.bin does not match"):
        load_state(tmp_path / "state")
    file.unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        load_state(tmp_path / "state")


def test_a_checkpoint_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = saved(tmp_path)
    real = perdure.checkpoint._digest

    def full(file: Path) -> str:
        if file.name == "rows-2.bin":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file)

    buffer.add(batch(20, 5))
    with monkeypatch.context() as patch:
        patch.setattr(perdure.checkpoint, "_digest", full)
        with pytest.raises(StorageError, match="no space left"):
            save_state(tmp_path / "state", {"buffer": buffer.state_dict()})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["rows", "state"]
    assert load_state(tmp_path / "state")["buffer"]["filled"] == 20


def test_a_full_disk_is_an_error_when_the_space_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(StorageError, match="No space left on device; free space or choose another folder"):
        Buffer(10, storage="mapped", folder=tmp_path).add(batch(0, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_state_in_memory_can_be_loaded_twice() -> None:
    buffer = Buffer(10)
    buffer.add(batch(0, 50))
    state = buffer.state_dict()
    one, other = Buffer(10), Buffer(10)
    one.load_state_dict(state)
    one.add(batch(50, 500))
    other.load_state_dict(state)
    assert same(other, buffer)
    assert not same(other, one)


def test_arguments_are_checked(tmp_path: Path) -> None:
    for wrong in ({"storage": "mapped"}, {"folder": tmp_path}, {"storage": "disk", "folder": tmp_path}):
        with pytest.raises(UsageError, match="it must be 'memory' without a folder"):
            Buffer(3, **wrong)
    with pytest.raises(UsageError, match="mapped columns are on the CPU, not on cuda"):
        Buffer(3, storage="mapped", folder=tmp_path, device="cuda")
    with pytest.raises(UsageError, match="cannot move to cpu"):
        Buffer(3, storage="mapped", folder=tmp_path).to("cpu")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_buffer_of_files_and_its_checkpoint_need_no_memory_for_the_rows(tmp_path: Path) -> None:
    """128 MiB of rows are added, moved, saved and loaded with 48 MiB more of anonymous memory at the highest."""
    program = """
        import re, sys, threading, time
        from pathlib import Path
        import torch
        from perdure.checkpoint import load_state, save_state
        from perdure.memory import Buffer

        def held():
            return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

        folder = Path(sys.argv[1])
        x = torch.zeros(64, 1 << 17, dtype=torch.uint8)
        save_state(folder / "warm", {"a": torch.zeros(3)})
        start = highest = held()

        def watch():
            global highest
            while True:
                highest = max(highest, held())
                time.sleep(0.001)

        threading.Thread(target=watch, daemon=True).start()
        buffer = Buffer(1000, storage="mapped", folder=folder)
        for step in range(16):
            x[:] = step
            buffer.add({"x": x, "y": torch.full((64,), step)})
            if not step:
                buffer.resize(1024)
        save_state(folder / "state", buffer.state_dict())
        other = Buffer(1, storage="mapped", folder=folder)
        other.load_state_dict(load_state(folder / "state"))
        assert len(other) == 1024 and torch.equal(other.view("x")[:, 7].long(), other.view("y"))
        print(highest - start)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 48
