"""What an experiment is, in typed fields: from YAML and flags, complete with defaults, and back to YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from perdure.errors import StorageError, UsageError
from perdure.experiments.presets import DEFAULT_RATES, preset_of
from perdure.experiments.sources import Source, source_of
from perdure.experiments.typed import arguments, into, structured
from perdure.registry import detectors, methods, models, nearest

FINETUNE = "finetune"
MOST_THREADS = 512
SECTIONS = ("train", "stream", "model", "boundaries")
GIVEN, HIDDEN = "given", "hidden"
HIDDEN_TASKS = ("online", "blurry")
GIVEN_TO_MODELS = ("input_shape", "outputs", "seed")


@dataclass(frozen=True, kw_only=True)
class Train:
    """How every task is trained: the arguments of `Learner` and `Learner.fit`, and the optimizer.

    `steps` counts updates a task and replaces `epochs`; `lr` left out is that of the preset, or the usual one
    of another optimizer; `fused` (torch's one kernel a step) left out is true where the preset names it, with the
    preset's optimizer; without `eval_future` tasks are evaluated only once they have come; `augment` changes the
    inputs of every step at random, current and remembered ones alike. An online or blurry stream passes once unless
    `epochs` says otherwise.
    """

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    fused: bool | None = None
    reset_optimizer: bool = False
    drop_last: bool = False
    clip_norm: float | None = None
    clip_value: float | None = None
    micro_batches: int = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    augment: Literal["flip", "crop", "crop_flip"] | None = None
    active_classes: Literal["all", "seen"] = "all"
    evaluate_every: int | None = None
    eval_future: bool = True
    checkpoint_every: int | None = None
    prequential: bool | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in DEFAULT_RATES:
            hint = nearest(self.optimizer, DEFAULT_RATES) or ";"
            raise UsageError(f"unknown train.optimizer '{self.optimizer}'{hint} there are {', '.join(DEFAULT_RATES)}")
        if self.momentum and self.optimizer not in ("sgd", "rmsprop"):
            raise UsageError(f"train.momentum is {self.momentum:g}, but only sgd and rmsprop have one")
        for name in ("epochs", "steps", "batch_size", "micro_batches", "evaluate_every", "checkpoint_every"):
            _check(name, getattr(self, name), low=1)
        for name in ("lr", "momentum", "weight_decay", "clip_norm", "clip_value"):
            _check(name, getattr(self, name), low=0)


@dataclass(frozen=True)
class Part:
    """A registered thing and all its arguments: a method or a model."""

    name: str
    arguments: dict[str, Any]

    def to_mapping(self) -> dict[str, Any]:
        """As it stands in a file."""
        return {"name": self.name, **self.arguments}


@dataclass(frozen=True)
class Experiment:
    """One benchmark, one set of methods, any number of seeds; every field has its final value.

    >>> experiment = Experiment.from_mapping({"methods": ["replay"], "train": {"epochs": 2}}, ["replay.capacity=50"])
    >>> experiment.label, experiment.methods[0].arguments["capacity"], experiment.train.epochs, experiment.seeds
    ('replay', 50, 2, (0,))
    """

    benchmark: str
    scenario: str
    methods: tuple[Part, ...]
    train: Train
    stream: dict[str, Any]
    model: Part
    boundaries: Part
    seeds: tuple[int, ...]
    device: str | None
    threads: int | None
    data_root: str | None

    @property
    def label(self) -> str:
        """The methods in one word: `"ewc+replay"`, or `"finetune"` without any."""
        return "+".join(sorted(part.name for part in self.methods)) or FINETUNE

    @property
    def source(self) -> Source:
        """Where its stream comes from."""
        return source_of(self.benchmark)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> Experiment:
        """The experiment that a file's content and `SECTION.KEY=VALUE` overrides describe.

        Raises
        ------
        UsageError
            For an unknown name or key, a value of another type or out of range; the sentence says where and what is
            allowed.
        """
        written = into(_Written, mapping)
        source = source_of(written.benchmark)
        preset = preset_of(source)
        chosen = _chosen(written.methods)
        model = _named(written.model or {}, "model", default=preset.model["name"])
        sections = {"train": _keys(written.train or {}), "stream": _keys(written.stream or {}), "model": model}
        sections["boundaries"] = _named(written.boundaries or {}, "boundaries", default=GIVEN)
        sections |= {entry["name"]: entry for entry in chosen}
        _override(sections, overrides)
        model["name"] = str(model["name"]).replace("-", "_")

        scenario = written.scenario or source.default_scenario
        once = {"epochs": 1} if scenario in HIDDEN_TASKS else {}
        train = into(Train, preset.train | once | sections["train"], "train")
        presets_own = train.optimizer == preset.train["optimizer"]
        if train.lr is None:
            train = dataclasses.replace(train, lr=preset.lr if presets_own else DEFAULT_RATES[train.optimizer])
        if train.fused is None:
            train = dataclasses.replace(train, fused=presets_own and preset.fused)
        defaults = preset.model if model["name"] == preset.model["name"] else {}
        part = _part(models, defaults | model, "model", leave_out=GIVEN_TO_MODELS)
        return cls(
            benchmark=source.name,
            scenario=scenario,
            methods=tuple(_part(methods, entry, entry["name"]) for entry in chosen),
            train=train,
            stream=source.options(sections["stream"]),
            model=part,
            boundaries=_boundaries(sections["boundaries"]),
            seeds=_seeds(written.seeds),
            device=written.device,
            threads=_check_threads(written.threads) or (1 if _wants_one_thread(part) else None),
            data_root=written.data_root,
        )

    def to_mapping(self) -> dict[str, Any]:
        """As it stands in a file, complete: `Experiment.from_mapping(e.to_mapping()) == e`."""
        return {
            "benchmark": self.benchmark,
            "scenario": self.scenario,
            "methods": [part.to_mapping() for part in self.methods],
            "train": dataclasses.asdict(self.train),
            "stream": _plain(self.stream),
            "model": _plain(self.model.to_mapping()),
            "boundaries": self.boundaries.to_mapping(),
            "seeds": list(self.seeds),
            "device": self.device,
            "threads": self.threads,
            "data_root": self.data_root,
        }

    def to_yaml(self) -> str:
        """The text of its `config.yaml`."""
        return yaml.safe_dump(_plain(self.to_mapping()), sort_keys=False)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises
    ------
    StorageError
        If there is no such file or it cannot be read.
    UsageError
        If it is not YAML, or holds something else than a mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text; it must be YAML with keys such as methods") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it holds characters that YAML does not allow"
        raise UsageError(f"{path} is not valid YAML{where}: {problem}") from error
    if not isinstance(content, dict):
        kind = {list: "a list", type(None): "nothing"}.get(type(content), "a single value")
        raise UsageError(f"{path} holds {kind}, it must be a mapping of keys such as benchmark and methods to values")
    return content


@dataclass(frozen=True, kw_only=True)
class _Written:
    """The keys of a file, before anything is looked up."""

    benchmark: str = "split_digits"
    scenario: str | None = None
    methods: Any = ()
    train: dict[str, Any] | None = None
    stream: dict[str, Any] | None = None
    model: Any = None
    boundaries: Any = None
    seeds: int | list[int] = 1
    device: str | None = None
    threads: int | None = None
    data_root: str | None = None


def _chosen(written: Any) -> list[dict[str, Any]]:
    """The entries of the methods; fine-tuning is what is left without any."""
    listed = written if isinstance(written, (list, tuple)) else [] if written is None else [written]
    entries = [_named(entry, f"methods[{i}]") for i, entry in enumerate(listed)]
    names = [entry["name"] for entry in entries]
    if FINETUNE not in names:
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"the method '{name}' is listed twice; list it once")
        return entries
    if len(names) > 1:
        other = next((name for name in names if name != FINETUNE), FINETUNE)
        raise UsageError(f"'{FINETUNE}' is the run without any method and cannot stand beside '{other}'; leave it out")
    if len(entries[0]) > 1:
        raise UsageError(
            f"'{FINETUNE}' has no arguments, but {', '.join(k for k in entries[0] if k != 'name')} is given"
        )
    return []


def _named(written: Any, path: str, default: str | None = None) -> dict[str, Any]:
    """An entry `{name: ewc, strength: 100}`, or just the name, with underscores for hyphens."""
    entry = {"name": written} if isinstance(written, str) else written
    if not isinstance(entry, Mapping):
        raise UsageError(f"{path} is {entry!r}, it must be a name or a mapping with the key 'name'")
    name = entry.get("name", default)
    if not isinstance(name, str):
        raise UsageError(f"{path}.name is {name!r}, it must be a name; 'perdure list methods' shows all")
    return {**_keys(entry), "name": name.replace("-", "_")}


def _part(registry: Any, entry: Mapping[str, Any], path: str, leave_out: Sequence[str] = ()) -> Part:
    target = registry.get(entry["name"])
    given = {key: value for key, value in entry.items() if key != "name"}
    values = structured(target, given, path, leave_out)
    if isinstance(target, type) and registry in (methods, detectors):
        target(**values)  # its own checks of the values
    return Part(entry["name"], _plain(values))


def _watching(
    *,
    signal: Literal["loss", "accuracy"] | None = None,
    snapshot_every: int = 10,
    snapshots: int = 5,
    samples: int = 1000,
) -> None:
    """What `Boundaries` takes beside the detector, as far as it can stand in a file."""


BESIDE_DETECTOR = tuple(arguments(_watching))


def _boundaries(entry: Mapping[str, Any]) -> Part:
    """Whether tasks are announced ("given"), not ("hidden"), or found by a detector, with its arguments."""
    name = str(entry["name"]).replace("-", "_")
    given = {key: value for key, value in entry.items() if key != "name"}
    if name in (GIVEN, HIDDEN):
        if given:
            raise UsageError(f"boundaries '{name}' have no arguments, but {', '.join(given)} is given; name a detector")
        return Part(name, {})
    if name not in detectors.names():
        known = [GIVEN, HIDDEN, *detectors.names()]
        raise UsageError(f"unknown boundaries '{name}'{nearest(name, known) or ';'} there are {', '.join(known)}")
    beside = {key: given.pop(key) for key in BESIDE_DETECTOR if key in given}
    part = _part(detectors, {"name": name, **given}, "boundaries")
    return Part(name, part.arguments | structured(_watching, beside, "boundaries"))


def _wants_one_thread(model: Part) -> bool:
    """A second thread gains an mlp little, loses much where others use the cores, and changes the last bits."""
    return model.name == "mlp"


def _override(sections: dict[str, dict[str, Any]], overrides: Sequence[str]) -> None:
    for text in overrides:
        left, equals, right = text.partition("=")
        section, dot, key = left.strip().replace("-", "_").partition(".")
        if not (equals and dot and section and key):
            raise UsageError(f"--set '{text}' is not SECTION.KEY=VALUE, such as train.lr=0.01 or replay.capacity=500")
        if section not in sections:
            known = methods.names()
            if section in known:
                chosen = [name for name in sections if name not in SECTIONS]
                has = f"the methods are {', '.join(chosen)}" if chosen else "there is no method"
                raise UsageError(f"--set '{text}': '{section}' is not in this run ({has}); add -m {section}")
            raise UsageError(
                f"unknown section '{section}' in --set '{text}'{nearest(section, [*sections, *known]) or ';'} "
                f"it is one of {', '.join(sections)}"
            )
        sections[section][key] = _value(right)


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _keys(section: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in section.items()}


def _seeds(written: int | list[int]) -> tuple[int, ...]:
    if isinstance(written, int):
        _check("seeds", written, 1, "")
        return tuple(range(written))
    if not written or len(set(written)) < len(written) or min(written) < 0:
        raise UsageError(f"seeds is {written}, it must be a number of seeds or a list of different numbers from 0")
    return tuple(written)


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key may stand once: the second of two would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _check_threads(threads: int | None) -> int | None:
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"threads is {threads}, it must be at least 1 and at most {MOST_THREADS}")
    return threads


def _check(name: str, value: Any, low: float, section: str = "train.") -> Any:
    if value is not None and not value >= low:
        raise UsageError(f"{section}{name} is {value}, it must be at least {low:g}")
    return value


def _plain(value: Any) -> Any:
    """Lists for tuples, so that what is written and read again is the same."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
