"""The grid search of the Neurenix document, on the searches of `perdure.tuning`."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perdure.data.validation import check_inputs, check_targets
from perdure.errors import DataError, DivergedError, PerdureWarning, UsageError
from perdure.methods.side_passes import eval_mode
from perdure.registry import nearest
from perdure.seeding import derive, generator
from perdure.streams.task import draw_plan
from perdure.tree import rows as row_count
from perdure.tree import take, to_device
from perdure.tuning.searches import Listed
from perdure.tuning.space import entry_of, grid_of
from perdure.tuning.trials import Memory, Outcome, Trial, Unit
from perdure.tuning.working import work

DEFAULT_OPTIMIZER = partial(torch.optim.Adam, lr=1e-3)

Score = Callable[[nn.Module, Any, Tensor], float]


class GridSearch:
    """Try every combination of a wrapper's arguments on a sequence of tasks, by cross-validation.

    Each combination learns the tasks one after another, `cv` times, each time with another part of every class left
    out; its score is the mean over the tasks, after the last of them, on what was left out. Combinations begin with the
    same weights and see the same batches.

    Parameters
    ----------
    model_fn
        Called with a combination as keyword arguments; returns a wrapper such as `perdure.continual.EWC`.
    param_space
        Argument -> list of values.
    scoring
        "accuracy", or a function of the model in evaluation mode, inputs and targets of one task: higher is better.
    cv
        The number of parts, at least 2.
    tasks
        How many tasks the classes of `fit` are split into; default: two classes each.
    epochs, batch_size, optimizer, loss_fn, seed
        Of the training; `optimizer` is called with the model's parameters.

    >>> from perdure.continual import EWC
    >>> def create(importance: float = 1.0) -> EWC:
    ...     return EWC(nn.Linear(3, 4), importance=importance)
    >>> search = GridSearch(create, {"importance": [0.0, 10.0]}, scoring="accuracy", cv=2)
    >>> y = torch.arange(40) % 4
    >>> search.fit(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), y).best_params() in (
    ...     {"importance": 0.0}, {"importance": 10.0})
    True
    """

    def __init__(
        self,
        model_fn: Callable[..., Any],
        param_space: Mapping[str, Sequence[Any]],
        scoring: str | Score = "accuracy",
        cv: int = 3,
        *,
        tasks: int | None = None,
        epochs: int = 1,
        batch_size: int = 32,
        optimizer: Callable[..., Any] = DEFAULT_OPTIMIZER,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(param_space, Mapping) or not param_space:
            raise UsageError(f"param_space is {param_space!r}, it must map arguments of model_fn to lists of values")
        if not callable(scoring) and scoring != "accuracy":
            raise UsageError(
                f"scoring is {scoring!r}, it must be 'accuracy' or a function of model, inputs and targets"
            )
        if cv < 2:
            raise UsageError(f"cv is {cv}, it must be at least 2")
        for name, value in (("tasks", tasks), ("epochs", epochs)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, it must be at least 1")
        _check_names(model_fn, param_space)
        space = {key: entry_of(key, list(values)) for key, values in param_space.items()}
        self.search = Listed(tuple(Unit(f"grid {i}", values) for i, values in enumerate(grid_of(space))))
        self.model_fn, self.cv, self.tasks, self.epochs, self.batch_size = model_fn, cv, tasks, epochs, batch_size
        self.scoring: Score = scoring if callable(scoring) else accuracy
        self.optimizer, self.seed = optimizer, seed
        self.loss_fn = nn.CrossEntropyLoss() if loss_fn is None else loss_fn
        self._trials: dict[str, Trial] = {}

    def fit(self, X: Any, y: Any, task_ids: Any = None) -> GridSearch:
        """Try every combination.

        Parameters
        ----------
        X
            Inputs [N, ...], an array or a tensor.
        y
            Class labels [N].
        task_ids
            Int [N], the task of every row; tasks come in the order of their numbers. Default: the classes in ascending
            order are split into tasks.

        Raises
        ------
        DataError
            If the data cannot be used, or a task has too few rows to leave some out.
        UsageError
            If `model_fn` gives no wrapper, or no combination has a score.
        """
        x, targets = check_inputs(X), check_targets(y)
        if row_count(x) != len(targets):
            raise DataError(f"there are {row_count(x):,} inputs but {len(targets):,} targets; every input needs one")
        if targets.is_floating_point() or targets.ndim != 1:
            raise DataError(f"y has shape {list(targets.shape)} and type {targets.dtype}; give one class label a row")
        parts = self._split(targets, None if task_ids is None else check_targets(task_ids))
        folds = [self._fold(targets, part) for part in parts]
        memory = Memory()

        def evaluate(unit: Unit, params: Mapping[str, Any]) -> Outcome:
            begun = time.perf_counter()
            try:
                scores = [self._score(params, x, targets, parts, folds, number) for number in range(self.cv)]
            except DivergedError as error:
                return Outcome(None, time.perf_counter() - begun, str(error))
            return Outcome(sum(scores) / len(scores), time.perf_counter() - begun)

        work(memory, self.search, evaluate, lambda unit, ledger: {})
        self._trials = memory.look()[0]
        self._best()
        return self

    def best_params(self) -> dict[str, Any]:
        """The combination with the best score; of several as good, the first.

        Raises
        ------
        UsageError
            Before `fit`.
        """
        return dict(self._best().params)

    def best_score(self) -> float:
        """The score of `best_params`."""
        return self._best().score

    def results(self) -> list[dict[str, Any]]:
        """Every combination with its `score` (None if it diverged) and `seconds`, in the order of the grid."""
        trials = [self._trials[unit.key] for unit in self.search.units if unit.key in self._trials]
        return [
            {"params": dict(trial.params), "score": trial.outcome.score, "seconds": trial.outcome.seconds}
            for trial in trials
        ]

    def _best(self) -> Trial:
        if not self._trials:
            raise UsageError("nothing has been tried yet; call fit(X, y) first")
        return self.search.best(self._trials)

    def _split(self, targets: Tensor, task_ids: Tensor | None) -> list[Tensor]:
        """The rows of every task."""
        if task_ids is not None:
            if len(task_ids) != len(targets):
                raise DataError(f"there are {len(targets):,} rows but {len(task_ids):,} task_ids; give one a row")
            return [(task_ids == task).nonzero().flatten() for task in torch.unique(task_ids).tolist()]
        classes = torch.unique(targets)
        count = self.tasks if self.tasks is not None else max(1, len(classes) // 2)
        if count > len(classes):
            raise UsageError(f"tasks is {count}, but y has {len(classes)} classes; use fewer tasks, or pass task_ids")
        if count == 1:
            warnings.warn(
                "all rows are one task, on which nothing can be forgotten; pass task_ids, or tasks",
                PerdureWarning,
                stacklevel=3,
            )
        return [torch.isin(targets, part).nonzero().flatten() for part in classes.tensor_split(count)]

    def _fold(self, targets: Tensor, part: Tensor) -> Tensor:
        """The fold of every row of a task: the rows of every class are dealt out evenly."""
        if len(part) < self.cv:
            raise DataError(f"a task has {len(part)} rows, too few for cv={self.cv}; use a smaller cv")
        draw = generator(self.seed, "folds")
        own = targets[part]
        shuffled = torch.cat([group[torch.randperm(len(group), generator=draw)] for group in _by_label(own)])
        folds = torch.empty(len(part), dtype=torch.int64)
        folds[shuffled] = torch.arange(len(part)) % self.cv
        return folds

    def _score(
        self, params: Mapping[str, Any], x: Any, y: Tensor, parts: list[Tensor], folds: list[Tensor], number: int
    ) -> float:
        gpus = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(derive(self.seed, "fold", number) % 2**63)
            wrapper = self.model_fn(**params)
            if not (hasattr(wrapper, "train_step") and isinstance(getattr(wrapper, "model", None), nn.Module)):
                raise UsageError(
                    f"model_fn gave a {type(wrapper).__name__}; it must return a wrapper such as perdure.continual.EWC"
                )
            optimizer = self.optimizer(wrapper.model.parameters())
            for task, (part, fold) in enumerate(zip(parts, folds, strict=True)):
                self._train(wrapper, optimizer, x, y, part[fold != number], task)
            scores = []
            for part, fold in zip(parts, folds, strict=True):
                held = part[fold == number]
                device = next(wrapper.model.parameters()).device
                with torch.no_grad(), eval_mode(wrapper.model):
                    scores.append(
                        float(self.scoring(wrapper.model, to_device(take(x, held), device), y[held].to(device)))
                    )
        return sum(scores) / len(scores)

    def _train(self, wrapper: Any, optimizer: Any, x: Any, y: Tensor, rows: Tensor, task: int) -> None:
        plan = draw_plan(len(rows), (self.seed, "grid search", task), epochs=self.epochs, batch_size=self.batch_size)
        batches = [rows[batch] for batch in plan]
        if hasattr(wrapper, "register_task"):
            once = [(take(x, batch), y[batch]) for batch in batches[: -(-len(rows) // self.batch_size)]]
            takes_data = "dataloader" in inspect.signature(wrapper.register_task).parameters
            wrapper.register_task(task, *([once] if takes_data else []))
        wrapper.model.train()
        for batch in batches:
            inputs, targets = take(x, batch), y[batch]
            if hasattr(wrapper, "add_to_memory"):
                wrapper.add_to_memory(inputs, targets, task)
            wrapper.train_step(optimizer, self.loss_fn, inputs, targets, task)


def accuracy(model: nn.Module, inputs: Any, targets: Tensor) -> float:
    """The share of rows whose largest output is that of their class."""
    return float((model(inputs).argmax(dim=1) == targets).float().mean())


def _by_label(labels: Tensor) -> list[Tensor]:
    return [(labels == label).nonzero().flatten() for label in torch.unique(labels)]


def _check_names(model_fn: Callable[..., Any], param_space: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(model_fn).parameters
    except (TypeError, ValueError):
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in param_space:
        if name not in parameters:
            raise UsageError(
                f"model_fn takes no argument '{name}'{nearest(name, parameters) or ';'} "
                f"it takes {', '.join(parameters)}"
            )
