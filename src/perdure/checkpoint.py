"""State on disk: a tree of plain values and tensors becomes `state.json` beside `tensors.safetensors`, never pickle.

A checkpoint is a folder. It is written under another name, flushed to disk and renamed, so it is there as a whole or
not at all; all files carry checksums, so damage anywhere is noticed before anything is loaded.

A tensor that is itself a file (a column of a buffer with storage="mapped") becomes a further file, `rows-0.bin` and so
on: its filled rows are copied block by block, and come back as a file that is read where it is touched, so that neither
needs the memory for them. Every checkpoint has a copy of its own on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from perdure.errors import CheckpointError, StorageError
from perdure.mapped import blocks, is_mapped, row_bytes

FORMAT = 2  # with files of rows; without them, 1 is written
_STATE, _TENSORS = "state.json", "tensors.safetensors"


def save_state(path: str | Path, state: Any) -> None:
    """Write a tree of dictionaries, lists, tuples, plain values, tensors, arrays and generators to the folder `path`.

    An earlier checkpoint of the same name is replaced only once the new one is complete.

    Raises
    ------
    StorageError
        If the disk is full or the folder cannot be written; nothing half-written is left. If `path` is a file, or a
        folder with anything but a checkpoint in it.
    CheckpointError
        If the tree holds something that cannot be saved, with its place in the tree.
    """
    path = Path(path).absolute()
    _refuse_to_replace(path)
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "", tensors)
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({place: t for place, t in tensors.items() if not is_mapped(t)}, partial / _TENSORS)
        files = _write_rows({place: t for place, t in tensors.items() if is_mapped(t)}, partial)
        body = json.dumps(tree, sort_keys=True, allow_nan=True)
        head = {"format": 1, "kind": "perdure", "tensors_sha256": _digest(partial / _TENSORS)}
        if files:
            head |= {"format": FORMAT, "files": files}
        text = json.dumps(head | {"state_sha256": _digest_text(body, head), "state": body}, indent=1)
        (partial / _STATE).write_text(text, encoding="utf-8")
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
        _swap(partial, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"cannot save {path}: {_reason(error)}; free space or choose another folder") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def load_state(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Read what `save_state` wrote.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, it is damaged, was written by something else, or by a newer version.
    """
    path = Path(path)
    head = _read_head(path)
    if _digest_text(head["state"], head) != head["state_sha256"]:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {_STATE} does not match its checksum; load an earlier one"
        )
    sums = {_TENSORS: head["tensors_sha256"]}
    sums |= {entry["file"]: entry["sha256"] for entry in head.get("files", {}).values()}
    for name, expected in sums.items():
        try:
            found = _digest(path / name)
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} is incomplete: {_reason(error)}; load an earlier one") from error
        if found != expected:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} does not match its checksum; load an earlier one"
            )
    tensors = load_file(path / _TENSORS, device=str(device))
    tensors |= {place: _mapped_rows(path, entry).to(device) for place, entry in head.get("files", {}).items()}
    return _decode(json.loads(head["state"]), tensors)


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder looks like a checkpoint (its content may still be damaged)."""
    return (Path(path) / _STATE).is_file()


def _read_head(path: Path) -> dict[str, Any]:
    try:
        text = (path / _STATE).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no checkpoint: it has no {_STATE}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {_reason(error)}; load an earlier one") from error
    try:
        head = json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {_STATE} is not valid JSON; load an earlier one"
        ) from error
    if not isinstance(head, dict) or head.get("kind") != "perdure" or not isinstance(head.get("format"), int):
        raise CheckpointError(f"{path} was not written by perdure, or its {_STATE} is damaged")
    if head["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {head['format']}, this version reads up to {FORMAT}; install a newer perdure"
        )
    if not all(isinstance(head.get(key), str) for key in ("state", "state_sha256", "tensors_sha256")):
        raise CheckpointError(f"checkpoint {path} is damaged: {_STATE} lacks a part; load an earlier one")
    return head


# -- the tree ---------------------------------------------------------------------------------------------------------


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[place] = value.detach() if is_mapped(value) else value.detach().to("cpu").contiguous().clone()
        return {"$": "tensor", "at": place}
    if isinstance(value, torch.Generator):
        tensors[place] = value.get_state().clone()
        return {"$": "generator", "at": place}
    if isinstance(value, np.ndarray):
        tensors[place] = torch.from_numpy(np.ascontiguousarray(value)).clone()
        return {"$": "array", "at": place}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, f"{place}/{key}", tensors) for key, item in value.items()}
        pairs = [[_encode(k, f"{place}/{i}k", tensors), _encode(v, f"{place}/{i}", tensors)]
                 for i, (k, v) in enumerate(value.items())]  # fmt: skip
        return {"$": "dict", "items": pairs}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$": "tuple", "items": items}
    if isinstance(value, (set, frozenset)):
        return {"$": "set", "items": [_encode(item, place, tensors) for item in sorted(value)]}
    raise CheckpointError(
        f"'{place.lstrip('/')}' is a {type(value).__name__}, which cannot be saved; keep tensors and plain values, "
        "or name the attribute in `transient`"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("$")
    if kind is None:
        return {key: _decode(item, tensors) for key, item in value.items()}
    if kind in ("tensor", "generator"):
        return tensors[value["at"]]
    if kind == "array":
        return tensors[value["at"]].cpu().numpy()
    items = [_decode(item, tensors) for item in value["items"]]
    rebuild: dict[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "set": set, "dict": dict}
    return rebuild[kind](items)


# -- files ------------------------------------------------------------------------------------------------------------


def _write_rows(tensors: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """Write each tensor's bytes to a file of its own; returns what is needed to read them, by place in the tree."""
    found: dict[str, Any] = {}
    for number, (place, tensor) in enumerate(tensors.items()):
        name = f"rows-{number}.bin"
        with (folder / name).open("wb") as file:
            for part in blocks(len(tensor), row_bytes(tensor)):
                file.write(tensor[part].contiguous().view(-1).view(torch.uint8).numpy().data)
        dtype = str(tensor.dtype).removeprefix("torch.")
        found[place] = {
            "file": name, "dtype": dtype, "shape": list(tensor.shape), "sha256": _digest(folder / name)
        }  # fmt: skip
    return found


def _mapped_rows(folder: Path, entry: dict[str, Any]) -> Tensor:
    """The tensor in a file of rows, of which changes stay in memory."""
    shape, dtype = entry["shape"], getattr(torch, entry["dtype"])
    count = math.prod(shape)
    if not count:
        return torch.zeros(shape, dtype=dtype)
    return torch.from_file(str(folder / entry["file"]), shared=False, size=count, dtype=dtype).view(shape)


def _refuse_to_replace(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise StorageError(f"cannot save {path}: there is a file of that name; choose another folder")
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    others = [name for name in names if name not in (_STATE, _TENSORS) and not re.fullmatch(r"rows-\d+\.bin", name)]
    if others:
        raise StorageError(
            f"cannot save {path}: it holds '{others[0]}', which a checkpoint would replace; choose a folder of its own"
        )


def _swap(new: Path, path: Path) -> None:
    """Put the finished folder in place of an older one; at every moment one of them is there under a known name."""
    if not path.exists():
        os.replace(new, path)
        return
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest_text(body: str, head: dict[str, Any]) -> str:
    files = json.dumps(head["files"], sort_keys=True) + " " if "files" in head else ""
    return hashlib.sha256(f"{head['format']} {head['tensors_sha256']} {files}{body}".encode()).hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).splitlines()[0] if str(error) else type(error).__name__
