from __future__ import annotations

import gzip
import re
import shutil
from pathlib import Path

import pytest
import synthetic_data as synthetic
import torch

from perdure.data.catalog import DataSet
from perdure.data.store import content_checksum, data_root, load, locate, verify
from perdure.errors import DataError, UnknownNameError
from perdure.registry import datasets

PLACES = [(name, "synthetic") for name in synthetic.NAMES] + [(name, "published") for name in synthetic.published()]


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_a_data_set_is_what_the_catalogue_says(name: str, place: str, synthetic_root: Path) -> None:
    entry: DataSet = datasets.get(name)
    arrays = load(name, synthetic_root if place == "synthetic" else None)
    assert arrays.x_test is not None
    assert arrays.y_test is not None
    for x, y, count in ((arrays.x, arrays.y, entry.train), (arrays.x_test, arrays.y_test, entry.test)):
        assert x.dtype == torch.uint8
        assert y.dtype == torch.int64
        assert tuple(x.shape[1:]) == entry.shape
        assert y.unique().tolist() == list(range(entry.classes))
        assert len(x) == len(y)
        if place == "published":
            assert len(y) == count
    assert len(arrays.class_names) == entry.classes
    if name == "cifar100":
        assert sorted(arrays.groups) == sorted(list(range(20)) * 5)
        assert len(arrays.group_names) == 20


@pytest.mark.parametrize("name", ["digits", *synthetic.published()])
def test_published_content_is_verified(name: str) -> None:
    assert verify(name) == locate(name)


def test_other_content_is_not_what_was_published(synthetic_root: Path) -> None:
    with pytest.raises(DataError, match=r"the training part of 'mnist' in .* should have 60,000 rows but has 120"):
        verify("mnist", synthetic_root)


def test_the_content_checksum_ignores_order_and_sees_every_value() -> None:
    x, y = torch.arange(24, dtype=torch.uint8).view(6, 2, 2), torch.arange(6)
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    assert content_checksum(x[order], y[order]) == content_checksum(x, y)
    assert content_checksum(x[order], y) != content_checksum(x, y)
    changed = x.clone()
    changed[5, 1, 1] += 1
    assert content_checksum(changed, y) != content_checksum(x, y)


def test_root_comes_before_the_environment_before_the_cache(
    synthetic_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PERDURE_DATA", str(tmp_path / "environment"))
    assert data_root("here") == Path("here")
    assert data_root() == tmp_path / "environment"
    monkeypatch.delenv("PERDURE_DATA")
    assert data_root() == tmp_path / "cache" / "perdure"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_root() == Path.home() / ".cache" / "perdure"


def test_the_set_is_found_in_its_own_folder_and_in_the_folder_of_all(synthetic_root: Path, tmp_path: Path) -> None:
    mnist = synthetic_root / "mnist"
    assert locate("mnist", synthetic_root) == mnist
    assert locate("mnist", mnist) == mnist
    assert locate("cifar10", synthetic_root / "cifar10") == synthetic_root / "cifar10"
    shutil.copytree(mnist, tmp_path / "MNIST" / "raw")
    assert locate("mnist", tmp_path) == tmp_path / "MNIST" / "raw"


def test_files_of_another_set_with_the_same_names_are_not_taken_for_it(synthetic_root: Path) -> None:
    with pytest.raises(DataError):
        locate("mnist", synthetic_root / "fashion_mnist")


def test_missing_data_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load("mnist", tmp_path)
    assert str(caught.value) == (
        f"data set 'mnist' is not in {tmp_path}; run 'perdure data get mnist' or pass --data-root / set PERDURE_DATA"
    )
    with pytest.raises(UnknownNameError, match="did you mean 'mnist'"):
        load("mnits", tmp_path)


def test_parts_that_do_not_fit_are_named(synthetic_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    shutil.copytree(synthetic_root / "mnist", folder)
    labels = folder / "train-labels-idx1-ubyte"
    content = labels.read_bytes()
    labels.write_bytes(content[:7] + bytes([119]) + content[8:-1])
    with pytest.raises(DataError, match=r"has 120 images but '.*' 119 labels"):
        load("mnist", tmp_path)
    labels.write_bytes(content[:-1] + bytes([10]))
    with pytest.raises(DataError, match="should have labels from 0 to 9 but has 10"):
        load("mnist", tmp_path)
    images = folder / "t10k-images-idx3-ubyte.gz"
    images.write_bytes(gzip.compress(gzip.decompress(images.read_bytes())[:5000]))
    labels.write_bytes(content)
    with pytest.raises(DataError, match=f"'{re.escape(str(images))}' should hold 31,376 bytes"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", datasets.names())
def test_every_entry_is_complete(name: str) -> None:
    entry: DataSet = datasets.get(name)
    assert entry.description
    assert entry.licence
    assert entry.citation
    assert entry.homepage.startswith("http")
    assert all(re.fullmatch("[0-9a-f]{64}", checksum) for checksum in entry.content)
    for remote in entry.remotes:
        assert re.fullmatch("[0-9a-f]{64}", remote.sha256)
        assert len(remote.mirrors) > 1
        assert all(url.endswith(remote.file) for url in remote.mirrors)
