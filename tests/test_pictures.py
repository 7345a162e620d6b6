"""PNG files without an image library: other decoders read back what was written; runs keep what methods show."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import perdure
from perdure.methods import GenerativeReplay
from perdure.methods.base import Method
from perdure.pictures import grid, png, png_size, read_pictures, write_pictures
from perdure.results import Results
from perdure.streams.task import Task


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1), (300, 2)])
def test_a_decoder_reads_back_every_pixel(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    data = png(pixels)
    with Image.open(io.BytesIO(data)) as image:
        image.verify()
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == ("RGB" if len(shape) == 3 else "L")
        assert np.array_equal(np.asarray(image), pixels)
        assert png_size(data) == image.size


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_has_its_place_in_the_grid(channels: int) -> None:
    images = torch.rand(7, channels, 4, 6, generator=torch.Generator().manual_seed(0))
    sheet = grid(images, columns=3)
    assert sheet.shape[:2] == (3 * 5 - 1, 3 * 7 - 1)
    for k in range(7):
        top, left = k // 3 * 5, k % 3 * 7
        cell = sheet[top : top + 4, left : left + 6].reshape(4, 6, channels)
        assert np.array_equal(cell, (images[k] * 255).round().byte().permute(1, 2, 0).numpy())
    assert (sheet[10:, 7:] == 128).all(), "what is left over is grey"


def test_values_outside_are_clipped_and_what_is_no_number_is_black() -> None:
    image = torch.tensor([-1.0, 2.0, float("nan"), 0.5]).view(1, 1, 2, 2)
    assert grid(image).tolist() == [[0, 255], [0, 128]]


class Shows(Method):
    """Shows how many tasks it has seen end."""

    name = "shows"
    ended = 0

    def end_task(self, task: Task) -> None:
        self.ended += 1

    def pictures(self) -> Tensor | None:
        return None if self.ended == 2 else torch.full((4, 1, 3, 3), self.ended / 10)


def trained(folder: Path | None, **options: object) -> Results:
    stream = perdure.benchmarks.split_digits(seed=0)
    learner = perdure.Learner(perdure.models.MLP(64, [8], 10, seed=0), methods=[Shows()])
    results: Results = learner.fit(stream, steps=3, folder=folder, **options)
    return results


def test_a_run_keeps_what_its_methods_show_after_each_task(tmp_path: Path) -> None:
    results = trained(tmp_path)
    assert sorted(results.pictures["shows"]) == [0, 2, 3, 4]
    for task, data in results.pictures["shows"].items():
        assert (tmp_path / "pictures" / f"shows-{task + 1}.png").read_bytes() == data
        with Image.open(io.BytesIO(data)) as image:
            assert image.getpixel((0, 0)) == round((task + 1) / 10 * 255)
    assert Results.load(tmp_path).pictures == results.pictures
    assert "pictures" not in (tmp_path / "results.json").read_text()
    assert trained(None).pictures == results.pictures


def test_saved_elsewhere_and_read_again(tmp_path: Path) -> None:
    results = trained(None)
    results.save(tmp_path / "there")
    assert Results.load(tmp_path / "there" / "results.json").pictures == results.pictures
    write_pictures(tmp_path, {"a-b": {11: b"x"}})
    assert read_pictures(tmp_path) == {"a-b": {11: b"x"}}


def test_a_new_run_forgets_those_of_an_earlier_one_and_a_resumed_one_does_not(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"other": {0: b"old"}})
    results = trained(tmp_path)
    assert set(read_pictures(tmp_path)) == {"shows"}
    last = tmp_path / "pictures" / "shows-5.png"
    last.unlink()
    (tmp_path / "results.json").unlink()
    newest = sorted((tmp_path / "checkpoint").iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()  # as if it had been killed after the fourth task
    again = trained(tmp_path, resume=True)
    assert again.pictures.keys() == results.pictures.keys()
    assert again.pictures["shows"] == results.pictures["shows"]


def test_looking_at_generated_images_changes_nothing() -> None:
    stream = perdure.benchmarks.split_digits(seed=0)
    weights = []
    for looks in (0, 3):
        method = GenerativeReplay(hidden=(8,), latent=2)
        learner = perdure.Learner(perdure.models.MLP(64, [8], 10, seed=0), methods=[method])
        learner.adopt(stream)
        for task in stream[:3]:
            learner.fit_task(task, steps=4)
            seen = [method.pictures() for _ in range(looks)]
            assert all(torch.equal(each, seen[0]) for each in seen)  # type: ignore[arg-type]
        weights.append((learner.parameters.theta.clone(), method.state_dict()["maker"]["vae"]))
    assert torch.equal(weights[0][0], weights[1][0])
    assert all(torch.equal(value, weights[1][1][name]) for name, value in weights[0][1].items())


def test_images_are_in_the_order_of_the_classes_that_the_model_sees() -> None:
    stream = perdure.benchmarks.split_digits(seed=0)
    method = GenerativeReplay(hidden=(32,), latent=4, lr=0.01)
    learner = perdure.Learner(perdure.models.MLP(64, [16], 10, seed=0), methods=[method])
    learner.adopt(stream)
    learner.fit_task(stream[0], steps=60)
    images = method.pictures()
    assert images is not None
    found = learner.predict(images).tolist()
    assert found == sorted(found)
    assert set(found) == {0, 1}


def test_flat_features_are_nothing_to_see() -> None:
    method = GenerativeReplay(hidden=(4,), latent=2)
    learner = perdure.Learner(torch.nn.Linear(6, 2), methods=[method])
    learner.fit_task("a", (torch.rand(8, 6), torch.arange(8) % 2))
    assert method.pictures() is None
