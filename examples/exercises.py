"""Three exercises on Split-MNIST: four methods, three orders of the tasks, and a hybrid of EWC and replay.

    perdure data get mnist && python examples/exercises.py methods     # or: order, hybrid; or PERDURE_DATA=folder
    python examples/exercises.py hybrid --data digits --seeds 1        # embedded data, seconds

They are those of a course page on continual learning. Each prints a table and writes a plot; docs/exercises.md has what
came out of them. The plots need matplotlib: pip install 'perdure[plot]'.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt
import numpy as np
import torch

import perdure
from perdure.methods import AGEM, EWC, Method, Replay
from perdure.streams import class_incremental, domain_incremental

parser = argparse.ArgumentParser()
parser.add_argument("exercise", choices=["methods", "order", "hybrid"])
parser.add_argument("--data", default="mnist", choices=["mnist", "digits"])
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--out", type=Path, default=Path())
options = parser.parse_args()

torch.set_num_threads(1)
split = {"mnist": perdure.benchmarks.split_mnist, "digits": perdure.benchmarks.split_digits}[options.data]
capacity = {"mnist": 500, "digits": 100}[options.data]


def train(stream: perdure.Stream, methods: Sequence[Method], seed: int) -> perdure.Results:
    """One run: two hidden layers of 100, Adam, batches of 32, the same stream and first weights for every method."""
    inputs = int(np.prod(stream.input_shape))
    model = perdure.models.MLP(inputs, [100, 100], stream.columns, seed=seed)
    learner = perdure.Learner(model, partial(torch.optim.Adam, lr=1e-3), methods, seed=seed)
    return learner.fit(stream, epochs=options.epochs, batch_size=32)


def mean(values: Sequence[float]) -> str:
    """A share in percent, with its standard deviation over the seeds."""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}"


def averages(results: perdure.Results) -> list[float]:
    """The average accuracy over the tasks so far, after each task."""
    matrix = np.asarray(results.matrix)
    return [float(matrix[i, : i + 1].mean()) for i in range(len(matrix))]


def save(figure: plt.Figure, name: str) -> None:
    path = options.out / f"exercise-{name}.png"
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def methods() -> None:
    """Fine-tuning, EWC, replay and A-GEM, with and without being told the task."""
    compared: dict[str, Callable[[], list[Method]]] = {
        "fine-tuning": list,
        "EWC": lambda: [EWC(strength=1000)],
        "replay": lambda: [Replay(capacity=capacity)],
        "A-GEM": lambda: [AGEM(per_task=capacity // 5)],
    }
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    print(f"{'':12} {'class-incremental':>18} {'task told':>14} {'forgetting':>14}   seconds")
    for name, build in compared.items():
        runs = [train(split(scenario="class", seed=seed), build(), seed) for seed in range(options.seeds)]
        found = [run.metrics() for run in runs]
        columns = ("final_average_accuracy", "task_restricted_accuracy", "forgetting")
        texts = [mean([metrics[column] for metrics in found]) for column in columns]
        seconds = fmean(run.seconds["train"] for run in runs)
        print(f"{name:12} {texts[0]:>18} {texts[1]:>14} {texts[2]:>14} {seconds:9.1f}")
        told = [train(split(scenario="task", seed=seed), build(), seed) for seed in range(options.seeds)]
        for panel, group in zip(panels, (runs, told), strict=True):
            curve = np.mean([averages(run) for run in group], axis=0)
            panel.plot(range(1, len(curve) + 1), curve, "o-", label=name)
    for panel, title in zip(panels, ("Nobody says which task it is", "The task is told"), strict=True):
        panel.set(title=title, xlabel="Tasks learned", xticks=range(1, 6), ylim=(0, 1.03))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("Average accuracy on the tasks so far")
    panels[0].legend()
    save(figure, "methods")


def order() -> None:
    """EWC on the same tasks, from easy to hard, from hard to easy, and in random order."""
    orders = ("easy_to_hard", "hard_to_easy", "random")
    figure, panel = plt.subplots(figsize=(6, 4.5), layout="constrained")
    print(f"{'':14} {'fine-tuning':>14} {'EWC':>14} {'forgetting':>14}   order of the first seed")
    for name in orders:
        streams = [split(scenario="domain", seed=seed).reordered(name) for seed in range(options.seeds)]
        plain = [train(stream, [], seed) for seed, stream in enumerate(streams)]
        runs = [train(stream, [EWC(strength=1000)], seed) for seed, stream in enumerate(streams)]
        texts = [mean([run.metrics()["final_average_accuracy"] for run in group]) for group in (plain, runs)]
        texts.append(mean([run.metrics()["forgetting"] for run in runs]))
        names = " | ".join(task.name for task in streams[0])
        print(f"{name:14} {texts[0]:>14} {texts[1]:>14} {texts[2]:>14}   {names}")
        curve = np.mean([averages(run) for run in runs], axis=0)
        panel.plot(range(1, len(curve) + 1), curve, "o-", label=name.replace("_", " "))
    panel.set(title="EWC, domain-incremental", xlabel="Tasks learned", xticks=range(1, 6), ylim=(0.4, 1.03))
    panel.set_ylabel("Average accuracy on the tasks so far")
    panel.grid(alpha=0.3)
    panel.legend()
    save(figure, "order")


STRENGTHS, CAPACITIES = (0, 10, 100, 1000, 10_000), (0, capacity // 5, capacity, 4 * capacity)


def hybrid() -> None:
    """EWC beside replay: which combination is best, and does it beat either alone?

    The pair is chosen on a tenth of the training images that is held out, and then compared on the test images.
    """
    arrays = perdure.data.load(options.data)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for panel, scenario in zip(panels, ("class", "domain"), strict=True):
        make = {"class": class_incremental, "domain": domain_incremental}[scenario]
        prepare = split(scenario=scenario).prepare
        held_out = make((arrays.x, arrays.y), tasks=5, test_fraction=0.1, seed=100, prepare=prepare)
        table = np.array([[_accuracy(held_out, pair(s, c), 100) for c in CAPACITIES] for s in STRENGTHS])
        row, column = np.unravel_index(table.argmax(), table.shape)
        strength, size = STRENGTHS[row], CAPACITIES[column]
        alone = {"EWC alone": (STRENGTHS[int(table[:, 0].argmax())], 0), "replay alone": (0, size)}
        print(f"{scenario}-incremental, accuracy on held-out training images; rows: strength, columns: capacity")
        print(f"{'':8} " + " ".join(f"{size:>6}" for size in CAPACITIES))
        for s, values in zip(STRENGTHS, table, strict=True):
            print(f"{s:>8} " + " ".join(f"{100 * value:6.1f}" for value in values))
        for name, (s, c) in {**alone, "together": (strength, size)}.items():
            scores = [_accuracy(split(scenario=scenario, seed=k), pair(s, c), k) for k in range(options.seeds)]
            print(f"{name:14} strength {s:>6}, capacity {c:>5}: {mean(scores)} on the test images")
        panel.imshow(table, cmap="viridis", aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            dark = value < (table.min() + table.max()) / 2
            panel.text(j, i, f"{100 * value:.1f}", ha="center", va="center", color="white" if dark else "black")
        panel.set(title=f"{scenario}-incremental", xlabel="Replay: capacity", ylabel="EWC: strength")
        panel.set_xticks(range(len(CAPACITIES)), CAPACITIES)
        panel.set_yticks(range(len(STRENGTHS)), STRENGTHS)
    save(figure, "hybrid")


def pair(strength: float, size: int) -> list[Method]:
    """EWC and replay; each is left out where it is 0."""
    return [*([EWC(strength=strength)] if strength else []), *([Replay(capacity=size)] if size else [])]


def _accuracy(stream: perdure.Stream, methods: list[Method], seed: int) -> float:
    return float(train(stream, methods, seed).metrics()["final_average_accuracy"])


# EWC alone where classes arrive is known to fail, and is here to show it.
warnings.simplefilter("ignore", perdure.errors.PerdureWarning)
{"methods": methods, "order": order, "hybrid": hybrid}[options.exercise]()
