"""Two runs in two processes beside the same two one after the other: wall time, the start of processes included."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from perdure.experiments.config import Experiment
from perdure.experiments.executors import run_each
from perdure.experiments.run import run_quietly

GOAL = 1.7


def experiment(epochs: int) -> Experiment:
    """A run of some 20 seconds for every 60 epochs, on the embedded digits."""
    return Experiment.from_mapping(
        {
            "benchmark": "split_digits",
            "methods": [{"name": "derpp", "capacity": 200}],
            "model": {"name": "mlp", "hidden": [256, 256]},
            "train": {"epochs": epochs, "batch_size": 10},
            "threads": 1,
            "device": "cpu",
        }
    )


def jobs(epochs: int = 120) -> tuple[float, float, float]:
    """How many times faster two processes are; and the seconds of one after the other, and of both at once."""
    mapping, seconds = experiment(epochs).to_mapping(), []
    for number in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            arguments = {seed: (mapping, seed, Path(folder) / str(seed)) for seed in (0, 1)}
            start = time.perf_counter()
            run_each(run_quietly, arguments, number, lambda seed, results: None)
            seconds.append(time.perf_counter() - start)
    return seconds[0] / seconds[1], seconds[0], seconds[1]


if __name__ == "__main__":
    faster, serial, spread = jobs()
    print(f"two processes: {faster:.2f} times as fast ({serial:.1f} s one after the other, {spread:.1f} s at once)")
