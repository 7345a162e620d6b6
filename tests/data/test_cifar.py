from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from perdure.data.cifar import read_cifar, read_names
from perdure.errors import DataError


def record(labels: list[int], first_pixel: int = 0) -> bytes:
    return bytes(labels) + (np.arange(3072) + first_pixel).astype(np.uint8).tobytes()


def test_planes_are_red_green_blue_by_rows_and_files_are_joined_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    paths[0].write_bytes(record([3]) + record([1], 5))
    paths[1].write_bytes(record([9], 7))
    images, labels = read_cifar(paths, limits=(10,))
    assert images.dtype == torch.uint8
    assert images.shape == (3, 3, 32, 32)
    assert labels[:, 0].tolist() == [3, 1, 9]
    assert [int(value) for value in images[0, :, 1, 2]] == [(plane * 1024 + 34) % 256 for plane in range(3)]
    assert images[:, 0, 0, 0].tolist() == [0, 5, 7]


def test_both_label_bytes_of_cifar100_are_read(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(record([19, 99]) + record([0, 4]))
    images, labels = read_cifar([path], limits=(20, 100))
    assert labels.tolist() == [[19, 99], [0, 4]]
    assert int(images[1, 0, 0, 1]) == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (record([1])[:-1], "are 0 records and 3,072 bytes"),
        (record([1]) + b"x", "are 1 records and 1 bytes"),
        (b"", "its 0 bytes"),
        (record([10]), "labels from 0 to 9 in byte 0 of its records but has 10"),
    ],
)
def test_damage_is_named(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "test_batch.bin"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_cifar([path], limits=(10,))
    assert str(path) in str(caught.value)
    assert sentence in str(caught.value)


def test_names_skip_blank_lines_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("cat\ndog\n\n")
    assert read_names(path, 2) == ("cat", "dog")
    assert read_names(tmp_path / "none.txt", 2) == ("0", "1")
    with pytest.raises(DataError, match="should hold 3 class names but holds 2"):
        read_names(path, 3)
