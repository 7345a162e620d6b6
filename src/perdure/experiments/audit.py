"""Audits of runs on the disk: the model is built again from a checkpoint, and its old outputs compared."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perdure.audit import Digests, Row, compared, take_digests
from perdure.checkpoint import is_checkpoint, load_state
from perdure.errors import CheckpointError, UsageError
from perdure.experiments.build import on_this_machine, prepare
from perdure.experiments.config import Experiment
from perdure.experiments.folders import CONFIG, seed_folder
from perdure.experiments.run import read_run, with_threads
from perdure.folder import RunFolder
from perdure.saving import load_learner_state


@dataclass(frozen=True)
class Audit:
    """What was found of one seed of a run.

    Attributes
    ----------
    label, seed
        The methods in one word, and the seed.
    checkpoint
        Where the model was built again from.
    task_names
        Of all tasks of the stream.
    finished
        How many of them had ended at that checkpoint.
    compared
        "logits", or "predictions" where a method replaces the prediction.
    rows
        Every old task after every later one.
    reproduced
        Whether the rebuilt model gives what the run took at that checkpoint, by task; None inside a task, where the run
        took nothing.
    """

    label: str
    seed: int
    checkpoint: Path
    task_names: list[str]
    finished: int
    compared: str
    rows: list[Row]
    reproduced: list[bool] | None

    @property
    def passed(self) -> bool:
        """Whether no old output has changed, and what was built again is what the run had."""
        return all(row.equal for row in self.rows) and all(self.reproduced or ())

    @property
    def changed(self) -> dict[int, int]:
        """The tasks whose outputs have changed, by index, and the first task after which they had."""
        found: dict[int, int] = {}
        for row in self.rows:
            if not row.equal:
                found.setdefault(row.task, row.after)
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        plain = dataclasses.asdict(self) | {"checkpoint": str(self.checkpoint), "passed": self.passed}
        for row in plain["rows"]:
            row |= {"task_name": self.task_names[row["task"]], "after_name": self.task_names[row["after"]]}
        return plain


def audit(folder: str | Path, *, data_root: str | None = None, device: str | None = None) -> list[Audit]:
    """Audit every seed of a task-incremental run, at its newest intact checkpoint, or one checkpoint of it.

    Parameters
    ----------
    folder
        Of a run, of one of its seeds, or a checkpoint inside of it.
    data_root, device
        Where the data are now, and where to compute now, if that has changed. Another device has other last bits.

    Raises
    ------
    UsageError
        If the folder holds no run, or one of another scenario.
    CheckpointError
        If there is no checkpoint, it is damaged, or was written before runs took digests; if the data have changed.
    """
    folder = Path(folder)
    if is_checkpoint(folder):
        home = folder.absolute().parent.parent
        if not (home / CONFIG).is_file():
            raise UsageError(
                f"the checkpoint '{folder}' lies in no folder of a run, so nothing says what model and data it is of; "
                "audit it where 'perdure run' wrote it"
            )
        places: list[tuple[Path, Path | None]] = [(home, folder)]
    else:
        experiment = read_run(folder)
        places = [(seed_folder(folder, seed, experiment.seeds), None) for seed in experiment.seeds]
    return [_audit(home, checkpoint, data_root, device) for home, checkpoint in places]


def _audit(home: Path, checkpoint: Path | None, data_root: str | None, device: str | None) -> Audit:
    experiment = _experiment(home, data_root, device)
    if checkpoint is None:
        state, checkpoint = _newest(home)
    else:
        state = load_state(checkpoint)
    position = state["position"]
    if "audit" not in position or len(position["audit"]) < position["task"]:
        raise CheckpointError(
            f"{checkpoint} has no digests of old outputs: it was written by an older version; run it again"
        )
    stored = [Digests(**taken) for taken in position["audit"]]
    seed = state["learner"]["seed"]
    with with_threads(experiment.threads or torch.get_num_threads()):
        ready = prepare(experiment, seed)
        if ready.stream.fingerprint() != position["plan"]["stream"]:
            raise CheckpointError(
                f"the data of the run in {home} are not what they were; put the same files where it found them"
            )
        load_learner_state(ready.learner, state["learner"])
        now = take_digests(ready.learner, ready.stream, len(stored))
    inside = bool(position["step"])
    return Audit(
        label=experiment.label,
        seed=seed,
        checkpoint=checkpoint,
        task_names=[task.name for task in ready.stream],
        finished=len(stored),
        compared="predictions" if ready.learner.hooks["predict"] else "logits",
        rows=compared(stored, now, inside),
        reproduced=None
        if inside or not stored
        else [a == b for a, b in zip(stored[-1].outputs, now.outputs, strict=True)],
    )


def _experiment(home: Path, data_root: str | None, device: str | None) -> Experiment:
    experiment = read_run(home)
    if experiment.scenario != "task":
        raise UsageError(
            f"the run in '{home}' is {experiment.scenario}-incremental, where old outputs are meant to change; audit "
            "runs with --scenario task"
        )
    return on_this_machine(
        dataclasses.replace(experiment, data_root=data_root or experiment.data_root, device=device or experiment.device)
    )


def _newest(home: Path) -> tuple[dict[str, Any], Path]:
    """The newest intact checkpoint of a run."""
    run = RunFolder(home)
    state = run.load()
    if state is None:
        raise CheckpointError(f"the run in '{home}' has no checkpoint; continue it with 'perdure run --resume {home}'")
    wanted = run.checkpoints / f"{state['position']['updates']:09d}"
    return state, wanted
