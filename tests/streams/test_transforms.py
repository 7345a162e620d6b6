from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perdure.errors import DataError, UsageError
from perdure.streams.transforms import Permute, Prepare, Rotate


def images(rows: int = 5, side: int = 9, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, side, side), dtype=torch.uint8, generator=draw)


TRANSFORMS = [Permute(torch.randperm(81, generator=torch.Generator().manual_seed(1))), Rotate(25.0)]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
def test_rows_are_changed_one_by_one_and_keep_dtype_and_shape(transform: Permute | Rotate) -> None:
    for x in (images(), images().float(), images(10).view(5, 2, 9, 9)[:, :1]):
        together = transform(x)
        assert together.dtype == x.dtype
        assert together.shape == x.shape
        assert torch.equal(together, torch.cat([transform(row[None]) for row in x]))
        assert not torch.equal(together, x)


@pytest.mark.parametrize("transform", [*TRANSFORMS, Prepare(16.0)], ids=repr)
def test_a_pickled_copy_is_equal_and_does_the_same(transform: Permute | Rotate | Prepare) -> None:
    copy = pickle.loads(pickle.dumps(transform))
    assert copy == transform
    assert hash(copy) == hash(transform)
    assert copy.describe() == transform.describe()
    assert torch.equal(copy(images()), transform(images()))
    assert transform not in (Permute(torch.arange(81)), Rotate(26.0), Prepare())


@given(size=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_a_permutation_holds_every_value_and_its_inverse_restores(size: int, seed: int) -> None:
    permute = Permute(torch.randperm(size, generator=torch.Generator().manual_seed(seed)))
    x = torch.arange(2 * size).view(2, size)
    assert torch.equal(permute(x).sort(dim=1).values, x)
    assert torch.equal(permute.inverse()(permute(x)), x)
    assert torch.equal(permute(x), x[:, permute.permutation])


def test_what_is_no_permutation_is_refused() -> None:
    with pytest.raises(UsageError, match=r"holds each of 0, ..., d - 1 once"):
        Permute(torch.tensor([0, 0, 1]))
    with pytest.raises(DataError, match="a permutation of 3 values cannot be applied to 4 a row"):
        Permute(torch.arange(3))(torch.zeros(2, 4))


@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4])
def test_quarter_turns_move_pixels_exactly(turns: int, side: int) -> None:
    x = images(side=side)
    assert torch.equal(Rotate(90.0 * turns)(x), torch.rot90(x, turns, (1, 2)))


def test_a_quarter_turn_of_an_oblong_image_keeps_its_scale() -> None:
    x = torch.zeros(1, 5, 9)
    x[0, 2, 3:6] = torch.tensor([1.0, 2.0, 3.0])
    turned = Rotate(90)(x)
    torch.testing.assert_close(turned[0, 1:4, 4], torch.tensor([3.0, 2.0, 1.0]), atol=1e-5, rtol=0)


@given(degrees=st.floats(-180, 180))
def test_the_centre_of_mass_turns_by_the_angle(degrees: float) -> None:
    x = torch.zeros(1, 1, 41, 41)
    x[0, 0, 17:24, 29:32] = 1.0
    turned = Rotate(degrees)(x)[0, 0]
    height, width = torch.meshgrid(20.0 - torch.arange(41), torch.arange(41) - 20.0, indexing="ij")
    angle = torch.rad2deg(torch.atan2((turned * height).sum(), (turned * width).sum()))
    difference = (float(angle) - degrees + 180) % 360 - 180
    assert abs(difference) < 0.5
    torch.testing.assert_close(turned.sum(), x.sum(), rtol=0.02, atol=0)


def test_there_and_back_again_is_nearly_the_image_inside() -> None:
    x = (torch.sin(torch.arange(40) / 5).view(-1, 1) + torch.cos(torch.arange(40) / 4)).unsqueeze(0)
    inside = (..., slice(12, 28), slice(12, 28))
    back, twice = Rotate(-20)(Rotate(20)(x)), Rotate(20)(Rotate(20)(x))
    assert (back - x)[inside].abs().max() < 0.05
    assert (twice - x)[inside].abs().max() > 0.5


def test_only_images_can_be_rotated() -> None:
    with pytest.raises(DataError, match=r"not inputs of shape \[4, 6\]"):
        Rotate(10)(torch.zeros(4, 6))


def test_prepare_divides_bytes_adds_channels_and_leaves_the_rest() -> None:
    x = images()
    assert torch.equal(Prepare()(x), (x.float() / 255).unsqueeze(1))
    assert torch.equal(Prepare(16)(x.view(5, 81)), x.view(5, 81).float() / 16)
    floats, integers = torch.rand(3, 4, 5), torch.arange(6).view(2, 3)
    assert Prepare()(floats) is floats
    tree = Prepare()({"pixels": x, "ids": integers})
    assert tree["ids"] is integers
    assert torch.equal(tree["pixels"], Prepare()(x))
