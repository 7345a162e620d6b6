from __future__ import annotations

import torch

from perdure.data.digits import read_digits


def test_the_split_is_stratified_complete_and_fixed() -> None:
    digits, again = read_digits(), read_digits()
    assert digits.x_test is not None
    assert digits.y_test is not None
    assert torch.bincount(digits.y_test).tolist() == [50] * 10
    assert torch.bincount(torch.cat([digits.y, digits.y_test])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180
    ]  # fmt: skip
    assert torch.equal(digits.x, again.x)
    assert torch.equal(digits.y, again.y)


def test_pixels_are_bytes_from_0_to_16_and_no_test_image_is_a_training_image() -> None:
    digits = read_digits()
    assert digits.x_test is not None
    assert digits.x.dtype == torch.uint8
    assert (int(digits.x.min()), int(digits.x.max())) == (0, 16)
    train = {image.numpy().tobytes() for image in digits.x}
    assert not train & {image.numpy().tobytes() for image in digits.x_test}


def test_the_images_show_the_digits() -> None:
    digits = read_digits()
    assert digits.x_test is not None
    assert digits.y_test is not None
    means = torch.stack([digits.x[digits.y == digit].float().mean(0).flatten() for digit in range(10)])
    nearest = torch.cdist(digits.x_test.flatten(1).float(), means).argmin(1)
    assert (nearest == digits.y_test).float().mean() > 0.85
