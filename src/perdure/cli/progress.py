"""Progress on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from perdure.cli.output import say

Event = dict[str, Any]
Listener = Callable[[Event], None]


@contextmanager
def run_progress(seeds: int) -> Iterator[Listener]:
    """A listener for the events of a run: one bar a seed, or one line a task."""
    if not sys.stderr.isatty():
        yield _task_line
        return
    with _bars("{task.percentage:>3.0f} %") as bars:
        known: dict[int, Any] = {}

        def listen(event: Event) -> None:
            seed = event["seed"]
            if seed not in known:
                known[seed] = bars.add_task(f"seed {seed}" if seeds > 1 else "training", total=event["tasks"])
            if event["event"] in ("task_begin", "step"):
                done = event["task"] + event.get("step", 0) / max(1, event["steps"])
                where = f"seed {seed}: task {event['task'] + 1} of {event['tasks']}"
                bars.update(known[seed], completed=done, description=where)
            elif event["event"] == "end":
                bars.update(known[seed], completed=event["tasks"], description=f"seed {seed}: done")

        yield listen


@contextmanager
def comparison_progress(total: int, doing: str = "comparing") -> Iterator[Listener]:
    """A listener for the finished runs of a comparison; an event may say a new total."""
    if not sys.stderr.isatty():
        yield lambda event: say(f"{_run_text(event)} ({event['done']} of {event['total']})")
        return
    with _bars("{task.completed:.0f} of {task.total:.0f} runs") as bars:
        bar = bars.add_task(doing, total=total)
        yield lambda event: bars.update(
            bar, completed=event["done"], total=event["total"], description=_run_text(event)
        )


@contextmanager
def tuning_progress() -> Iterator[Listener]:
    """A listener for the finished trials of a search."""
    if not sys.stderr.isatty():
        yield lambda event: say(_trial_line(event))
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f}"))
    # The time that is left comes with the events: trials of one search may take very different times.
    with Progress(*columns, TextColumn("{task.fields[left]}"), console=Console(stderr=True)) as bars:
        bar = bars.add_task("searching", total=1, visible=False, left="")
        yield lambda event: bars.update(
            bar,
            completed=event["done"],
            total=event["total"],
            description=_trial_text(event) if "key" in event else "going on",
            left=_left(event) if "key" in event else "",
            visible=True,
        )


@contextmanager
def download_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function of a file's name, its bytes so far and its size."""
    if not sys.stderr.isatty():
        tenths: dict[str, int] = {}

        def line(file: str, done: int, size: int) -> None:
            tenth = 10 * done // max(1, size)
            if tenth != tenths.get(file):
                tenths[file] = tenth
                say(f"{file}: {done / 1e6:.1f} of {size / 1e6:.1f} MB")

        yield line
        return
    with _bars("{task.percentage:>3.0f} %") as bars:
        known: dict[str, Any] = {}

        def listen(file: str, done: int, size: int) -> None:
            if file not in known:
                known[file] = bars.add_task(file, total=size)
            bars.update(known[file], completed=done)

        yield listen


def _bars(figures: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(figures), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _task_line(event: Event) -> None:
    if event["event"] == "evaluation" and event["step"] is None and event["after"] >= 0:
        seen = [score for score in event["accuracies"][: event["after"] + 1] if score is not None]
        accuracy = f"{100 * sum(seen) / len(seen):.1f} % on the tasks so far" if seen else "no accuracy defined"
        say(f"seed {event['seed']}: after task {event['after'] + 1} of {event['tasks']}: {accuracy}")


def _run_text(event: Event) -> str:
    accuracy = "-" if event["accuracy"] is None else f"{100 * event['accuracy']:.1f} %"
    return f"{event['label']}, seed {event['seed']}: {accuracy}"


def _trial_text(event: Event) -> str:
    score = "diverged" if event["score"] is None else f"{100 * event['score']:.1f} %"
    values = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in event["params"].items())
    return f"{event['key']}: {values}: {score}"


def _trial_line(event: Event) -> str:
    if "key" not in event:
        return f"{event['done']} of {event['total']} trials are there already"
    return f"{_trial_text(event)} ({event['done']} of {event['total']}, {_left(event)})"


def _left(event: Event) -> str:
    minutes, seconds = divmod(round(event["left"]), 60)
    return f"{minutes} min {seconds} s left" if minutes else f"{seconds} s left"
