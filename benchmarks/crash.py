"""`make crash`: runs killed at random moments and resumed end bit-identical to one that was left alone.

Every kill is a SIGKILL to a real `perdure run` process. After each, the folder holds nothing half-written that could
be taken for a result; when a run has ended at last, its results, its log and its final checkpoint are compared. The
same with a disk that is full, and with one that can only be read, where the run fails by itself.
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


def disks(whole: Path, fulls: int, draw: random.Random) -> None:
    """Runs on a disk that is full after so many bytes, and on one that turns read-only; then both are mended.

    The disk is in memory, mounted in a name space of its own, which any user may have on most Linux systems.
    """
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-m", "benchmarks.crash", "--disk", str(whole)]
    if shutil.which("unshare") is None or subprocess.run([*command[:3], "true"], capture_output=True).returncode:
        print("full and read-only disks: not tried, this system gives no name space to mount one in", flush=True)
        return
    done = subprocess.run([*command, "--fulls", str(fulls), "--seed", str(draw.randrange(2**31))], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def on_a_disk(whole: Path, fulls: int, draw: random.Random) -> None:
    """Inside the name space: `whole` is the run that was left alone."""
    expected, needed = outcome(whole), _bytes(whole)
    disk = whole.parent / "disk"
    disk.mkdir()
    for number in range(fulls):
        size = draw.randrange(4096, needed)
        _mount(disk, f"size={size}")
        _must_fail(start("split-digits", disk / "run"), "no space left on device")
        _finish(disk, expected, f"a disk of {size} bytes")
        print(f"full disk: {number + 1} of {fulls}, {size} of {needed} bytes", flush=True)
    _mount(disk, f"size={2 * needed}")
    run = start("split-digits", disk / "run")
    while not RunFolder(disk / "run").saved() if (disk / "run").exists() else True:
        time.sleep(0.05)
    run.kill()
    run.communicate()
    _mount(disk, "remount,ro")
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    _must_fail(start("split-digits", disk / "run"), "read-only file system")
    if before != {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}:
        raise SystemExit("a read-only folder has changed")
    _finish(disk, expected, "a read-only disk")
    print("read-only disk: the run said so, and went on when it could", flush=True)


def _must_fail(process: subprocess.Popen[str], reason: str) -> None:
    _, said = process.communicate()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if process.returncode != 1 or len(errors) != 1 or reason not in errors[0].lower() or "Traceback" in said:
        raise SystemExit(f"exit code {process.returncode} instead of one sentence with '{reason}':\n{said}")


def _finish(disk: Path, expected: Any, what: str) -> None:
    """Give the disk room, and let the run come to its end."""
    if (disk / "run" / "results.json").exists():
        raise SystemExit(f"{what} left results of a run that has not ended")
    _mount(disk, "remount,rw,size=1g")
    process = start("split-digits", disk / "run")
    said = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"the run on {what} could not be resumed:\n{said}")
    if not equal(outcome(disk / "run"), expected):
        raise SystemExit(f"the run on {what} differs from the one that was left alone")
    subprocess.run(["umount", str(disk)], check=True)


def _mount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], check=True)


def _bytes(folder: Path) -> int:
    """What a folder takes on a disk of pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--kills", type=int, default=100, help="of split-digits runs")
    arguments.add_argument("--mnist-kills", type=int, default=20, help="of permuted-mnist runs; 0 without MNIST")
    arguments.add_argument("--fulls", type=int, default=8, help="full disks")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--disk", type=Path, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.disk is not None:
        on_a_disk(chosen.disk, chosen.fulls, random.Random(chosen.seed))
        return
    with tempfile.TemporaryDirectory() as root:
        draw = random.Random(chosen.seed)
        crash("split-digits", chosen.kills, Path(root), draw)
        disks(Path(root) / "split-digits-whole", chosen.fulls, draw)
        if chosen.mnist_kills:
            crash("permuted-mnist", chosen.mnist_kills, Path(root), draw)


if __name__ == "__main__":
    main()
