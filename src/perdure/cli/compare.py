"""`perdure compare`: several methods side by side on one benchmark, with a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from perdure.cli.output import DataRoot, Json, only_results_on_stdout, print_json, say
from perdure.cli.progress import comparison_progress
from perdure.cli.run import Benchmark, Device, Scenario, Set
from perdure.errors import UsageError

if TYPE_CHECKING:
    from perdure.experiments.config import Experiment

DEFAULT = "finetune,ewc,lwf,replay,derpp,joint"
# The embedded data set has 1,297 training images, and a memory of most of them would prove nothing.
SMALL_BUFFERS = ("replay.capacity=200", "derpp.capacity=200")


def compare(
    *,
    methods: Annotated[
        str | None, Parameter(name=["--methods", "-m"], help="Such as finetune,ewc+replay; default: five and joint.")
    ] = None,
    benchmark: Benchmark = None,
    scenario: Scenario = None,
    seeds: Annotated[int, Parameter(help="Run seeds 0 to N-1.")] = 3,
    set_: Set = None,
    out: Annotated[
        Path, Parameter(name=["--out", "-o"], help="A folder; an earlier comparison in it is replaced.")
    ] = Path("runs/compare"),
    jobs: Annotated[
        int | None, Parameter(name=["--jobs", "-j"], help="Processes; default: the number of cores.")
    ] = None,
    data_root: DataRoot = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Compare methods on the same stream and seeds: a table, a plot and a report.

    Without options: five methods on the embedded digits, class-incremental, in under a minute and offline.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs is {jobs}, it must be at least 1")
    mapping = {
        "benchmark": benchmark, "scenario": scenario, "seeds": seeds, "data_root": data_root, "device": device
    }  # fmt: skip
    with only_results_on_stdout():
        content, table, paths = _compare(
            {k: v for k, v in mapping.items() if v is not None}, methods, set_ or [], out, jobs
        )
    if json:
        print_json(content | paths)
        return
    print(table)
    print()
    for name, path in paths.items():
        print(f"{name:<8} {path}")


def _compare(
    mapping: dict[str, Any], methods: str | None, overrides: list[str], out: Path, jobs: int | None
) -> tuple[dict[str, Any], str, dict[str, str]]:
    from perdure.comparison import compare as compare_results
    from perdure.experiments.build import prepare
    from perdure.experiments.compare import ComparisonFolder, experiments_of, run_all
    from perdure.experiments.executors import cores
    from perdure.results import kind_of

    if methods is None and mapping.get("benchmark", "split_digits").replace("-", "_") == "split_digits":
        overrides = [*SMALL_BUFFERS, *overrides]
    experiments = experiments_of(mapping, _sets(DEFAULT if methods is None else methods), overrides)
    folder = ComparisonFolder(out)
    for experiment in experiments.values():
        prepare(experiment, experiment.seeds[0])
    total = sum(len(experiment.seeds) for experiment in experiments.values())
    try:
        with folder, comparison_progress(total) as listen:
            groups = run_all(experiments, folder.work, jobs=jobs or cores(), on_event=listen)
            comparison = compare_results(groups)
            pictures = _draw(groups, folder.work, experiments)
            folder.publish(groups, comparison)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was kept of this comparison") from None
    first = next(iter(experiments.values()))
    some = next(iter(groups.values()))[0]
    kind = f"{kind_of(some.scenario)}, {len(some.task_names)} tasks"
    title = f"{some.benchmark} ({kind}), mean ± std over {len(first.seeds)} seeds{_buffers(experiments)}"
    content = {"benchmark": some.benchmark, "scenario": some.scenario, **comparison.to_dict()}
    return content, f"{title}\n\n{comparison}", {name: str(out / file) for name, file in pictures.items()}


def _draw(groups: Any, folder: Path, experiments: dict[str, Experiment]) -> dict[str, str]:
    """Write report and plot into `folder`; return the names of the files."""
    from perdure import report
    from perdure.errors import MissingExtraError
    from perdure.experiments.settings import settings_of
    from perdure.report import plots

    settings = settings_of({label: experiment.to_mapping() for label, experiment in experiments.items()})
    files = {"report": report.write(groups, folder, settings=settings)[0].name}
    try:
        files["plot"] = plots.write(groups, folder)[0].name
    except MissingExtraError as error:
        say(f"no plot: {error}")
    return files


def _buffers(experiments: dict[str, Experiment]) -> str:
    """How much the methods with a buffer remember: without it their numbers say little."""
    sizes = {
        part.name: part.arguments["capacity"]
        for experiment in experiments.values()
        for part in experiment.methods
        if part.arguments.get("capacity") is not None
    }
    return "".join(f"; {name} remembers {size:,} examples" for name, size in sizes.items())


def _sets(methods: str) -> list[list[str]]:
    found = [[name.strip() for name in text.split("+")] for text in methods.split(",") if text.strip()]
    if not found:
        raise UsageError("--methods is empty; give names of 'perdure list methods' such as finetune,ewc+replay")
    return found
