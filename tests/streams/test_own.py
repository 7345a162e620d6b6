from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.errors import DataError, UsageError
from perdure.streams.own import stream_from_path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "machines.csv"
    rows = [f"{row},{row * 2},{'abcd'[row % 4]},{'night' if row >= 24 else 'day'}" for row in range(40)]
    path.write_text("heat,speed,state,shift\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for part, count in (("train", 5), ("test", 2)):
        for position, kind in enumerate(("ant", "bee", "cat", "dog")):
            folder = tmp_path / "pictures" / part / kind
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(np.full((4, 4, 3), position * 10 + number, np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


def test_a_table_becomes_a_class_incremental_stream(table: Path) -> None:
    stream = stream_from_path(table, tasks=2, target="state", ignore=["shift"], class_order=[3, 1, 0, 2])
    assert stream.class_names == ("d", "b", "a", "c")
    assert [task.name for task in stream] == ["d, b", "a, c"]
    assert (stream.name, stream.scenario, stream.input_shape) == ("machines", "class", (2,))
    x, y = stream[1].train.gather(torch.arange(len(stream[1].train)))
    assert x.dtype == torch.float32
    assert [int(row) % 4 for row in x[:, 0]] == [stream.class_order[column] for column in y.tolist()]
    assert [len(task.train) for task in stream] == [16, 16]
    assert [len(task.test) for task in stream if task.test is not None] == [4, 4]
    json.dumps(stream.options)


def test_a_column_names_the_domains(table: Path) -> None:
    stream = stream_from_path(table, scenario="domain", target="state", domain="shift")
    assert [task.name for task in stream] == ["day", "night"]
    assert [task.classes for task in stream] == [(0, 1, 2, 3)] * 2
    assert (
        float(stream[0].train.x[stream[0].train.rows].max())
        < 48
        <= float(stream[1].train.x[stream[1].train.rows].max())
    )


def test_blocks_of_rows_keep_the_order_of_time(table: Path) -> None:
    stream = stream_from_path(table, scenario="domain", tasks=4, target="state", ignore=["shift"], domain="rows")
    assert [task.name for task in stream] == ["rows 0-9", "rows 10-19", "rows 20-29", "rows 30-39"]


def test_a_folder_brings_its_own_test_part_and_bytes(pictures: Path) -> None:
    stream = stream_from_path(pictures, scenario="task", classes_per_task=2)
    assert [task.name for task in stream] == ["ant, bee", "cat, dog"]
    x, y = stream[1].train.gather(torch.arange(10))
    assert x.dtype == torch.uint8
    assert y.tolist() == [2] * 5 + [3] * 5
    assert x[:, 0, 0, 0].tolist() == [20, 21, 22, 23, 24, 30, 31, 32, 33, 34]
    assert stream.input_shape == (3, 4, 4)
    assert stream[0].test is not None
    assert len(stream[0].test) == 4
    assert stream_from_path(pictures, tasks=2, size=8).input_shape == (3, 8, 8)


def test_the_stream_is_the_same_at_every_call(table: Path) -> None:
    def fingerprint(seed: int) -> str:
        return stream_from_path(table, tasks=2, target="state", ignore=["shift"], seed=seed).fingerprint()

    assert fingerprint(0) == fingerprint(0) != fingerprint(1)


def test_what_does_not_fit_is_refused(table: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="domain='shift' is for scenario='domain'"):
        stream_from_path(table, tasks=2, target="state", domain="shift")
    with pytest.raises(DataError, match=r"is not a finite number; .*ignore=\['shift'\]"):
        stream_from_path(table, tasks=2, target="state")
    with pytest.raises(DataError, match="has no column 'shft'; did you mean 'shift'"):
        stream_from_path(table, scenario="domain", target="state", domain="shft")
    with pytest.raises(DataError, match="is an image folder and has no column 'shift'"):
        stream_from_path(pictures, scenario="domain", domain="shift")
    with pytest.raises(UsageError, match="classes_per_task=2 splits classes but domain='rows' splits domains"):
        stream_from_path(table, scenario="domain", target="state", ignore=["shift"], domain="rows", classes_per_task=2)
    with pytest.raises(DataError, match="does not exist"):
        stream_from_path(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="unknown scenario"):
        stream_from_path(table, scenario="time")
