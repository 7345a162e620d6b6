"""The UCI optical digits that come with perdure: 1,797 images of 8 x 8, no download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
doi 10.24432/C50P49, CC BY 4.0 (see `digits.LICENSE.txt`).
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch

from perdure.data.arrays import Arrays

TEST_PER_CLASS = 50


def read_digits() -> Arrays:
    """Return the digits: x uint8 [1297, 8, 8] with values 0 to 16, y int64; and 500 test images, 50 of every class.

    The split is fixed: of the n images of a class, in the order of publication, those at positions
    floor((2 k + 1) n / 100) for k = 0, ..., 49 are the test images, so both parts cover all writers alike.

    >>> digits = read_digits()
    >>> digits.x.shape, digits.x_test.shape, digits.x.dtype
    (torch.Size([1297, 8, 8]), torch.Size([500, 8, 8]), torch.uint8)
    """
    with (files("perdure.data") / "digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"].astype(np.int64)
    held_out = np.zeros(len(labels), bool)
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        held_out[rows[(2 * np.arange(TEST_PER_CLASS) + 1) * len(rows) // (2 * TEST_PER_CLASS)]] = True
    return Arrays(
        x=torch.from_numpy(images[~held_out]),
        y=torch.from_numpy(labels[~held_out]),
        x_test=torch.from_numpy(images[held_out]),
        y_test=torch.from_numpy(labels[held_out]),
        class_names=tuple(map(str, range(10))),
    )
