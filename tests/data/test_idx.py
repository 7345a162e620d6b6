from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from synthetic_data import TYPE_CODES, idx_bytes

from perdure.data.idx import read_idx
from perdure.errors import DataError


@given(
    values=st.sampled_from(sorted(TYPE_CODES)).flatmap(
        lambda dtype: arrays.arrays(dtype, arrays.array_shapes(max_dims=3, min_side=0, max_side=4))
    ),
    zipped=st.booleans(),
)
def test_what_was_written_is_read(values: np.ndarray, zipped: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("idx") / "values"
    content = idx_bytes(values)
    path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    read = read_idx(path)
    assert read.numpy().dtype == values.dtype
    np.testing.assert_array_equal(read.numpy(), values)


def test_reads_a_hand_made_file(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2, 1, 2, 3, 255]))
    assert torch.equal(read_idx(path, 3), torch.tensor([[[1, 2]], [[3, 255]]], dtype=torch.uint8))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "starts with nothing"),
        (b"\x89PNG\r\n", "starts with 89 50 4e 47"),
        (bytes([0, 0, 7, 1]), "is not an idx file"),
        (bytes([0, 0, 8, 3, 0, 0]), "it is cut off or damaged"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 5, 1, 2]), "should hold 13 bytes for its shape [5] but holds 10"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 1, 1, 2]), "should hold 9 bytes for its shape [1] but holds 10"),
        (gzip.compress(bytes(1000), mtime=0)[:-9], "complete gzip file"),
    ],
)
def test_damage_is_named(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert sentence in str(caught.value)


def test_labels_in_the_place_of_images_have_the_wrong_magic_number(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 5]))
    with pytest.raises(DataError, match=r"should have 3 dimensions .* but has 1 \(00 00 08 01\)"):
        read_idx(path, 3)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read '.*nowhere': no such file"):
        read_idx(tmp_path / "nowhere")
