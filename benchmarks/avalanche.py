"""`make bench-avalanche`: the same training by hand, with perdure and with Avalanche, interleaved in one process.

Before anything is timed, one run of every side is recorded and done again by a plain PyTorch loop: the number of steps,
the rows of every batch and the final weights have to agree.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import perdure
from benchmarks.avalanche_check import check
from benchmarks.avalanche_sides import Setting, sides
from benchmarks.timing import interleave, ratio
from perdure.errors import PerdureWarning

SETTINGS = [
    Setting("naive", hidden=400, batch=128, steps=20),
    Setting("replay", hidden=400, batch=128, steps=20, memory=1024),
    Setting("EWC, a penalty for each of 5 tasks", hidden=400, batch=128, steps=20, ewc="separate"),
    Setting("EWC, one running penalty", hidden=400, batch=128, steps=20, ewc="online"),
    Setting("naive", hidden=100, batch=10, steps=70),
    Setting("online stream", hidden=100, batch=10, steps=70, stream=True),
    Setting("online stream, replay", hidden=100, batch=10, steps=70, memory=200, stream=True),
]

PAIRS = [("perdure", "bare"), ("avalanche", "bare"), ("avalanche", "perdure")]

NOTES = [
    "Processor time, one thread, interleaved in the order A B C, C B A; a ratio of medians, and the quartiles of the "
    "ratios of single rounds. Synthetic data of MNIST's shape, plain SGD, no evaluation, metrics or loggers.",
    "Checked before the clock starts: all sides forward as many rows in as many steps, and the weights of each end "
    "where a plain loop on its batches ends, within 1e-5.",
    "One run is one experience: `strategy.train(...)`, `learner.fit_task(...)`. An online stream is cut into "
    "experiences of one batch before the clock starts. A replay step trains on as many remembered rows as new ones, "
    "from a reservoir that is full.",
    "EWC is timed inside the sixth task, with Avalanche's importances on all sides, without the pass that finds them: "
    "Avalanche squares gradients of batches, perdure takes every sample's own. By hand, the penalty is written as its "
    "equation reads; perdure merges the tasks into one term, with the same weights as a result.",
    "Each side shuffles and draws by itself. Avalanche fetches rows one by one through a DataLoader, the others whole "
    "batches by index. Avalanche's memory changes when an experience ends and is gone through in shuffled passes; "
    "perdure's, and the one by hand, change after every step and are drawn from anew.",
]


def rows(rounds: int = 21) -> list[dict[str, Any]]:
    """Every setting checked and timed; a ratio is (of medians, and the quartiles of single rounds)."""
    found = []
    for setting in SETTINGS:
        made, past = sides(setting)
        steps, forwarded = check(setting, made, past)
        seconds = interleave({name: side.run for name, side in made.items()}, rounds)
        found.append(
            {
                "what": setting.what,
                "model": f"MLP 784-{setting.hidden}-{setting.hidden}-10",
                "batch": setting.batch,
                "steps": steps,
                "rows": forwarded,
                "ratios": {f"{name} / {base}": ratio(seconds, name, base) for name, base in PAIRS},
            }
        )
    return found


def report(rounds: int = 21) -> dict[str, Any]:
    """The rows, what they compare, and what is to be known about them: what `table` needs, and JSON can hold."""
    return {
        "versions": {
            "perdure": perdure.__version__,
            "avalanche-lib": version("avalanche-lib"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rounds": rounds,
        "rows": rows(rounds),
        "notes": NOTES,
    }


def table(found: dict[str, Any]) -> str:
    """Markdown of a report, also of one read from JSON."""
    columns = [f"{name} / {base}" for name, base in PAIRS]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [f"{versions}; {found['rounds']} rounds.", ""]
    lines.append(f"| what | model | batch | steps | rows forwarded | {' | '.join(columns)} |")
    lines.append("|---" * (5 + len(columns)) + "|")
    for row in found["rows"]:
        cells = [str(row[key]) for key in ("what", "model", "batch", "steps", "rows")]
        for column in columns:
            median, low, high = row["ratios"][column]
            cells.append(f"{median:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in found["notes"])]) + "\n"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=21)
    arguments.add_argument("--out", type=Path, help="write the table to this Markdown file")
    arguments.add_argument("--json", type=Path, help="write the report to this file")
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PerdureWarning)
    found = report(chosen.rounds)
    print(table(found))
    if chosen.out is not None:
        chosen.out.write_text(table(found), encoding="utf-8")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
