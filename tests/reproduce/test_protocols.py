"""Published numbers on real MNIST: two cheap rows in every test run, everything else with `-m slow`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from perdure.experiments.protocol import choose_rows, protocol_names, protocol_of
from perdure.experiments.reproduce import reproduce

ROWS = [(name, row) for name in protocol_names() for row in protocol_of(name).rows]


def mnist_is_here() -> bool:
    return (Path(os.environ.get("PERDURE_DATA", "")) / "mnist").is_dir()


pytestmark = pytest.mark.skipif(not mnist_is_here(), reason="needs MNIST: set PERDURE_DATA to the folder that holds it")


def check(name: str, rows: list[str], folder: Path, seeds: int | None) -> None:
    protocol = protocol_of(name)
    found = reproduce([protocol], choose_rows([protocol], rows), folder, seeds=seeds)
    for row in found.to_dict()["rows"]:
        assert row["inside"] is not False, row


def test_one_seed_of_three_rows_of_split_mnist_is_inside_its_band(tmp_path: Path) -> None:
    check("der-split-mnist", ["sgd", "er-500", "derpp-200"], tmp_path, 1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("name", "row"), ROWS)
def test_every_row_is_inside_its_band(name: str, row: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(name, [row], tmp_path_factory.getbasetemp() / "reproduce", None)
