"""State on disk: complete or absent, and never taken for good when it is damaged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perdure.checkpoint import FORMAT, load_state, save_state
from perdure.errors import CheckpointError, StorageError
from perdure.folder import RunFolder, pack_predictions, unpack_predictions

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner)
    | st.dictionaries(st.integers(), inner),
    max_leaves=8,
)  # fmt: skip


@given(tree=plain)
def test_plain_trees_come_back_equal(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("state") / "c"
    save_state(path, tree)
    assert load_state(path) == tree


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_keep_dtype_shape_and_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    tree = {"a": [torch.arange(6).view(2, 3).to(dtype), torch.ones((), dtype=dtype), torch.empty(0, 4, dtype=dtype)]}
    save_state(tmp_path / "c", tree)
    for ours, theirs in zip(tree["a"], load_state(tmp_path / "c")["a"], strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)


def test_views_of_one_storage_generators_and_arrays(tmp_path: Path) -> None:
    storage = torch.arange(10.0)
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    save_state(
        tmp_path / "c", {"x": storage[:4], "y": storage[2:], "g": generator, "n": np.arange(3), "f": np.float64(2)}
    )
    loaded = load_state(tmp_path / "c")
    assert torch.equal(loaded["x"], storage[:4])
    assert torch.equal(loaded["y"], storage[2:])
    assert (loaded["n"] == np.arange(3)).all()
    twin = torch.Generator()
    twin.set_state(loaded["g"])
    assert torch.equal(torch.rand(2, generator=twin), torch.rand(2, generator=generator))


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'a/1' is a object.*transient"):
        save_state(tmp_path / "c", {"a": [1, object()]})
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_bit_and_every_truncation_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "c", {"weights": torch.arange(4.0), "step": 3})
    for file in sorted((tmp_path / "c").iterdir()):
        whole = file.read_bytes()
        for position in range(len(whole)):
            for bit in (0, 3, 5, 7):
                damaged = bytearray(whole)
                damaged[position] ^= 1 << bit
                file.write_bytes(damaged)
                with pytest.raises(CheckpointError):
                    load_state(tmp_path / "c")
            file.write_bytes(whole[:position])
            with pytest.raises(CheckpointError):
                load_state(tmp_path / "c")
        file.write_bytes(whole)
    assert load_state(tmp_path / "c")["step"] == 3


def test_foreign_missing_and_newer_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no state\.json"):
        load_state(tmp_path)
    (tmp_path / "state.json").write_text('{"weights": 1}')
    with pytest.raises(CheckpointError, match="not written by perdure"):
        load_state(tmp_path)
    save_state(tmp_path / "c", 1)
    head = json.loads((tmp_path / "c" / "state.json").read_text())
    (tmp_path / "c" / "state.json").write_text(json.dumps(head | {"format": FORMAT + 1}))
    with pytest.raises(CheckpointError, match="install a newer perdure"):
        load_state(tmp_path / "c")


def test_a_failed_save_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path / "c", {"step": 1})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("perdure.checkpoint.save_file", full)
    with pytest.raises(StorageError, match="no space left on device; free space"):
        save_state(tmp_path / "c", {"step": 2})
    assert load_state(tmp_path / "c") == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(StorageError, match="cannot save"):
        save_state(tmp_path / "f" / "c", {})


def test_run_folder_keeps_two_and_falls_back_with_a_warning(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    for step in (1, 2, 3):
        run.save(step, {"step": step})
    assert [p.name for p in run.saved()] == ["000000002", "000000003"]
    assert run.load() == {"step": 3}
    newest = run.saved()[-1] / "state.json"
    newest.write_bytes(newest.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="damaged.*continuing from 000000002"):
        assert run.load() == {"step": 2}
    (run.saved()[0] / "tensors.safetensors").unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        run.load()


def test_a_torn_last_log_line_is_dropped(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write({"event": "a"})
    run.write({"event": "b"})
    with run.log.open("a") as stream:
        stream.write('{"event": "c", "x')
    assert [e["event"] for e in run.events()] == ["a", "b"]
    run.truncate(1)
    assert run.log.read_text() == '{"event": "a"}\n'
    run.log.write_text('{"torn\n{"event": "a"}\n')
    with pytest.raises(CheckpointError, match="line 1"):
        run.events()


def test_predictions_round_trip() -> None:
    columns = np.array([0, 5, 999, 3], dtype=np.int16)
    text = pack_predictions(columns)
    assert (unpack_predictions(text) == columns).all()
    assert unpack_predictions(pack_predictions(None)) is None
