"""What a run leaves behind: the accuracy matrix with its metrics, what it cost, and where it came from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perdure import metrics as m
from perdure.comparison import Comparison, compare, human_bytes, human_seconds, label_of, summarise
from perdure.errors import CheckpointError, MissingExtraError, StorageError, UsageError
from perdure.files import write_atomically
from perdure.metrics import Array
from perdure.pictures import Pictures, read_pictures, write_pictures

__all__ = ["Comparison", "Results", "View", "compare", "summarise"]

FORMAT = 1
FILE_NAME = "results.json"
SCENARIOS = ("task", "domain", "class", "online", "blurry")
ONE_OUTPUT = ("class", "online", "blurry")


def kind_of(scenario: str) -> str:
    """What a stream of a scenario is called: `class-incremental`, `online`."""
    return scenario if scenario in ("online", "blurry") else f"{scenario}-incremental"


View = dict[str, Array]
"""One way to score the same outputs: `matrix` [T, T] and `untrained` [T]."""


@dataclass(eq=False)
class Results:
    """The accuracies of one run of one seed, what they cost, and what made them.

    Parameters
    ----------
    scenario
        `task`, `domain`, `class`, `online` or `blurry`.
    task_names
        T names in order of arrival.
    benchmark, methods, seed, versions
        What was run; no method is fine-tuning.
    matrix
        [T, T]; `matrix[i, j]` is the accuracy on task j after task i as a fraction, NaN where not evaluated or not
        defined. In a class-incremental stream it is over all classes seen, in a task-incremental one over the task's.
    untrained
        [T], the accuracy before any training.
    test_sizes
        [T] int64, examples in each test set.
    class_incremental, task_restricted
        Both views from the same outputs, `None` where a view does not exist.
    seconds
        Wall time of `train`, `evaluate` and `total`.
    state_bytes
        What is kept between tasks (model, buffers, importances), by component.
    peak_memory_bytes, passes
        The highest use of memory; `forward_rows`, `backward_rows` and `steps`.
    history
        Evaluations made while a task was trained: `{"task": i, "step": s, "accuracies": [T]}`; the one at the end of a
        task is a row of the matrix and not repeated here.
    prequential
        `correct` and `rows`, one number a task each: examples that were predicted rightly before the update that
        learned from them, and how many there were; None where they were not counted.
    extra
        Further named numbers, such as a calibration error; they join `metrics()`.
    pictures
        PNG files by method and by index of the task after which they were made; they lie beside `results.json` and are
        no part of it.

    >>> results = Results("domain", ["a", "b"], [[0.75, 0.5], [0.5, 1.0]], [0.5, 0.25], methods=["ewc"])
    >>> results.metrics()["final_average_accuracy"], results.metrics()["forgetting"]
    (0.75, 0.25)
    >>> results.reasons()["minimum_accuracy"]
    'minimum accuracy needs evaluations during training; none were made (evaluate_every)'
    """

    scenario: str
    task_names: list[str]
    matrix: Array
    untrained: Array
    benchmark: str = ""
    methods: list[str] = field(default_factory=list)
    seed: int = 0
    test_sizes: npt.NDArray[np.int64] | None = None
    class_incremental: View | None = None
    task_restricted: View | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    state_bytes: dict[str, int] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    passes: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, float | None] = field(default_factory=dict)
    pictures: Pictures = field(default_factory=dict)
    prequential: dict[str, list[Any]] | None = None

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise UsageError(f"unknown scenario '{self.scenario}'; {', '.join(SCENARIOS)} are allowed")
        self.task_names = list(self.task_names)
        tasks = len(self.task_names)
        self.matrix = _floats(self.matrix, (tasks, tasks), "matrix")
        self.untrained = _floats(self.untrained, (tasks,), "untrained")
        if self.test_sizes is not None:
            self.test_sizes = _floats(self.test_sizes, (tasks,), "test_sizes").astype(np.int64)
        for name in ("class_incremental", "task_restricted"):
            view = getattr(self, name)
            if view is not None:
                matrix = _floats(view["matrix"], (tasks, tasks), f"{name} matrix")
                untrained = _floats(view["untrained"], (tasks,), f"{name} untrained")
                setattr(self, name, {"matrix": matrix, "untrained": untrained})
        self.history = [
            {**entry, "accuracies": _floats(entry["accuracies"], (tasks,), "accuracies in the history").tolist()}
            for entry in self.history
        ]
        self.extra = _nullable(self.extra)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Results) and self.to_dict() == other.to_dict()

    @property
    def label(self) -> str:
        """The methods in one word: `"ewc+replay"`, or `"finetune"` without any."""
        return "+".join(self.methods) or "finetune"

    def metrics(self) -> dict[str, float | None]:
        """Every named metric as a fraction; `None` where it is not defined, and then `reasons()` says why."""
        return {name: None if isinstance(value, str) else value for name, value in self._named().items()}

    def reasons(self) -> dict[str, str]:
        """For each metric that is `None`, the sentence that says why."""
        return {name: value for name, value in self._named().items() if isinstance(value, str)}

    def _named(self) -> dict[str, float | str]:
        named = {name: self._value_or_reason(name, compute) for name, compute in self._definitions().items()}
        extra = {name: f"{name} was not measured" if value is None else value for name, value in self.extra.items()}
        return {**named, **extra}

    def _value_or_reason(self, name: str, compute: Callable[[], float | None]) -> float | str:
        label = m.DESCRIPTIONS[name].label
        if name == "forward_transfer" and self.scenario == "class" and len(self.matrix) > 1:
            return f"{label} needs an accuracy before training; class-incremental columns do not exist then"
        if name in ("minimum_accuracy", "worst_case_accuracy", "average_anytime_accuracy") and not self.history:
            return f"{label} needs evaluations during training; none were made (evaluate_every)"
        if name == "prequential_accuracy" and self.prequential is None:
            return (
                f"{label} is counted on online and blurry streams, elsewhere with prequential=True, and not where a "
                "method replaces the step or the prediction"
            )
        if name == "average_incremental_accuracy" and self._one_output and self.test_sizes is None:
            return f"{label} needs the test set sizes, because class-incremental it counts every example once"
        if name == "task_inference_accuracy" and self.scenario == "domain":
            return f"{label} needs tasks with classes of their own; domain-incremental tasks share theirs"
        if name in ("task_restricted_accuracy", "task_inference_accuracy") and self.task_restricted is None:
            return f"{label} needs the task-restricted view, which this run does not have"
        if name == "task_inference_accuracy" and self.class_incremental is None:
            return f"{label} needs the class-incremental view, which this run does not have"
        try:
            value = compute()
        except UsageError as error:
            return str(error)
        if value is None:
            alone = len(self.matrix) == 1
            return f"{label} needs a second task" if alone else f"{label} is not defined: it would divide by 0"
        return value

    @property
    def _one_output(self) -> bool:
        return self.scenario in ONE_OUTPUT

    def _definitions(self) -> dict[str, Callable[[], float | None]]:
        R, sizes = self.matrix, self.test_sizes if self._one_output else None
        return {
            "final_average_accuracy": lambda: m.average_accuracy(R),
            "average_incremental_accuracy": lambda: m.average_incremental_accuracy(R, test_sizes=sizes),
            "forgetting": lambda: m.forgetting(R),
            "backward_transfer": lambda: m.backward_transfer(R),
            "forward_transfer": lambda: m.forward_transfer(R, self.untrained),
            "learning_accuracy": lambda: m.learning_accuracy(R),
            "task_restricted_accuracy": lambda: m.average_accuracy(_matrix(self.task_restricted)),
            "task_inference_accuracy": lambda: m.task_inference_accuracy(
                _matrix(self.class_incremental), _matrix(self.task_restricted)
            ),
            "minimum_accuracy": lambda: m.minimum_accuracy(R, self.history),
            "worst_case_accuracy": lambda: m.worst_case_accuracy(R, self.history),
            "average_anytime_accuracy": lambda: m.average_anytime_accuracy(R, self.history),
            "prequential_accuracy": self._prequential_accuracy,
            "stability": lambda: m.stability(R),
            "stability_plasticity": lambda: m.harmonic_mean(m.stability(R), m.plasticity(R)),
        }

    def _prequential_accuracy(self) -> float | None:
        assert self.prequential is not None
        rows = sum(self.prequential["rows"])
        return float(sum(self.prequential["correct"]) / rows) if rows else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary; accuracies are fractions and NaN is `None`."""
        return {
            "format": FORMAT,
            "benchmark": self.benchmark,
            "scenario": self.scenario,
            "methods": list(self.methods),
            "seed": self.seed,
            "task_names": list(self.task_names),
            "metrics": self.metrics(),
            "reasons": self.reasons(),
            "matrix": _nullable(self.matrix.tolist()),
            "untrained": _nullable(self.untrained.tolist()),
            "test_sizes": None if self.test_sizes is None else self.test_sizes.tolist(),
            "class_incremental": _view_to_dict(self.class_incremental),
            "task_restricted": _view_to_dict(self.task_restricted),
            "seconds": dict(self.seconds),
            "state_bytes": dict(self.state_bytes),
            "peak_memory_bytes": self.peak_memory_bytes,
            "passes": dict(self.passes),
            "history": _nullable(self.history),
            "prequential": self.prequential,
            "versions": dict(self.versions),
            "extra": dict(self.extra),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Results:
        """The inverse of `to_dict`; the metrics are computed again from the matrix.

        Raises
        ------
        CheckpointError
            If the dictionary is of another format version or lacks something.
        """
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise CheckpointError(f"these results have format {found!r}, but this version of perdure reads {FORMAT}")
        derived = ("format", "metrics", "reasons")
        try:
            return cls(**{name: value for name, value in data.items() if name not in derived})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(f"these results are damaged: {error}") from error

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `results.json` into `folder`, whole or not at all, and return its path; pictures go beside it."""
        write_pictures(Path(folder), self.pictures)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        return write_atomically(Path(folder) / FILE_NAME, text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Read a run's folder or its `results.json`.

        Raises
        ------
        StorageError
            If there is no such file.
        CheckpointError
            If it is not valid JSON, of another format version, or damaged.
        """
        file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        try:
            data = json.loads(file.read_bytes(), parse_constant=_refuse)
        except OSError as error:
            raise StorageError(f"cannot read {file}: {error.strerror or error}") from error
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged or no perdure result: not valid JSON ({error})") from error
        try:
            results = cls.from_dict(data)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from error
        results.pictures = read_pictures(file.parent)
        return results

    def to_pandas(self) -> Any:
        """A tidy `DataFrame`: one row for each task trained and task tested; `after` is -1 before any training.

        Raises
        ------
        MissingExtraError
            If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("a data frame needs pandas; pip install 'perdure[pandas]' installs it") from error
        views = {"accuracy": {"matrix": self.matrix, "untrained": self.untrained}}
        if self.class_incremental is not None:
            views["class_incremental"] = self.class_incremental
        if self.task_restricted is not None:
            views["task_restricted"] = self.task_restricted
        origin = {"benchmark": self.benchmark, "scenario": self.scenario, "method": self.label, "seed": self.seed}
        rows = []
        for i in range(-1, len(self.matrix)):
            for j, name in enumerate(self.task_names):
                scores = {
                    key: float(view["untrained"][j] if i < 0 else view["matrix"][i, j]) for key, view in views.items()
                }
                rows.append({**origin, "after": i, "task": j, "task_name": name, **scores})
        return pandas.DataFrame(rows)

    def __str__(self) -> str:
        title = f"{self.label} on {self.benchmark or 'a stream'} ({kind_of(self.scenario)}, seed {self.seed})"
        lines = [title, "", "accuracy in %: after each task (rows) on each task (columns)", *self._matrix_lines(), ""]
        reasons, values = self.reasons(), self.metrics()
        width = max(len(label_of(name)) for name in values)
        for name, value in values.items():
            if value is not None:
                shown = f"{value:6.4g}" if name in self.extra else f"{100 * value:6.2f} %"
                lines.append(f"{label_of(name):<{width}}  {shown}{self._remark(name)}")
        lines += [f"{label_of(name):<{width}}       -    {why}" for name, why in reasons.items()]
        costs = {"time": ", ".join(f"{name} {human_seconds(s)}" for name, s in self.seconds.items())}
        if self.peak_memory_bytes is not None:
            costs["peak memory"] = human_bytes(self.peak_memory_bytes)
        parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in self.state_bytes.items())
        costs["state kept"] = f"{parts} = {human_bytes(sum(self.state_bytes.values()))}" if parts else "nothing"
        return "\n".join([*lines, "", *(f"{name:<{width}}  {cost}" for name, cost in costs.items() if cost)])

    def _matrix_lines(self) -> list[str]:
        names = [name if len(name) <= 12 else name[:11] + "…" for name in self.task_names]
        width = max(6, *(len(name) for name in names))
        rows = [("untrained", self.untrained)] if not np.isnan(self.untrained).all() else []
        rows += [(f"after {name}", row) for name, row in zip(names, self.matrix, strict=True)]
        left = max(len(name) for name, _ in rows)
        lines = [" " * left + "".join(f"  {name:>{width}}" for name in names)]
        for name, row in rows:
            cells = ("-" if np.isnan(value) else f"{100 * value:.2f}" for value in row)
            lines.append(f"{name:<{left}}" + "".join(f"  {cell:>{width}}" for cell in cells))
        return lines

    def _remark(self, name: str) -> str:
        if name == "average_incremental_accuracy":
            return "  every example counts once" if self._one_output else "  every task counts once"
        if name in ("minimum_accuracy", "worst_case_accuracy", "average_anytime_accuracy"):
            return f"  over {len(self.history)} evaluations during training and {len(self.matrix)} after a task"
        return ""


def _matrix(view: View | None) -> Array:
    assert view is not None
    return view["matrix"]


def _floats(values: Any, shape: tuple[int, ...], name: str) -> Array:
    array = np.array(values, dtype=np.float64)
    if array.shape != shape:
        raise UsageError(f"{name} must have shape {list(shape)}, not {list(array.shape)}")
    if np.isinf(array).any():
        raise UsageError(f"{name} must hold finite numbers or NaN, not infinity")
    return array


def _nullable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nullable(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_nullable(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _view_to_dict(view: View | None) -> dict[str, Any] | None:
    return None if view is None else {key: _nullable(np.asarray(array).tolist()) for key, array in view.items()}


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")
