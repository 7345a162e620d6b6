from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perdure.data.table import read_table
from perdure.errors import DataError

FLOWERS = "length,width,kind,day\n1.5,2,rose,mon\n3,4e1,lily,tue\n-1,0,rose,mon\n"


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    path = tmp_path / "flowers.csv"
    path.write_text(FLOWERS)
    return path


def test_columns_take_their_roles(flowers: Path) -> None:
    table = read_table(flowers, target="kind", domain="day")
    assert torch.equal(table.x, torch.tensor([[1.5, 2.0], [3.0, 40.0], [-1.0, 0.0]]))
    assert table.class_names == ("lily", "rose")
    assert table.y.tolist() == [1, 0, 1]
    assert table.domain_names == ("mon", "tue")
    assert table.domains is not None
    assert table.domains.tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", ["t.tsv", "t.csv.gz", "t.tsv.gz", "bom.csv"])
def test_tabs_gzip_and_a_byte_order_mark_give_the_same_table(name: str, flowers: Path, tmp_path: Path) -> None:
    content = FLOWERS.replace(",", "\t") if ".tsv" in name else FLOWERS
    raw = content.encode("utf-8-sig" if name == "bom.csv" else "utf-8")
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert torch.equal(
        read_table(path, target="kind", ignore=["day"]).x, read_table(flowers, target="kind", ignore=["day"]).x
    )


@given(labels=st.lists(st.integers(-50, 50), min_size=1, max_size=20))
def test_whole_numbers_are_classes_in_numeric_order(
    labels: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("table") / "t.csv"
    path.write_text("a,target\n" + "".join(f"0,{label}\n" for label in labels))
    table = read_table(path)
    assert [int(table.class_names[position]) for position in table.y.tolist()] == labels
    assert list(map(int, table.class_names)) == sorted(set(labels))


def test_a_target_with_fractions_is_a_regression(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,y\n0,1.5\n1,2\n")
    table = read_table(path)
    assert table.class_names == ()
    assert torch.equal(table.y, torch.tensor([1.5, 2.0]))


def test_a_missing_column_names_it_the_columns_and_the_nearest(flowers: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_table(flowers, target="kinds")
    assert str(caught.value) == (
        f"'{flowers}' has no column 'kinds'; did you mean 'kind'? its columns are length, width, kind, day"
    )


@pytest.mark.parametrize(
    ("content", "arguments", "sentence"),
    [
        ("a,target\nnan,1\n", {}, "column 'a' of '.*' has 'nan' in data row 1, which is not a finite number"),
        ("a,target\n1,1\n,1\n", {}, "has '' in data row 2"),
        ("a,target\n1,1\n1e60,1\n", {}, "has '1e60' in data row 2"),
        ("a,b,target\n1,2,1\n1,x,1\n", {}, r"has 'x' in data row 2.*ignore=\['b'\]"),
        ("a,target\n1,1\n1\n", {}, "row 3 of '.*' should have 2 fields like the header but has 1"),
        ("a,a,target\n1,1,1\n", {}, "more than one column 'a'"),
        ("a,b\n1,1\n", {}, "which column of '.*' is the target is not clear; pass target= as one of a, b"),
        ("target\n1\n", {}, "has no column left for the features"),
        ("a,target\n", {}, "at least one row"),
        ("", {}, "at least one row"),
        ("a,target\n1,x\n2,\n", {}, "the target column 'target' of '.*' has no value in data row 2"),
        ("a,target\n1,1\n", {"domain": "day"}, "has no column 'day'"),
        ('a,target\n"1,1\n', {}, "cannot be read as a table"),
    ],
)
def test_bad_tables_are_refused(content: str, arguments: dict[str, str], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=sentence):
        read_table(path, **arguments)  # type: ignore[arg-type]


def test_a_quotation_mark_groups_fields_of_a_csv_and_is_a_character_of_a_tsv(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('a,target\n1,"big, red"\n2,"x"\n')
    (tmp_path / "t.tsv").write_text('a\ttarget\n1\t"big\n2\tx\n')
    assert read_table(tmp_path / "t.csv").class_names == ("big, red", "x")
    assert read_table(tmp_path / "t.tsv").class_names == ('"big', "x")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="should be UTF-8 text but byte 4 is not"):
        read_table(path)
