"""What a search is, in typed fields: the experiment whose settings are chosen, the space, and how it is searched."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from perdure.errors import UsageError
from perdure.experiments.config import Experiment, Train
from perdure.experiments.typed import arguments, into
from perdure.registry import methods, models
from perdure.tuning.space import Choices, Range, Space, space_of

TUNING_SEED = 1000
LEARNING_RATE = "train.lr"
Sampler = Literal["grid", "random", "tpe", "halving"]
Policy = Literal["score", "chf"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a space is searched.

    `policy` "score" takes the best final average accuracy; "chf" is the continual hyper-parameter framework. `trials`
    are those of a sampler that draws; `tasks` how many tasks from the beginning are looked at, `held_out` the share of
    their training data that scores, `seed` that of stream, model and draws. Halving gives every configuration `grace`
    epochs (or steps, where the experiment counts these) and the best of `reduction` so many times more. The framework
    multiplies the strength by `decay` until the new task loses no more than the share `tolerance` of its accuracy.
    """

    policy: Policy = "score"
    sampler: Sampler = "tpe"
    trials: int = 20
    tasks: int = 3
    held_out: float = 0.1
    seed: int = TUNING_SEED
    grace: int | None = None
    reduction: int = 3
    tolerance: float = 0.2
    decay: float = 0.5

    def __post_init__(self) -> None:
        for name, low in (("trials", 1), ("tasks", 1), ("seed", 0), ("grace", 1), ("reduction", 2)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"tune.{name} is {value}, it must be at least {low}")
        for name in ("held_out", "decay", "tolerance"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"tune.{name} is {getattr(self, name):g}, it must be above 0 and below 1")


@dataclass(frozen=True)
class Tuning:
    """A search: `written` is the experiment as far as it is written, which the chosen values complete.

    >>> tuning = Tuning.from_mapping({"methods": ["ewc"], "space": {"ewc.strength": [1, 100]}, "tune": {"tasks": 2}})
    >>> tuning.experiment({"ewc.strength": 100}).methods[0].arguments["strength"], tuning.rules.tasks
    (100.0, 2)
    """

    written: dict[str, Any]
    overrides: tuple[str, ...]
    space: Space
    rules: Rules

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> Tuning:
        """The search that a file's content and `SECTION.KEY=VALUE` overrides of the experiment describe.

        Raises
        ------
        UsageError
            If a key, a value, or one of the values to choose from cannot work; the sentence says which.
        """
        written = {key: value for key, value in mapping.items() if key not in ("space", "tune", "overrides")}
        kept = [*(mapping.get("overrides") or ()), *overrides]
        if "space" not in mapping:
            raise UsageError("there is nothing to choose: the key 'space' is missing, such as space: {train.lr: [0.1]}")
        rules = into(Rules, mapping.get("tune") or {}, "tune")
        tuning = cls(written, tuple(kept), space_of(mapping["space"]), rules)
        base = Experiment.from_mapping(written, kept)
        tuning = dataclasses.replace(tuning, space={k: _typed(base, k, v) for k, v in tuning.space.items()})
        tuning._check(base)
        return tuning

    def experiment(self, chosen: Mapping[str, Any]) -> Experiment:
        """The experiment with the chosen values."""
        values = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
        return Experiment.from_mapping(self.written, [*self.overrides, *values])

    def trial(self, chosen: Mapping[str, Any], budget: int | None, bare: bool) -> Experiment:
        """What a trial trains: cut to the budget, without methods if `bare`, evaluated at the end of tasks alone."""
        whole = self.experiment(chosen)
        changes: dict[str, Any] = {"eval_future": False, "evaluate_every": None, "checkpoint_every": None}
        if budget is not None:
            changes["epochs" if whole.train.steps is None else "steps"] = budget
        kept = () if bare else whole.methods
        return dataclasses.replace(
            whole,
            methods=kept,
            train=dataclasses.replace(whole.train, **changes),
            seeds=(self.rules.seed,),
            threads=whole.threads or 1,
        )

    def budgets(self) -> list[int]:
        """Epochs or steps of every rung of halving, the last of them all that the experiment has.

        Raises
        ------
        UsageError
            If there are not enough to cut.
        """
        train, rules = self.experiment({}).train, self.rules
        name = "epochs" if train.steps is None else "steps"
        full = train.epochs if train.steps is None else train.steps
        grace = rules.grace or (2 if train.steps is None else max(1, full // rules.reduction**2))
        if full <= grace:
            raise UsageError(
                f"halving begins with {grace} {name}, and train.{name} is {full}; give more, or a smaller tune.grace"
            )
        budgets = [grace]
        while budgets[-1] * rules.reduction < full:
            budgets.append(budgets[-1] * rules.reduction)
        return [*budgets, full]

    def stability(self) -> str:
        """The strength that the continual hyper-parameter framework relaxes: what there is beside the learning rate.

        Raises
        ------
        UsageError
            If the space does not have the form that the framework needs.
        """
        others = [key for key in self.space if key != LEARNING_RATE]
        if LEARNING_RATE not in self.space or len(others) != 1:
            raise UsageError(
                f"policy chf chooses {LEARNING_RATE} and then relaxes one strength, such as ewc.strength; the space "
                f"has {', '.join(self.space)}"
            )
        (key,) = others
        entry = self.space[key]
        if not isinstance(entry, Range) or entry.low <= 0:
            raise UsageError(
                f"policy chf relaxes {key} from high to low by a factor; give it a mapping with low above 0 and high"
            )
        if key.split(".")[0] not in {part.name for part in self.experiment({}).methods}:
            raise UsageError(f"policy chf relaxes the strength of a method, and {key} is none")
        return key

    def to_mapping(self) -> dict[str, Any]:
        """As it stands in a file: `Tuning.from_mapping(t.to_mapping()) == t`."""
        return {
            **self.written,
            "overrides": list(self.overrides),
            "space": {key: entry.to_plain() for key, entry in self.space.items()},
            "tune": dataclasses.asdict(self.rules),
        }

    def identity(self) -> str:
        """What a study must agree in to be continued: everything but where it runs and, if more change nothing, trials.

        Of halving the number of trials decides who is promoted, so it counts.
        """
        mapping = {**self.to_mapping(), "experiment": self.experiment({}).to_mapping()}
        mapping = {key: value for key, value in mapping.items() if key not in self.written and key != "overrides"}
        for place in ("device", "threads", "data_root", "seeds"):
            mapping["experiment"].pop(place)
        if self.rules.sampler != "halving":
            mapping["tune"] = {key: value for key, value in mapping["tune"].items() if key != "trials"}
        return json.dumps(mapping, sort_keys=True)

    def _check(self, base: Experiment) -> None:
        if self.rules.seed in base.seeds:
            raise UsageError(
                f"tune.seed is {self.rules.seed}, which is among the seeds to be reported ({_listed(base.seeds)}); "
                "choose on another"
            )
        first = {key: entry.ends[0] for key, entry in self.space.items()}
        for key, entry in self.space.items():
            for value in entry.ends:
                try:
                    self.experiment({**first, key: value})
                except UsageError as error:
                    raise UsageError(f"space.{key} cannot be {json.dumps(value)}: {error}") from error
        if self.rules.policy == "chf":
            self.stability()
        elif self.rules.sampler == "halving":
            for key in ("train.epochs", "train.steps"):
                if key in self.space:
                    raise UsageError(f"halving cuts {key} itself; leave it out of the space")
            self.budgets()


def _typed(base: Experiment, key: str, entry: Choices | Range) -> Choices | Range:
    """A range of whole numbers where the setting takes no others; only whole ends make sense there."""
    if isinstance(entry, Choices) or not _is_whole(base, key):
        return entry
    if entry.low != int(entry.low) or entry.high != int(entry.high):
        raise UsageError(f"space.{key} goes from {entry.low:g} to {entry.high:g}, but it takes whole numbers")
    if entry.step is not None and entry.step != int(entry.step):
        raise UsageError(f"space.{key} has step: {entry.step:g}, but it takes whole numbers")
    return dataclasses.replace(entry, whole=True, low=int(entry.low), high=int(entry.high))


def _is_whole(base: Experiment, key: str) -> bool:
    section, _, name = key.partition(".")
    if section == "train":
        target: Any = Train
    elif section == "model":
        target = models.get(base.model.name)
    elif section == "stream":
        target = base.source.builder
    elif section in methods.names():
        target = methods.get(section)
    else:
        return False
    found = arguments(target).get(name)
    if found is None:
        return False
    kinds = get_args(found.annotation) or (found.annotation,)
    return int in kinds and float not in kinds


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) if len(seeds) < 5 else f"{seeds[0]} to {seeds[-1]}"
