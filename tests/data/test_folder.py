from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.data.folder import read_folder
from perdure.data.source import read_path
from perdure.errors import DataError, MissingExtraError


def save(path: Path, shape: tuple[int, ...] = (4, 6), value: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (np.arange(np.prod(shape)).reshape(shape) + value).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_grey_images_keep_their_bytes_and_folders_are_the_classes(tmp_path: Path) -> None:
    first = save(tmp_path / "cat" / "1.png", value=7)
    second = save(tmp_path / "ant" / "1.png", value=90)
    save(tmp_path / "ant" / "notes.txt.png")
    (tmp_path / "ant" / "notes.txt").write_text("not an image, not read")
    (tmp_path / ".hidden").mkdir()
    data = read_folder(tmp_path)
    assert data.class_names == ("ant", "cat")
    assert data.y.tolist() == [0, 0, 1]
    assert data.x.dtype == torch.uint8
    assert data.x.shape == (3, 4, 6)
    assert np.array_equal(data.x[0].numpy(), second)
    assert np.array_equal(data.x[2].numpy(), first)
    assert data.x_test is None


def test_colour_puts_channels_first_and_greys_join_as_equal_channels(tmp_path: Path) -> None:
    colour = save(tmp_path / "a" / "1.png", (4, 6, 3))
    grey = save(tmp_path / "b" / "1.png", (4, 6))
    x = read_folder(tmp_path).x
    assert np.array_equal(x[0].permute(1, 2, 0).numpy(), colour)
    assert all(np.array_equal(x[1, channel].numpy(), grey) for channel in range(3))


def test_train_and_test_folders_are_the_parts(tmp_path: Path) -> None:
    for part, value in (("train", 1), ("test", 2)):
        for kind in ("a", "b"):
            save(tmp_path / part / kind / "1.png", value=value)
    data = read_path(tmp_path)
    assert data.x_test is not None
    assert data.y_test is not None
    assert (int(data.x[0, 0, 0]), int(data.x_test[0, 0, 0])) == (1, 2)
    assert data.class_names == ("a", "b")
    save(tmp_path / "test" / "c" / "1.png")
    with pytest.raises(DataError, match=r"'.*c' is a class that the training images lack; their classes are a, b"):
        read_folder(tmp_path)


def test_other_sizes_need_size_which_resizes_all(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png", (4, 6))
    save(tmp_path / "a" / "2.png", (8, 8))
    with pytest.raises(DataError, match=r"2\.png' is 8 x 8 pixels but '1\.png' is 4 x 6; pass size="):
        read_folder(tmp_path)
    assert read_folder(tmp_path, size=(4, 6)).x.shape == (2, 4, 6)
    assert read_folder(tmp_path, size=5).x.shape == (2, 5, 5)


def test_broken_images_are_named(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png", (64, 64))
    (tmp_path / "a" / "2.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2\.jpg' is not an image that can be read"):
        read_folder(tmp_path)
    content = (tmp_path / "a" / "1.png").read_bytes()
    (tmp_path / "a" / "2.jpg").unlink()
    (tmp_path / "a" / "3.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"3\.png' is damaged or cut off"):
        read_folder(tmp_path)


def test_empty_and_unreadable_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="should hold one folder a class"):
        read_folder(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=r"'.*a' should hold \.png or \.jpg images but holds none"):
        read_folder(tmp_path)
    with pytest.raises(DataError, match=r"cannot read the image folder '.*nowhere': no such file"):
        read_folder(tmp_path / "nowhere")

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"cannot read the image folder '.*': permission denied"):
        read_folder(tmp_path)


def test_without_pillow_the_install_command_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a" / "1.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'perdure\[images\]'"):
        read_folder(tmp_path)


def test_paths_that_are_nothing_known_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_path(tmp_path / "nothing.csv")
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(DataError, match=r"is neither a .csv or .tsv file nor a folder"):
        read_path(tmp_path / "notes.md")
