"""Detection on real data: boundaries of permuted MNIST and of digits that are turned round, and what EWC keeps."""

import os
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import perdure
from perdure.detection import PageHinkley
from perdure.methods import EWC, Method
from perdure.streams.scenarios import transformed
from perdure.streams.transforms import Permute

needs_data = pytest.mark.skipif("PERDURE_DATA" not in os.environ, reason="needs PERDURE_DATA")
pytestmark = pytest.mark.filterwarnings("ignore::perdure.errors.PerdureWarning")


def kept(results: Any) -> float:
    """Final accuracy on all tasks but the last."""
    return float(results.matrix[-1, :-1].mean())


def permuted_digits() -> perdure.Stream:
    """The embedded digits, three times, each time with the pixels in another order."""
    whole = perdure.benchmarks.split_digits(tasks=1)
    draws = [torch.randperm(64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    task = whole[0]
    assert task.test is not None
    return transformed(
        task.train,
        task.test,
        [Permute(draw) for draw in draws],
        task_names=["a", "b", "c"],
        name="permuted_digits",
        scenario="domain",
        prepare=whole.prepare,
    )


def test_ewc_with_found_boundaries_keeps_what_it_keeps_with_given_ones() -> None:
    def run(methods: list[Method], boundaries: Any = None) -> tuple[perdure.Learner, float]:
        learner = perdure.Learner(
            perdure.models.MLP(64, [100], 10, seed=0), partial(torch.optim.SGD, lr=0.1), methods, boundaries=boundaries
        )
        return learner, kept(learner.fit(permuted_digits(), epochs=8, batch_size=32))

    (_, plain), (_, given) = run([]), run([EWC(strength=30)])
    learner, found = run([EWC(strength=30)], PageHinkley())
    steps = learner.passes["steps"] // 3
    assert learner.boundaries is not None
    assert [round(boundary.change_point / steps) for boundary in learner.boundaries.found] == [1, 2]
    assert given > plain + 0.02, "the benchmark must show what EWC is for"
    assert found - plain > 0.8 * (given - plain)


@needs_data
@pytest.mark.slow
def test_ewc_on_permuted_mnist_without_boundaries() -> None:
    from benchmarks.detection import judged, permuted

    given, plain = kept(permuted(5, 30.0, None)[1]), kept(permuted(5, 0.0, None)[1])
    learner, results, steps = permuted(5, 30.0, PageHinkley())
    report = judged(learner.boundaries.found, [steps * task for task in range(1, 5)], within=20)
    assert report["found"] == 4
    assert report["false"] == 0
    assert np.abs(report["estimate"]).max() <= 10
    assert kept(results) - plain > 0.8 * (given - plain)


@needs_data
@pytest.mark.slow
def test_elec2_has_few_alarms() -> None:
    from benchmarks.detection import elec2

    run = elec2(PageHinkley())
    assert len(run.found) <= run.steps // 100
