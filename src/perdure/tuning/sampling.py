"""Values drawn by optuna's samplers, each draw from its own seed and from what has finished alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from perdure.errors import MissingExtraError
from perdure.seeding import Part, derive
from perdure.tuning.space import Choices, Range, Space

MOST_STARTS, STARTS_SHARE = 10, 3


def optuna() -> Any:
    """The package optuna, without its talk.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("perdure tune needs optuna; pip install 'perdure[tune]' installs it") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def drawn(
    space: Space,
    sampler: str,
    seed: Sequence[Part],
    finished: Sequence[tuple[Mapping[str, Any], float | None]] = (),
    running: Sequence[Mapping[str, Any]] = (),
    trials: int = 1,
) -> dict[str, Any]:
    """Values for one trial.

    Parameters
    ----------
    sampler
        "random", or "tpe": the tree-structured Parzen estimator (J. Bergstra et al., 2011), which draws at random until
        a third of the `trials`, at most 10, have finished.
    seed
        Of this draw alone, so that it does not depend on who else draws.
    finished
        The values of earlier trials and their scores, None for one that diverged.
    running
        The values of trials in hand, which should not be drawn once more.
    """
    package = optuna()
    distributions = {key: distribution(entry) for key, entry in space.items()}
    number = derive("draw", *seed) % 2**32
    if sampler == "random":
        chosen = package.samplers.RandomSampler(seed=number)
    else:
        starts = max(2, min(MOST_STARTS, trials // STARTS_SHARE))
        chosen = package.samplers.TPESampler(seed=number, n_startup_trials=starts, constant_liar=True)
    study = package.create_study(direction="maximize", sampler=chosen)
    states = package.trial.TrialState
    for params, score in finished:
        state = {"state": states.PRUNED} if score is None else {"value": score}
        study.add_trial(_trial(package, params, distributions, space, state))
    for params in running:
        study.add_trial(_trial(package, params, distributions, space, {"state": states.RUNNING}))
    trial = study.ask(distributions)
    return {key: _value(entry, trial.params[key]) for key, entry in space.items()}


def importances(space: Space, finished: Sequence[tuple[Mapping[str, Any], float]]) -> dict[str, float]:
    """How much of the difference between good and other trials each setting makes, as shares that add up to 1.

    Source: S. Watanabe, A. Bansal, F. Hutter, PED-ANOVA, 2023, arXiv:2304.10255. Empty if there are too few trials to
    say, or all scores are the same.
    """
    import warnings

    if len({score for _, score in finished}) < 2:
        return {}
    package = optuna()
    distributions = {key: distribution(entry) for key, entry in space.items()}
    study = package.create_study(direction="maximize")
    for params, score in finished:
        study.add_trial(_trial(package, params, distributions, space, {"value": score}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = package.importance.PedAnovaImportanceEvaluator()
        found = package.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(value) for key, value in found.items()}


def _trial(package: Any, params: Mapping[str, Any], distributions: Any, space: Space, state: dict[str, Any]) -> Any:
    inner = {key: inner_value(entry, params[key]) for key, entry in space.items()}
    return package.trial.create_trial(params=inner, distributions=distributions, **state)


def distribution(entry: Choices | Range) -> Any:
    """What optuna calls an entry of a space."""
    kinds = optuna().distributions
    if isinstance(entry, Choices):
        return kinds.CategoricalDistribution(tuple(range(len(entry.values))))
    high = entry.high
    if entry.step is not None:
        high = entry.low + math.floor((entry.high - entry.low) / entry.step + 1e-9) * entry.step
    if entry.whole:
        return kinds.IntDistribution(int(entry.low), int(high), log=entry.log, step=int(entry.step or 1))
    return kinds.FloatDistribution(entry.low, high, log=entry.log, step=entry.step)


def _value(entry: Choices | Range, inner: Any) -> Any:
    """A choice is its position for optuna, because a list cannot be one there."""
    return entry.values[inner] if isinstance(entry, Choices) else inner


def inner_value(entry: Choices | Range, value: Any) -> Any:
    return entry.values.index(value) if isinstance(entry, Choices) else value
