"""Two runs in two processes beside the same two one after the other: wall time, the start of processes included."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.rows import Row
from perdure.experiments.config import Experiment
from perdure.experiments.executors import run_each
from perdure.experiments.run import run_quietly

NOTE = """\
Wall time of two runs of DER++ on the embedded digits, some twenty seconds each, by `--jobs 2`, beside the same two by
`--jobs 1`: how many times as fast, the start of the processes included. It takes two idle cores."""


def rows(rounds: int = 3, epochs: int = 60) -> list[Row]:
    """The gain, and its smallest and largest."""
    gains = [gain(epochs) for _ in range(rounds)]
    return [
        Row(
            "MLP 64-256-256-10",
            "two runs, `--jobs 2`",
            "one after the other",
            statistics.median(gains),
            min(gains),
            max(gains),
            1.70,
            more=True,
        )
    ]


def gain(epochs: int) -> float:
    """How many times as fast two processes are."""
    mapping, seconds = experiment(epochs).to_mapping(), []
    for number in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            arguments = {seed: (mapping, seed, Path(folder) / str(seed)) for seed in (0, 1)}
            start = time.perf_counter()
            run_each(run_quietly, arguments, number, lambda seed, results: None)
            seconds.append(time.perf_counter() - start)
    return seconds[0] / seconds[1]


def experiment(epochs: int) -> Experiment:
    """Training, and next to no evaluation."""
    return Experiment.from_mapping(
        {
            "benchmark": "split_digits",
            "methods": [{"name": "derpp", "capacity": 200}],
            "model": {"name": "mlp", "hidden": [256, 256]},
            "train": {"epochs": epochs, "batch_size": 10, "eval_future": False},
            "threads": 1,
            "device": "cpu",
        }
    )
