"""Tables as csv or tsv: numeric feature columns, a target column and perhaps a column that names the domain."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from os import PathLike, fspath

import numpy as np
import torch
from torch import Tensor

from perdure.data.arrays import Arrays
from perdure.data.files import read_text
from perdure.errors import DataError
from perdure.registry import nearest

USUAL_TARGETS = ("target", "label", "class", "y")


def read_table(
    path: str | PathLike[str],
    *,
    target: str | None = None,
    domain: str | None = None,
    ignore: Sequence[str] = (),
    regression: bool | None = None,
) -> Arrays:
    """Return a csv or tsv file (gzipped or not, one header row) as features float32 [N, d] and targets [N].

    Parameters
    ----------
    target
        The column to predict; default: the one called target, label, class or y. Whole numbers and words are classes
        (numbered in numeric or alphabetical order), numbers with a fraction make it a regression.
    domain
        A column that says which domain or task a row belongs to; domains are numbered as they first appear.
    ignore
        Columns that are no features.
    regression
        Whether the target is a quantity; default: only if it has numbers with a fraction.

    Raises
    ------
    DataError
        If the file cannot be read, a column is missing, a row has another number of fields than the header, or a
        feature is not a finite number.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "flowers.csv"
    >>> _ = path.write_text("length,width,kind\\n1.5,2,rose\\n3,4,lily\\n")
    >>> table = read_table(path, target="kind")
    >>> table.x, table.y, table.class_names
    (tensor([[1.5000, 2.0000],
            [3.0000, 4.0000]]), tensor([1, 0]), ('lily', 'rose'))
    """
    name = fspath(path)
    columns = _columns(name)
    target = target if target is not None else _usual_target(name, list(columns))
    roles = {target, *ignore, *([] if domain is None else [domain])}
    for column in sorted(roles):
        if column not in columns:
            raise DataError(
                f"'{name}' has no column '{column}'{nearest(column, columns) or ';'} "
                f"its columns are {', '.join(columns)}"
            )
    features = [column for column in columns if column not in roles]
    if not features:
        raise DataError(f"'{name}' has no column left for the features beside {', '.join(sorted(roles))}")
    x = np.empty((len(columns[target]), len(features)), np.float32)
    for position, column in enumerate(features):
        x[:, position] = _numbers(name, column, columns[column])
    y, class_names = _targets(name, target, columns[target], regression)
    domains: Tensor | None = None
    domain_names: tuple[str, ...] = ()
    if domain is not None:
        domain_names = tuple(dict.fromkeys(columns[domain]))
        positions = {value: position for position, value in enumerate(domain_names)}
        domains = torch.tensor([positions[value] for value in columns[domain]])
    return Arrays(torch.from_numpy(x), y, class_names=class_names, domains=domains, domain_names=domain_names)


def _columns(name: str) -> dict[str, list[str]]:
    text = read_text(name)
    tabs = name.removesuffix(".gz").endswith(".tsv")
    # Tab-separated text has no quoting: a lone quotation mark in it is a character like any other.
    dialect = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL}
    )
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True, **dialect))  # type: ignore[arg-type]
    except csv.Error as error:
        raise DataError(f"'{name}' cannot be read as a table: {error}") from error
    rows = [(number, row) for number, row in enumerate(lines, 1) if row]
    if len(rows) < 2:
        raise DataError(
            f"'{name}' should have a header and at least one row but has {len(rows)} lines that are not empty"
        )
    header = [column.strip() for column in rows[0][1]]
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise DataError(f"'{name}' has more than one column '{repeated[0]}'; rename all but one")
    for number, row in rows[1:]:
        if len(row) != len(header):
            raise DataError(
                f"row {number} of '{name}' should have {len(header)} fields like the header but has {len(row)}"
            )
    values = zip(*(row for _, row in rows[1:]), strict=True)
    return {column: [value.strip() for value in entries] for column, entries in zip(header, values, strict=True)}


def _usual_target(name: str, columns: list[str]) -> str:
    usual = [column for column in columns if column.lower() in USUAL_TARGETS]
    if len(usual) != 1:
        raise DataError(
            f"which column of '{name}' is the target is not clear; pass target= as one of {', '.join(columns)}"
        )
    return usual[0]


def _numbers(name: str, column: str, entries: list[str]) -> np.ndarray:
    try:
        numbers = np.array(entries, np.float64)
    except ValueError:
        numbers = np.array([_number(entry) for entry in entries])
    with np.errstate(over="ignore"):
        wrong = np.flatnonzero(~np.isfinite(numbers.astype(np.float32)))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"column '{column}' of '{name}' has '{entries[row]}' in data row {row + 1}, which is not a finite number; "
            f"mend it, or leave the column out with ignore=['{column}']"
        )
    return numbers


def _number(entry: str) -> float:
    try:
        return float(entry)
    except ValueError:
        return float("nan")


def _targets(name: str, column: str, entries: list[str], regression: bool | None) -> tuple[Tensor, tuple[str, ...]]:
    numbers = np.array([_number(entry) for entry in entries])
    numeric = bool(np.isfinite(numbers).all())
    whole = numeric and bool((numbers == np.round(numbers)).all())
    if regression or (regression is None and numeric and not whole):
        return torch.from_numpy(_numbers(name, column, entries).astype(np.float32)), ()
    missing = next((row for row, entry in enumerate(entries) if entry.lower() in ("", "nan", "na")), None)
    if missing is not None:
        raise DataError(f"the target column '{column}' of '{name}' has no value in data row {missing + 1}; mend it")
    if whole:
        values, positions = np.unique(numbers.astype(np.int64), return_inverse=True)
    else:
        values, positions = np.unique(np.array(entries), return_inverse=True)
    return torch.from_numpy(positions.astype(np.int64).reshape(-1)), tuple(str(value) for value in values)
