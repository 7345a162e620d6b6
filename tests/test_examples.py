"""The examples run as they are written, on the embedded digits, and show what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("script", "kept"),
    [
        ("ewc_mnist.py", 0.2),
        ("replay_mnist.py", 0.5),
    ],
)
def test_it_keeps_the_first_task_and_learns_the_second(script: str, kept: float, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / script), "--data", "digits", "--epochs", "12"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "MPLBACKEND": "agg", "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    picture = next(tmp_path.glob("*.png"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    protected, plain = done.stdout.split("without")
    scores = []
    for part in (protected, plain):
        lines = re.findall(r"task (\d), epoch \d+: ([\d.]+)% and ([\d.]+)%", part)
        assert len(lines) == 13
        scores.append([(float(first) / 100, float(second) / 100) for _, first, second in lines])
    assert scores[0][0] == scores[1][0], "both runs must begin task 2 from the same weights"
    assert scores[0][0][0] > 0.95
    assert scores[0][-1][0] > scores[1][-1][0] + kept
    assert scores[0][-1][1] > 0.85


@pytest.mark.parametrize("exercise", ["methods", "order", "hybrid"])
def test_the_exercises_print_a_table_and_draw_a_plot(exercise: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "exercises.py"), exercise, "--data", "digits"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "MPLBACKEND": "agg", "MPLCONFIGDIR": str(tmp_path)}
    command += ["--seeds", "1", "--epochs", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"exercise-{exercise}.png").read_bytes().startswith(b"\x89PNG")
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    named = {
        "methods": ("fine-tuning", "EWC", "replay", "A-GEM"),
        "order": ("easy_to_hard", "hard_to_easy", "random"),
        "hybrid": ("EWC alone", "replay alone", "together"),
    }[exercise]
    assert all(any(char.isdigit() for char in lines[name]) for name in named)
    if exercise == "methods":
        class_incremental = {name: float(lines[name].split()[-4]) for name in named}
        assert class_incremental["replay"] > class_incremental["fine-tuning"] + 10
