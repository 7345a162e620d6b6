"""`make bench`: what perdure costs, as ratios to code by hand that does the same; writes docs/performance.md."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import perdure
from benchmarks import avalanche, gem, jobs, passes, selection, steps
from benchmarks.cases import cases
from benchmarks.rows import HEAD, Row
from perdure.errors import PerdureWarning

HOW = """\
# Performance

Written by `make bench`; {where}.

Every number is a ratio of two times: perdure's, and that of a loop written by hand with the same arithmetic on the same
rows (tensors in memory, `index_select`, `torch.optim`, nothing else). Processor time on one thread; the variants of a
table run in turn, in one process, in the order A B C, C B A, and the ratio is that of their medians. "Rounds" are the
quartiles of the ratios of single turns: what differs by less is noise. Nothing here is an absolute time.

| model | network | batch |
|---|---|---|
| MLP100 | 784-100-100-10, SGD | 10 |
| MLP400 | 784-400-400-10, SGD | 128 |
| slim ResNet | ResNet-18 with 20 base channels, 3 x 32 x 32, SGD, channels_last | 32 |

## Steps and passes

"Own fine-tuning" is a learner without methods. A penalty's cost does not depend on how many tasks it remembers. DER++
runs with `forward="joint"`: one pass over current and remembered rows, as the loop by hand. A-GEM draws as many
remembered rows as there are new ones and is compared with two passes by hand, of which one gradient is dropped. GEM's
rows are the projection alone, of one gradient onto the constraints of 20 tasks.

"""

MISSED = """
## Where a goal is missed

The small network is the hard case: a step of MLP100 takes as long as a few dozen operations on a vector of its 90,000
weights.

- A penalty under plain SGD is one operation on such vectors, SI in its second task four and a copy. The base is our own
  fine-tuning, which copies no gradient at all.
- HAT multiplies what every layer gives by gates and sends gradients back through them: some thirty small operations.
- A-GEM draws, takes a second gradient and compares the two; in two passes of MLP100 that is a third of the time.
- DER++ has three terms where the loop with three times the rows has one. The row beside it compares it with a loop by
  hand that trains DER++.
- Replay on MLP100 draws, gathers and stores for a few dozen microseconds in every step.
- An evaluation scores two views and keeps every prediction; the forward pass beside it does neither.
"""

JOBS = """
## Several runs at once

"""

AVALANCHE = """
## Beside Avalanche

"""


ENDLESS = """
## A stream without an end

{rows:,} rows, generated as they are asked for, in batches of {batch_size}, online, with replay from {capacity:,} rows
(`python -m benchmarks.endless`): the process held {low:.1f} MB after the first tenth and {high:.1f} MB after the last,
evaluations included, at {speed:,.0f} rows a second.
"""


def endless(found: dict[str, Any]) -> str:
    """What `python -m benchmarks.endless --json` measured, in words."""
    first, *_, last = found["resident_bytes"]
    return ENDLESS.format(**found, low=first / 1e6, high=last / 1e6, speed=found["rows"] / found["seconds"])


def measured() -> Iterator[Row]:
    """Every row but those of whole runs, in the order of the page."""
    first, *_ = every = cases()
    for case in every:
        yield from steps.rows(case)
        yield from passes.fisher(case)
    yield from passes.evaluation(first)
    yield from selection.rows()
    yield from gem.rows()


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--avalanche", type=Path, help="what `make bench-avalanche` measured, as JSON")
    arguments.add_argument("--endless", type=Path, help="what `python -m benchmarks.endless` measured, as JSON")
    arguments.add_argument("--out", type=Path, help="write the page to this Markdown file")
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PerdureWarning)

    page = HOW.format(where=_where())
    print(page + HEAD, flush=True)
    found = []
    for row in measured():
        print(row, flush=True)
        found.append(row)
    page += "\n".join([HEAD, *map(str, found)]) + "\n"
    whole = jobs.rows()
    text = MISSED + JOBS + jobs.NOTE + "\n\n" + "\n".join([HEAD, *map(str, whole)]) + "\n"
    if chosen.endless is not None:
        text += endless(json.loads(chosen.endless.read_text(encoding="utf-8")))
    if chosen.avalanche is not None:
        text += AVALANCHE + avalanche.table(json.loads(chosen.avalanche.read_text(encoding="utf-8")))
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(page + text, encoding="utf-8")
    missed = [row for row in (*found, *whole) if row.missed]
    for row in missed:
        print(f"missed: {row.model}, {row.what}: {row.median:.2f}, the goal is {row.goal:.2f}", file=sys.stderr)
    return 1 if missed else 0


def _where() -> str:
    versions = f"perdure {perdure.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    names = [
        line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "").splitlines()
        if line.startswith("model name")
    ]
    return f"{versions}, {names[0] if names else platform.processor() or platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())
