"""Small data sets with random pixels, written in their publishers' formats."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np

from perdure.data.store import locate
from perdure.errors import DataError

TYPE_CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}
NAMES = ("mnist", "fashion_mnist", "cifar10", "cifar100")


def idx_bytes(values: np.ndarray) -> bytes:
    header = bytes([0, 0, TYPE_CODES[values.dtype.name], values.ndim]) + np.array(values.shape, ">u4").tobytes()
    return header + values.astype(values.dtype.newbyteorder(">")).tobytes()


def write_idx_set(folder: Path, seed: int, train: int = 120, test: int = 40) -> None:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for prefix, count in (("train", train), ("t10k", test)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images), 1))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


def write_cifar(root: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)

    def records(labels: list[np.ndarray]) -> bytes:
        pixels = draw.integers(0, 256, (len(labels[0]), 3072), dtype=np.uint8)
        return np.concatenate([np.stack(labels, 1).astype(np.uint8), pixels], 1).tobytes()

    ten = root / "cifar10" / "cifar-10-batches-bin"
    ten.mkdir(parents=True)
    for file in [f"data_batch_{part}.bin" for part in range(1, 6)] + ["test_batch.bin"]:
        (ten / file).write_bytes(records([np.arange(20) % 10]))
    (ten / "batches.meta.txt").write_text("\n".join(f"thing {label}" for label in range(10)) + "\n\n")
    hundred = root / "cifar100" / "cifar-100-binary"
    hundred.mkdir(parents=True)
    for file, count in (("train.bin", 300), ("test.bin", 100)):
        fine = draw.permutation(np.arange(count) % 100)
        (hundred / file).write_bytes(records([fine * 7 % 20, fine]))
    (hundred / "fine_label_names.txt").write_text("\n".join(f"fine {label}" for label in range(100)) + "\n")
    (hundred / "coarse_label_names.txt").write_text("\n".join(f"coarse {label}" for label in range(20)) + "\n")


def write_all(root: Path) -> Path:
    write_idx_set(root / "mnist", seed=1)
    write_idx_set(root / "fashion_mnist", seed=2)
    write_cifar(root, seed=3)
    return root


def published() -> list[str]:
    """The data sets that lie in PERDURE_DATA."""

    def there(name: str) -> bool:
        try:
            locate(name)
        except DataError:
            return False
        return True

    return [name for name in NAMES if there(name)] if os.environ.get("PERDURE_DATA") else []
