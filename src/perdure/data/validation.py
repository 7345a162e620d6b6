"""Arrays that are fit to be examples: tensors, without NaN, with class labels from 0."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perdure.errors import DataError


def to_tensor(values: Any, what: str) -> Tensor:
    """Return `values` as a tensor on the CPU, sharing memory where that is possible; float64 of NumPy becomes float32.

    Raises
    ------
    DataError
        If they are no rectangular array of numbers.
    """
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        array = np.asarray(values, order="C")
        if array.dtype == np.float64:
            with np.errstate(over="ignore"):
                array = array.astype(np.float32)
        with warnings.catch_warnings():
            # A read-only array (a memory map) is only ever read here, so torch's warning would mislead.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise DataError(f"the {what} cannot be made a tensor: {error}") from error


def check_inputs(values: Any) -> Any:
    """Return inputs, an array or a dictionary of arrays, as tensors with one row an example.

    Raises
    ------
    DataError
        If they are no numbers, or a float is NaN or infinite.
    """
    if isinstance(values, dict):
        return {key: check_inputs(value) for key, value in values.items()}
    x = to_tensor(values, "inputs")
    if x.ndim == 0:
        raise DataError(f"the inputs are a single number, {x.item()}; one row an example is needed")
    check_finite(x, "inputs")
    return x


def check_targets(values: Any) -> Tensor:
    """Return targets as int64 labels from 0, or as floats for regression.

    Raises
    ------
    DataError
        If they are no numbers, a float is NaN or infinite, or a label is negative.
    """
    y = to_tensor(values, "targets")
    if y.ndim == 0:
        raise DataError(f"the targets are a single number, {y.item()}; one an example is needed")
    if y.is_floating_point():
        check_finite(y, "targets")
        return y
    y = y.to(torch.int64)
    if y.ndim == 1 and len(y) and int(y.min()) < 0:
        row = int((y < 0).nonzero()[0])
        raise DataError(f"the target of row {row} is {int(y[row])}; class labels are integers from 0")
    return y


def check_finite(values: Tensor, what: str) -> None:
    """Raise a `DataError` that names the first row of `values` [N, ...] with a NaN or an infinity, if there is one."""
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values.reshape(len(values), -1)).all(1)).nonzero()[0])
        kind = "a NaN" if bool(torch.isnan(values[row]).any()) else "an infinity"
        raise DataError(f"the {what} have {kind} in row {row}; remove or fill such values")
