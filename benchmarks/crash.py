"""`make crash`: runs killed at random moments and resumed end bit-identical to one that was left alone.

Every kill is a SIGKILL to a real `perdure run` process. After each, the folder holds nothing half-written that could
be taken for a result; when a run has ended at last, its results, its log and its final checkpoint are compared.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from perdure.checkpoint import load_state
from perdure.folder import RunFolder

RUNS = {
    "split-digits": ["-m", "ewc", "-m", "derpp", "--set", "derpp.capacity=100", "--set", "train.epochs=12"],
    "permuted-mnist": ["-m", "replay", "--set", "stream.tasks=3", "--set", "train.steps=300"],
}


def start(benchmark: str, folder: Path) -> subprocess.Popen[str]:
    """A run in a process of its own: a new one, or the one in `folder` continued."""
    command = [sys.executable, "-m", "perdure", "run"]
    if (folder / "config.yaml").exists():
        command += ["--resume", str(folder)]
    else:
        command += ["-b", benchmark, *RUNS[benchmark], "--seed", "0", "--out", str(folder)]
        command += ["--set", "train.checkpoint_every=10"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(folder: Path) -> tuple[dict[str, Any], list[Any], Any]:
    """Results without costs, the log's events, and the last checkpoint's state without clocks."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for cost in ("seconds", "peak_memory_bytes"):
        results.pop(cost)
    run = RunFolder(folder)
    state = load_state(run.saved()[-1])
    state["position"].pop("seconds")
    return results, run.events(), state


def equal(a: Any, b: Any) -> bool:
    """Equality of trees with tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b or (a != a and b != b))


def crash(benchmark: str, kills: int, root: Path, draw: random.Random) -> int:
    """Kill runs of a benchmark `kills` times in all; returns how many runs ended, all of them identical."""
    whole = root / f"{benchmark}-whole"
    began = time.monotonic()
    if start(benchmark, whole).wait():
        raise SystemExit(f"{benchmark}: the run that was left alone failed")
    longest = time.monotonic() - began
    expected = outcome(whole)
    ended = done = 0
    while done < kills:
        folder = root / f"{benchmark}-{ended}"
        while True:
            process = start(benchmark, folder)
            try:
                process.communicate(timeout=draw.uniform(0.3, longest) if done < kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                done += 1
                if (folder / "results.json").exists() and not equal(outcome(folder), expected):
                    raise SystemExit(
                        f"{benchmark}: a killed run left results that are not its own in {folder}"
                    ) from None
                continue
            break
        if process.returncode:
            raise SystemExit(f"{benchmark}: the run in {folder} could not be resumed")
        if not equal(outcome(folder), expected):
            raise SystemExit(f"{benchmark}: the run in {folder} differs from the one that was left alone")
        ended += 1
        shutil.rmtree(folder)
    print(f"{benchmark}: {done} kills, {ended} runs ended, all bit-identical", flush=True)
    return ended


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--kills", type=int, default=100, help="of split-digits runs")
    arguments.add_argument("--mnist-kills", type=int, default=20, help="of permuted-mnist runs; 0 without MNIST")
    arguments.add_argument("--seed", type=int, default=0)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as root:
        draw = random.Random(chosen.seed)
        crash("split-digits", chosen.kills, Path(root), draw)
        if chosen.mnist_kills:
            crash("permuted-mnist", chosen.mnist_kills, Path(root), draw)


if __name__ == "__main__":
    main()
