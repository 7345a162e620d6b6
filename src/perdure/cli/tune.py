"""`perdure tune`: choose hyper-parameters on the first tasks of a stream, on held-out training data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from perdure.cli.output import DataRoot, Json, only_results_on_stdout, print_json, say
from perdure.cli.progress import tuning_progress
from perdure.cli.run import Benchmark, Device, Scenario, Set, merged, split_names
from perdure.errors import UsageError

if TYPE_CHECKING:
    from perdure.tuning.run import Found
    from perdure.tuning.settings import Tuning

DEFAULT_OUT = Path("runs/tune")


def tune(
    space: Annotated[
        Path | None, Parameter(help="A YAML file: that of an experiment with the keys space and tune added.")
    ] = None,
    /,
    *,
    benchmark: Benchmark = None,
    scenario: Scenario = None,
    method: Annotated[
        list[str] | None,
        Parameter(name=["--method", "-m"], negative=(), help="One of 'perdure list methods'; may be repeated."),
    ] = None,
    set_: Set = None,
    choose: Annotated[
        list[str] | None,
        Parameter(
            name="--space",
            negative=(),
            help="SECTION.KEY=VALUES, added to the file's space, such as 'ewc.strength=loguniform(1, 1e5)' or "
            "train.batch_size=[8,16]; may be repeated.",
        ),
    ] = None,
    sampler: Annotated[str | None, Parameter(help="grid, random, tpe or halving; default: tpe.")] = None,
    policy: Annotated[
        str | None,
        Parameter(help="score, or chf: the learning rate by plasticity, then the strongest strength that it can bear."),
    ] = None,
    trials: Annotated[int | None, Parameter(help="Trials of a sampler that draws; default: 20.")] = None,
    tasks: Annotated[int | None, Parameter(help="Look at so many tasks, the first; default: 3.")] = None,
    seed: Annotated[
        int | None, Parameter(help="Of stream, model and draws, none of those to be reported; default: 1000.")
    ] = None,
    workers: Annotated[
        int,
        Parameter(name=["--workers", "-w"], help="Processes, each of the file's threads or one."),
    ] = 1,
    out: Annotated[
        Path | None,
        Parameter(name=["--out", "-o"], help="A folder; a search in it is continued. Default: runs/tune."),
    ] = None,
    storage: Annotated[
        str | None,
        Parameter(help="An optuna storage that several machines share, such as postgresql://...; default: in --out."),
    ] = None,
    study: Annotated[str | None, Parameter(help="The study's name in --storage; default: perdure.")] = None,
    resume: Annotated[Path | None, Parameter(help="Continue the search in this folder.")] = None,
    data_root: DataRoot = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Choose hyper-parameters on held-out training data of the first tasks; the test data are never read.

    perdure tune -b split-mnist -m ewc --space 'ewc.strength=loguniform(1, 1e6)' --trials 12 --workers 2 --out runs/ewc
    """
    flags = {"benchmark": benchmark, "scenario": scenario, "methods": split_names(method)}
    rules = {"sampler": sampler, "policy": policy, "trials": trials, "tasks": tasks, "seed": seed}
    places = {"data_root": data_root, "device": device}
    with only_results_on_stdout():
        if resume is not None:
            given = rules | {"set": set_, "space": choose, "out": out, "storage": storage, "study": study}
            given |= {"benchmark": benchmark, "scenario": scenario, "method": method}
            _refuse_beside_resume({"the file": space} | {f"--{name}": value for name, value in given.items()})
            found = _resume(resume, places, workers)
        else:
            tuning = _tuning(space, flags | places, rules, set_ or [], choose or [])
            found = _search(tuning, out or DEFAULT_OUT, storage, study, workers)
    _show(found, resume or out or DEFAULT_OUT, json)


def _tuning(
    file: Path | None, flags: dict[str, Any], rules: dict[str, Any], sets: list[str], choose: list[str]
) -> Tuning:
    from perdure.tuning.settings import Tuning

    mapping = merged(file, flags)
    for key, given in (("tune", {k: v for k, v in rules.items() if v is not None}), ("space", _spaces(choose))):
        written = mapping.get(key) or {}
        if given and not isinstance(written, dict):
            raise UsageError(f"{key} is {written!r}, it must be a mapping")
        if given or key in mapping:
            mapping[key] = {**written, **given} if isinstance(written, dict) else written
    return Tuning.from_mapping(mapping, sets)


def _spaces(choose: list[str]) -> dict[str, Any]:
    import yaml

    found = {}
    for text in choose:
        key, equals, value = text.partition("=")
        if not (equals and key.strip() and value.strip()):
            raise UsageError(f"--space '{text}' is not SECTION.KEY=VALUES, such as train.lr=[0.01,0.1]")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"--space '{text}': '{value}' is no YAML; give a list or uniform(LOW, HIGH)") from None
    return found


def _resume(folder: Path, places: dict[str, Any], workers: int) -> Found:
    from dataclasses import replace

    from perdure.tuning.run import read_search

    tuning, storage, study = read_search(folder)
    moved = {key: value for key, value in places.items() if value is not None}
    return _search(replace(tuning, written=tuning.written | moved), folder, storage, study, workers)


def _search(tuning: Tuning, folder: Path, storage: str | None, study: str | None, workers: int) -> Found:
    from perdure.tuning.run import DEFAULT_STUDY
    from perdure.tuning.run import tune as search

    try:
        with tuning_progress() as listen:
            return search(
                tuning, folder, storage=storage, study=study or DEFAULT_STUDY, workers=workers, on_event=listen
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with: perdure tune --resume {folder}") from None


def _refuse_beside_resume(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--resume takes everything from the folder of the search; leave {name} out")


def _show(found: Found, folder: Path, json: bool) -> None:
    from perdure.tuning import report

    files = report.write(found, folder)
    if json:
        print_json(report.to_dict(found) | {"files": {name: str(path) for name, path in files.items()}})
        return
    rules = found.tuning.rules
    print(
        f"{found.experiment.label} on {found.experiment.benchmark} ({found.experiment.scenario}): the first "
        f"{rules.tasks} tasks, {rules.held_out:.0%} of their training data held out, seed {rules.seed}\n"
    )
    print(report.table(found))
    shares = report.importances_of(found)
    if len(shares) > 1:
        print("\nimportance: " + ", ".join(f"{key} {share:.0%}" for key, share in shares.items()))
    print(f"\nchosen: {report.values_of(found.best)}\n")
    for name, path in files.items():
        print(f"{name:<8} {path}")
    say(f"run it with: perdure run {files['best']}")
