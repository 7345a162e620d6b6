"""What a search leaves: a table of its trials, the chosen configuration, and a picture of what mattered."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perdure.comparison import human_seconds
from perdure.errors import MissingExtraError
from perdure.files import write_atomically
from perdure.report.palette import PAPER
from perdure.report.plots import INK
from perdure.tuning.run import Found
from perdure.tuning.sampling import importances
from perdure.tuning.space import Range
from perdure.tuning.trials import Trial

BEST, TRIALS, PICTURE = "best.yaml", "trials.csv", "importance.png"
SHOWN = 15
_COLOUR = "#0072b2"


def write(found: Found, folder: Path) -> dict[str, Path]:
    """Write `best.yaml`, `trials.csv` and, where matplotlib is installed, `importance.png`; returns their paths."""
    files = {"best": write_atomically(folder / BEST, best_yaml(found).encode())}
    files["trials"] = write_atomically(folder / TRIALS, trials_csv(found).encode())
    try:
        picture = drawing(found)
    except MissingExtraError:
        return files
    if picture is not None:
        files["picture"] = write_atomically(folder / PICTURE, picture)
    return files


def best_yaml(found: Found) -> str:
    """The chosen experiment as `perdure run` takes it, with a line that says where it comes from."""
    rules = found.tuning.rules
    return (
        f"# Chosen by perdure tune on the first {rules.tasks} tasks with seed {rules.seed}: {values_of(found.best)}\n"
        f"{found.experiment.to_yaml()}"
    )


def table(found: Found) -> str:
    """The best trials, the chosen one marked; a unit of halving with its budget."""
    ranked = sorted(found.trials, key=lambda trial: (-(trial.unit.budget or 0), -trial.score))
    shown = ranked[:SHOWN]
    if found.best not in shown:
        shown.append(found.best)
    budgets = any(trial.unit.budget for trial in shown)
    name = "new tasks" if found.tuning.rules.policy == "chf" else "accuracy"
    rows = [["", name, "time", *(["budget"] if budgets else []), "trial", "values"]]
    for trial in shown:
        score = "diverged" if trial.outcome.score is None else f"{100 * trial.outcome.score:.2f} %"
        budget = [str(trial.unit.budget)] if budgets else []
        mark = "*" if trial is found.best else ""
        rows.append([mark, score, human_seconds(trial.outcome.seconds), *budget, trial.unit.key, values_of(trial)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = ["  ".join([*(f"{c:>{w}}" for c, w in zip(row[:-1], widths, strict=True)), row[-1]]) for row in rows]
    more = len(ranked) - len(shown)
    return "\n".join([*lines, *([f"... and {more} more"] if more > 0 else [])])


def trials_csv(found: Found) -> str:
    """All trials, one a line, in the order of the plan."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = list(found.tuning.space)
    writer.writerow(["trial", "score", "seconds", "budget", "chosen", *keys, "why"])
    for trial in found.trials:
        outcome = trial.outcome
        values = [json.dumps(trial.params[key]) if key in trial.params else "" for key in keys]
        score = "" if outcome.score is None else f"{outcome.score:.6f}"
        chosen = "yes" if trial is found.best else ""
        line = [trial.unit.key, score, f"{outcome.seconds:.2f}", trial.unit.budget or "", chosen, *values, outcome.why]
        writer.writerow(line)
    return text.getvalue()


def to_dict(found: Found) -> dict[str, Any]:
    """A JSON-able dictionary; scores are fractions."""
    return {
        "best": _plain(found.best),
        "experiment": found.experiment.to_mapping(),
        "importances": importances_of(found),
        "trials": [_plain(trial) for trial in found.trials],
    }


def importances_of(found: Found) -> dict[str, float]:
    """Shares of every setting, by the trials with values of all; of halving those of the first rung, of one budget."""
    return importances(found.tuning.space, [(trial.params, trial.score) for trial in _comparable(found)])


def values_of(trial: Trial) -> str:
    """The values of a trial in one line."""
    return said(trial.params)


def said(params: Mapping[str, Any]) -> str:
    """Values in one line.

    >>> said({"train.lr": 0.0123456, "train.optimizer": "sgd"})
    'train.lr=0.01235, train.optimizer=sgd'
    """
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def drawing(found: Found) -> bytes | None:
    """A PNG: the share of every setting in what makes a trial good, and the score over its values.

    None if fewer than two trials can be compared.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib; pip install 'perdure[plot]' installs it") from error
    trials = _comparable(found)
    if len(trials) < 2:
        return None
    space, shares = found.tuning.space, importances_of(found)
    keys = sorted(space, key=lambda key: -shares.get(key, 0.0))
    # Without pyplot there is no global figure, backend or rcParams that could change under the caller.
    figure = Figure(figsize=(3.2 * (len(keys) + 1), 3.2), dpi=150, layout="constrained", facecolor=PAPER["light"])
    FigureCanvasAgg(figure)
    bars, *panels = figure.subplots(1, len(keys) + 1, squeeze=False)[0]
    bars.barh(keys[::-1], [100 * shares.get(key, 0.0) for key in keys[::-1]], color=_COLOUR)
    bars.set_xlabel("importance in %")
    for key, axes in zip(keys, panels, strict=True):
        entry = space[key]
        scores = [100 * trial.score for trial in trials]
        if isinstance(entry, Range):
            axes.scatter([trial.params[key] for trial in trials], scores, color=_COLOUR, s=16)
            axes.set_xscale("log" if entry.log else "linear")
        else:
            names = [str(value) for value in entry.values]
            axes.scatter([entry.values.index(trial.params[key]) for trial in trials], scores, color=_COLOUR, s=16)
            axes.set_xticks(range(len(names)), names)
        axes.set_xlabel(key)
        axes.set_ylabel("held-out accuracy in %")
    for axes in (bars, *panels):
        axes.set_facecolor(PAPER["light"])
        axes.tick_params(colors=INK["light"][1], labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", facecolor=PAPER["light"], metadata={"Software": None})
    return picture.getvalue()


def _comparable(found: Found) -> list[Trial]:
    budgets = [trial.unit.budget for trial in found.trials if trial.unit.budget is not None]
    first = min(budgets) if budgets else None
    return [
        trial
        for trial in found.trials
        if trial.outcome.score is not None
        and trial.unit.budget == first
        and set(found.tuning.space) <= set(trial.params)
    ]


def _plain(trial: Trial) -> dict[str, Any]:
    outcome = trial.outcome
    return {
        "trial": trial.unit.key,
        "values": dict(trial.params),
        "score": outcome.score,
        "seconds": outcome.seconds,
        "budget": trial.unit.budget,
        **({"why": outcome.why} if outcome.why else {}),
    }
