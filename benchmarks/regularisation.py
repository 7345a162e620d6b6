"""What penalties, distillation and masks gain over fine-tuning, with strengths chosen on the first tasks alone.

    PERDURE_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.regularisation --out docs/regularisation.md

Two tables on MNIST, an hour on one core; `--quick` runs the same on the embedded digits in seconds. Runs are kept in
runs/regularisation under the commit that last changed the library, so that what was stopped goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import pages
from benchmarks.pages import by_seed, commit_of, wrapped
from benchmarks.tuning import Choice, Kept, accuracy_of, choose, for_tuning, number_of, with_strength
from perdure.experiments.config import Experiment
from perdure.experiments.protocol import protocol_of
from perdure.files import write_atomically
from perdure.results import Results
from perdure.version import versions

FINETUNE = "fine-tuning"
TUNING_SEED = 1
FIRST = 3
PAGE = """\
# Regularisation and masks against fine-tuning

Written by `python -m benchmarks.regularisation --out docs/regularisation.md` with perdure at commit {commit}, torch
{torch}, Python {python} on {platform}. Accuracy is the final average accuracy (the mean over all tasks after the
last one), forgetting how far the earlier tasks have dropped below the best they ever were; both are percent of the
test data, as the mean of the seeds and for each seed. Seconds are processor time of a run on one thread, the mean of
the runs that went through in one go; the machine had other work too, so they are good to a third.

How strengths are chosen: by the final average accuracy after the first {first} tasks, on a tenth of those tasks'
training data that is held out of training, on seed {seed}, which is none of the seeds in the tables. Test data and
later tasks play no part. The grid has one value a decade; while the best lies at its end, it grows by a decade; of
equally good values the weakest is taken. What a published protocol gives is not chosen again, and nothing else is
tuned.
"""


@dataclass(frozen=True)
class Contender:
    """A row: a method, if any, and the grid that its strength is chosen from, or where its settings come from."""

    label: str
    method: dict[str, Any] | None = None
    grid: tuple[float, ...] = ()
    origin: str = ""


@dataclass(frozen=True)
class Table:
    """A benchmark and its contenders; `experiment` gives fine-tuning with one seed."""

    key: str
    title: str
    about: str
    experiment: Callable[[int], Experiment]
    seeds: tuple[int, ...]
    contenders: tuple[Contender, ...]
    notes: tuple[str, ...] = ()

    def of(self, contender: Contender, seed: int) -> Experiment:
        methods = [] if contender.method is None else [contender.method]
        return Experiment.from_mapping({**self.experiment(seed).to_mapping(), "methods": methods})


@dataclass(frozen=True)
class Measured:
    """What came of a row."""

    contender: Contender
    runs: list[Results]
    choice: Choice | None
    seconds: list[float]

    def values(self, metric: str) -> list[float]:
        """In percent, one a seed."""
        return [100 * number_of(run, metric) for run in self.runs]


def measure(table: Table, kept: Kept) -> Iterator[Measured]:
    """Row after row: choose the strength where there is a grid, and run every seed."""
    for contender in table.contenders:
        choice = tuned(table, contender, kept) if contender.grid else None
        runs, seconds = [], []
        for seed in table.seeds:
            experiment = table.of(contender, seed)
            if choice is not None:
                experiment = with_strength(experiment, choice.strength)
            name = f"{table.key}/{_slug(contender)}/seed-{seed}"
            runs.append(kept.run(name, experiment))
            seconds += [cost] if (cost := kept.seconds(name)) is not None else []
        yield Measured(contender, runs, choice, seconds)


def tuned(table: Table, contender: Contender, kept: Kept) -> Choice:
    """The contender's strength, from the first tasks of the tuning seed."""
    assert TUNING_SEED not in table.seeds
    experiment = for_tuning(table.of(contender, TUNING_SEED), FIRST)

    def score(strength: float) -> float:
        name = f"{table.key}/{_slug(contender)}/strength-{strength:g}"
        return accuracy_of(kept.run(name, with_strength(experiment, strength)))

    return choose(score, contender.grid)


def _slug(contender: Contender) -> str:
    return contender.label.lower().replace(" ", "-").replace(",", "")


# -- the tables -------------------------------------------------------------------------------------------------------


def split_mnist() -> Table:
    protocol = protocol_of("vandeven-split-mnist")
    published = "the protocol's"

    def method(run: str) -> dict[str, Any]:
        (found,) = protocol.runs[run]["methods"]
        return dict(found)

    return Table(
        key="split-mnist",
        title="Split MNIST, task-incremental",
        about=(
            "Five tasks of two digits, the task known when predicting; the protocol of van de Ven et al. 2022 "
            "(`perdure reproduce vandeven-split-mnist`): MLP 784-400-400-10 with one wide head of which each task uses "
            "its two outputs, Adam at 0.001 that is never reset, 2000 steps of 128 images a task. A new class order "
            "for every seed."
        ),
        experiment=lambda seed: protocol.experiment_of("task-none", seed),
        seeds=tuple(protocol.seeds_of(protocol.rows["task-none"])),
        contenders=(
            Contender(FINETUNE),
            Contender("SPG", {"name": "spg"}, origin="the paper's: the mask as it is, with nothing to tune"),
            Contender("HAT", {"name": "hat"}, (0.075, 0.75, 7.5)),
            Contender("MAS", {"name": "mas"}, (0.1, 1.0, 10.0)),
            Contender("EWC, online", {**method("task-ewc"), "mode": "online"}, (1e4, 1e5, 1e6)),
            Contender("L2", {"name": "l2"}, (0.01, 0.1, 1.0)),
            Contender("L2, a term a task", {"name": "l2", "mode": "all"}, (0.01, 0.1, 1.0)),
            Contender("EWC", method("task-ewc"), origin=published),
            Contender("SI", method("task-si"), origin=published),
            Contender("LwF", method("task-lwf"), origin=published),
        ),
        notes=(
            "L2 with an anchor at the last task alone is the exception: far above fine-tuning on two seeds, below it "
            "on seed 2. With a term a task, which pulls to the mean of all anchors ever harder, it is above on every "
            "seed. It does what its equation says: with the last anchor alone on seed 2, the second and third task "
            "moved the weights by 2.8 and 2.3 (fine-tuning: 20 and 17), and after the third task the first was at "
            "97.7 % (86.2 %), but the second at 85.4 % (97.8 %). Small steps along what an old task depends on forget "
            "it too; only importances tell which those are.",
            "HAT forgets next to nothing: the weights into units that a task uses stay as they are. Its strength "
            "hardly matters in three such tasks, which leave most units free.",
            "SPG only slows weights down, so it forgets more than HAT. Its paper trains by SGD until a plateau; here "
            "it has the protocol's Adam, and nothing of it was tuned.",
            "Seed 3 is the hardest for every method but L2; the notes of the protocol say so of EWC and SI.",
            "After three tasks every strength of MAS, HAT and online EWC that was tried is within a third of a point "
            "of the best: the choice decides little there.",
            "EWC, SI and LwF have strengths that their authors chose on this benchmark, an advantage over the others.",
        ),
    )


def permuted_mnist() -> Table:
    mapping = {
        "benchmark": "permuted_mnist",
        "scenario": "domain",
        "stream": {"tasks": 10},
        "model": {"name": "mlp", "hidden": [400, 400]},
        "train": {"epochs": 1, "batch_size": 128, "optimizer": "adam", "lr": 0.001, "eval_future": False},
        "device": "cpu",
        "threads": 1,
    }
    return Table(
        key="permuted-mnist",
        title="Permuted MNIST, domain-incremental",
        about=(
            "Ten tasks, each all of MNIST with its pixels in another random order; the task is not known when "
            "predicting. MLP 784-400-400-10, Adam at 0.001 that is never reset, one pass in batches of 128 a task. New "
            "permutations for every seed. EWC and MAS measure importances on all 60,000 images, EWC with the "
            "Rademacher estimator; SI has the paper's xi of 0.1."
        ),
        experiment=lambda seed: Experiment.from_mapping({**mapping, "seeds": [seed]}),
        seeds=(2, 3, 4),
        contenders=(
            Contender(FINETUNE),
            Contender("EWC", {"name": "ewc"}, (10.0, 100.0, 1000.0)),
            Contender("SI", {"name": "si"}, (0.1, 1.0, 10.0)),
            Contender("MAS", {"name": "mas"}, (0.1, 1.0, 10.0)),
            Contender("L2", {"name": "l2"}, (0.01, 0.1, 1.0)),
        ),
        notes=(
            "EWC, SI and MAS keep most of what fine-tuning loses, though each strength was chosen when seven of the "
            "ten tasks had not been seen. Which of them is best depends on the benchmark; the strengths differ by four "
            "decades because importances have different units.",
            "L2 gains least. It holds all weights alike, so a strength that protects old tasks keeps new ones from "
            "being learned: above 0.01 it loses already after three tasks, and what is best after three is weak after "
            "ten.",
        ),
    )


def quick() -> list[Table]:
    """Both scenarios on the embedded digits: numbers that say little, in seconds."""

    def experiment(scenario: str) -> Callable[[int], Experiment]:
        mapping = {
            "benchmark": "split_digits",
            "scenario": scenario,
            "model": {"name": "mlp", "hidden": [50]},
            "train": {"steps": 40, "batch_size": 32, "optimizer": "adam", "lr": 0.003, "eval_future": False},
            "device": "cpu",
            "threads": 1,
        }
        return lambda seed: Experiment.from_mapping({**mapping, "seeds": [seed]})

    rows = (Contender(FINETUNE), Contender("EWC", {"name": "ewc"}, (100.0, 1000.0)), Contender("SPG", {"name": "spg"}))
    about = "The embedded digits, 40 steps a task."
    return [
        Table("digits-task", "Split digits, task-incremental", about, experiment("task"), (2, 3), rows),
        Table("digits-domain", "Split digits, domain-incremental", about, experiment("domain"), (2, 3), rows[:2]),
    ]


# -- the page ---------------------------------------------------------------------------------------------------------


def page(measured: Sequence[tuple[Table, Sequence[Measured]]], commit: str) -> str:
    """The page in Markdown."""
    head = PAGE.format(first=FIRST, seed=TUNING_SEED, **versions() | {"commit": commit})
    return head + "".join(section(table, rows) for table, rows in measured)


def section(table: Table, rows: Sequence[Measured]) -> str:
    """One table, what its strengths were chosen from, and what was found."""
    seeds = " / ".join(map(str, table.seeds))
    lines = [
        "",
        f"## {table.title}",
        "",
        *wrapped(table.about),
        "",
        *pages.table(
            ("method", "strength", "average accuracy", f"seeds {seeds}", "forgetting", f"seeds {seeds}", "seconds"),
            [_row(each) for each in rows],
        ),
        "",
        "Strengths and where they come from (held-out accuracy of every value tried; the chosen one is bold):",
        "",
        *(line for each in rows for line in _origin(each)),
        "",
        *wrapped(gains(rows)),
        "",
    ]
    for note in table.notes:
        lines += wrapped(f"- {note}")
    return "\n".join(lines).rstrip() + "\n"


def gains(rows: Sequence[Measured]) -> str:
    """How far above fine-tuning every method is, in words."""
    base = next(each for each in rows if each.contender.method is None).values("final_average_accuracy")
    gaps = {
        each.contender.label: [
            value - plain for value, plain in zip(each.values("final_average_accuracy"), base, strict=True)
        ]
        for each in rows
        if each.contender.method is not None
    }
    said = ", ".join(
        f"{label} {fmean(gap):+.1f} ({min(gap):+.1f} to {max(gap):+.1f})"
        for label, gap in sorted(gaps.items(), key=lambda item: -fmean(item[1]))
    )
    return f"Points above fine-tuning, with the smallest and the largest difference of a seed: {said}."


def _row(found: Measured) -> list[str]:
    accuracy, forgetting = found.values("final_average_accuracy"), found.values("forgetting")
    seconds = f"{fmean(found.seconds):.0f}" if found.seconds else ""
    cells = [found.contender.label, strength_of(found), f"{fmean(accuracy):.2f}", by_seed(accuracy)]
    return [*cells, f"{fmean(forgetting):.2f}", by_seed(forgetting), seconds]


def strength_of(found: Measured) -> str:
    """The strength as it stands in the table."""
    if found.contender.method is None:
        return ""
    if found.choice is not None:
        return f"{found.choice.strength:g}"
    return f"{found.contender.method.get('strength', 1.0):g}"


def _origin(found: Measured) -> list[str]:
    label, choice = found.contender.label, found.choice
    if choice is not None:
        tried = ", ".join(
            f"{'**' if strength == choice.strength else ''}{strength:g}: {100 * score:.2f}"
            f"{'**' if strength == choice.strength else ''}"
            for strength, score in choice.scores.items()
        )
        return wrapped(f"- {label}: {tried}{' (the end of what was tried)' if choice.at_the_end else ''}")
    return wrapped(f"- {label}: {found.contender.origin}") if found.contender.origin else []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the page to this Markdown file, anew after every row")
    parser.add_argument("--runs", type=Path, default=Path("runs/regularisation"), help="where runs are kept")
    parser.add_argument("--quick", action="store_true", help="the embedded digits, in seconds")
    chosen = parser.parse_args(arguments)
    if not chosen.quick and "PERDURE_DATA" not in os.environ:
        parser.error("MNIST is needed: set PERDURE_DATA to the folder that holds it, or try --quick")
    commit = commit_of()
    kept = Kept(chosen.runs / commit, lambda line: print(line, flush=True))
    measured: list[tuple[Table, list[Measured]]] = []
    text = ""
    for table in quick() if chosen.quick else [split_mnist(), permuted_mnist()]:
        measured.append((table, []))
        for row in measure(table, kept):
            measured[-1][1].append(row)
            text = page(measured, commit)
            if chosen.out is not None:
                write_atomically(chosen.out, text.encode())
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
