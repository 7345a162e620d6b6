"""`python -m benchmarks.endless`: ten million generated rows, online, with replay: does memory stay where it is?

Every row is a function of the seed and of its number, so nothing is stored: ten classes in 16 dimensions whose means
turn by half a circle over the stream. The resident size is read after every tenth of the stream, evaluation included,
and the script fails if it moves by more than `--within` from the first to the last.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import perdure
from perdure.seeding import normals, uniforms

CLASSES, WIDTH = 10, 16
FLAT = 0.05


def resident_bytes() -> int:
    """What this process holds in memory now, as Linux counts it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


@cache
def means(seed: int) -> Tensor:
    """Where the mean of every class begins and through which point it turns, [2, 10, 16]."""
    return normals(torch.arange(2 * CLASSES), WIDTH, seed, "means").view(2, CLASSES, WIDTH)


def make(total: int, numbers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows [n, 16] and their classes; the mean of a class turns by half a circle from the first row to the last."""
    y = (uniforms(numbers, 1, seed, "class")[:, 0] * CLASSES).long()
    ends = means(seed)
    angle = (torch.pi * numbers / total).float().unsqueeze(1)
    mean = angle.cos() * ends[0, y] + angle.sin() * ends[1, y]
    return mean + normals(numbers, WIDTH, seed, "noise"), y


def measure(rows: int, batch_size: int, capacity: int, parts: int = 10, seed: int = 0) -> dict[str, Any]:
    """Train on the stream and return the resident size after every part, the time and the accuracies."""
    stream = perdure.streams.generated(partial(make, rows), rows=rows, classes=CLASSES, parts=parts, seed=seed)
    learner = perdure.Learner(
        perdure.models.MLP(WIDTH, [32], CLASSES, seed=seed),
        partial(torch.optim.SGD, lr=0.05),
        [perdure.methods.Replay(capacity=capacity)] if capacity else [],
        seed=seed,
    )
    sizes: list[int] = []
    start = time.perf_counter()

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "evaluation" and event["after"] >= 0:
            sizes.append(resident_bytes())
            done = len(sizes) * rows // parts
            seconds = time.perf_counter() - start
            mean = sum(event["accuracies"]) / parts
            print(f"{done:>12,} rows  {sizes[-1] / 1e6:8.1f} MB  {seconds:6.0f} s  {100 * mean:.1f} % on all parts")
            sys.stdout.flush()

    results = learner.fit(stream, batch_size=batch_size, on_event=listen)
    return {
        "rows": rows,
        "batch_size": batch_size,
        "capacity": capacity,
        "resident_bytes": sizes,
        "moved": max(sizes) / min(sizes) - 1,
        "seconds": time.perf_counter() - start,
        "prequential_accuracy": results.metrics()["prequential_accuracy"],
        "final_average_accuracy": results.metrics()["final_average_accuracy"],
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rows", type=int, default=10_000_000)
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--capacity", type=int, default=1000, help="rows that replay remembers")
    arguments.add_argument("--within", type=float, default=FLAT, help="largest growth that is allowed")
    arguments.add_argument("--json", type=Path, help="write what was found to this file")
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    found = measure(chosen.rows, chosen.batch_size, chosen.capacity)
    low, high = min(found["resident_bytes"]) / 1e6, max(found["resident_bytes"]) / 1e6
    print(
        f"\nresident size from {low:.1f} to {high:.1f} MB, {100 * found['moved']:.2f} % apart; "
        f"prequential accuracy {100 * found['prequential_accuracy']:.2f} %, "
        f"{found['rows'] / found['seconds']:,.0f} rows a second"
    )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if found["moved"] > chosen.within:
        sys.exit(f"memory moved by {100 * found['moved']:.1f} %, more than {100 * chosen.within:g} %")


if __name__ == "__main__":
    main()
