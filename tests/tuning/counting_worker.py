"""A worker in a process of its own that writes down what it begins and ends, instead of training."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perdure.tuning.searches import Listed
from perdure.tuning.space import space_of
from perdure.tuning.study import StudyLedger
from perdure.tuning.trials import Outcome, Unit
from perdure.tuning.working import work

UNITS = 24
SPACE = space_of({"ewc.strength": list(range(UNITS))})
SEARCH = Listed(tuple(Unit(f"grid {i}", {"ewc.strength": i}) for i in range(UNITS)))


def ledger(folder: Path) -> StudyLedger:
    return StudyLedger(f"sqlite:///{folder / 'study.db'}", "test", SPACE, "{}")


def main(folder: Path, workers: int, hang_at: int) -> None:
    own = ledger(folder)
    log = folder / f"log-{os.getpid()}"
    count = 0

    def evaluate(unit: Unit, params: Mapping[str, Any]) -> Outcome:
        nonlocal count
        count += 1
        note(log, f"begin {unit.key}")
        if count == hang_at:
            time.sleep(600)
        time.sleep(0.02)
        note(log, f"end {unit.key}")
        return Outcome(params["ewc.strength"] / UNITS, 0.02)

    (folder / f"ready-{os.getpid()}").touch()
    while len(list(folder.glob("ready-*"))) < workers:
        time.sleep(0.002)
    work(own, SEARCH, evaluate, lambda unit, ledger: {})


def note(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
