"""`perdure run`: one experiment, from flags or a file, for one or several seeds."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from perdure.cli.output import DataRoot, Json, only_results_on_stdout, print_json, say
from perdure.cli.progress import Listener, comparison_progress, run_progress
from perdure.errors import UsageError

if TYPE_CHECKING:
    from perdure.results import Results

Benchmark = Annotated[
    str | None,
    Parameter(
        name=["--benchmark", "-b"], help="One of 'perdure list benchmarks', a .csv or .tsv file, or a folder of images."
    ),
]
Scenario = Annotated[str | None, Parameter(help="task, domain, class, online or blurry; default: the benchmark's own.")]
Order = Annotated[
    str | None,
    Parameter(
        help="Of the tasks: easy_to_hard, hard_to_easy, random, or numbers such as 2,0,1; default: as they come."
    ),
]
Set = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        negative=(),
        help="SECTION.KEY=VALUE; the section is a method's name, train, stream, model or boundaries; may be repeated.",
    ),
]
Device = Annotated[str | None, Parameter(help="cpu, cuda, cuda:1 or mps; if left open, the GPU if there is one.")]


def run(
    experiment: Annotated[Path | None, Parameter(help="A YAML file; flags go before what it says.")] = None,
    /,
    *,
    benchmark: Benchmark = None,
    scenario: Scenario = None,
    order: Order = None,
    method: Annotated[
        list[str] | None,
        Parameter(
            name=["--method", "-m"], negative=(), help="One of 'perdure list methods', or finetune; may be repeated."
        ),
    ] = None,
    set_: Set = None,
    seed: Annotated[int | None, Parameter(help="Run this one seed.")] = None,
    seeds: Annotated[
        str | None, Parameter(help="A number N for seeds 0 to N-1, or seeds such as 0,3,5; default: 1.")
    ] = None,
    jobs: Annotated[
        int | None,
        Parameter(
            name=["--jobs", "-j"],
            help="Processes that share the seeds, each of --threads or else one thread; default: as many as have "
            "cores of their own, and 1 on a GPU. Results do not depend on it.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        Parameter(name=["--out", "-o"], help="A new folder for results, log and checkpoints; default: none."),
    ] = None,
    resume: Annotated[Path | None, Parameter(help="Continue the run in this folder.")] = None,
    overwrite: Annotated[bool, Parameter(negative="", help="Replace an earlier run in --out.")] = False,
    data_root: DataRoot = None,
    device: Device = None,
    threads: Annotated[int | None, Parameter(help="CPU threads; default: 1 for an mlp, else torch's own.")] = None,
    json: Json = False,
) -> None:
    """Run one experiment and print its results.

    perdure run -b split-mnist --scenario class -m ewc -m replay --set replay.capacity=500 --seeds 3 --out runs/a
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs is {jobs}, it must be at least 1")
    flags = {"benchmark": benchmark, "scenario": scenario, "methods": split_names(method), "seeds": _seeds(seed, seeds)}
    flags |= {"threads": threads, "data_root": data_root, "device": device}
    with only_results_on_stdout():
        if resume is None:
            runs = _start(experiment, flags, [*(set_ or []), *_order(order)], out, overwrite, jobs)
        else:
            given: dict[str, Any] = {
                "the experiment file": experiment,
                "--benchmark": benchmark,
                "--scenario": scenario,
            }
            given |= {
                "--order": order,
                "--method": method,
                "--set": set_,
                "--seed": seed,
                "--seeds": seeds,
                "--out": out,
            }
            _refuse_beside_resume(given | {"--threads": threads, "--overwrite": overwrite or None})
            runs = _resume(resume, data_root, device, jobs)
    _show(runs, resume or out, json)


def merged(experiment: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """What a file says, and the flags that were given in its place."""
    from perdure.experiments.config import read_yaml

    mapping = read_yaml(experiment) if experiment is not None else {}
    return mapping | {key: value for key, value in flags.items() if value is not None}


def split_names(written: list[str] | None) -> list[str] | None:
    """`["ewc+replay"]` as `["ewc", "replay"]`."""
    return None if written is None else [name.strip() for text in written for name in text.split("+")]


def _start(
    experiment: Path | None,
    flags: dict[str, Any],
    sets: list[str],
    out: Path | None,
    overwrite: bool,
    jobs: int | None,
) -> list[Results]:
    from perdure.experiments.config import Experiment

    if overwrite and out is None:
        raise UsageError("--overwrite replaces a run in --out, which is not given; add --out DIR")
    chosen = Experiment.from_mapping(merged(experiment, flags), sets)
    from perdure.experiments.run import run as run_experiment
    from perdure.experiments.run import usual_jobs

    if jobs is not None and chosen.threads is None:
        chosen = replace(chosen, threads=1)  # whatever the number of processes: the last bits depend on it
    jobs = jobs or usual_jobs(chosen)
    try:
        with _progress(len(chosen.seeds), jobs) as listen:
            return run_experiment(chosen, out, overwrite=overwrite, jobs=jobs, on_event=listen)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_continue(out)) from None


def _resume(folder: Path, data_root: str | None, device: str | None, jobs: int | None) -> list[Results]:
    from perdure.experiments.folders import RESULTS, seed_folder
    from perdure.experiments.run import read_run, usual_jobs
    from perdure.experiments.run import resume as resume_run

    experiment = read_run(folder)
    jobs = jobs or usual_jobs(replace(experiment, device=device or experiment.device))
    seeds = experiment.seeds
    missing = [seed for seed in seeds if not (seed_folder(folder, seed, seeds) / RESULTS).is_file()]
    try:
        with _progress(len(missing), jobs) as listen:
            return resume_run(folder, data_root=data_root, device=device, jobs=jobs, on_event=listen)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_continue(folder)) from None


def _progress(seeds: int, jobs: int) -> AbstractContextManager[Listener]:
    """Processes tell of the seeds that they have finished, one alone of its tasks."""
    return comparison_progress(seeds, "training") if min(seeds, jobs) > 1 else run_progress(seeds)


def _how_to_continue(folder: Path | None) -> str:
    from perdure.experiments.folders import CONFIG

    if folder is None:
        return "nothing was kept; with --out DIR a run can be continued"
    if not (folder / CONFIG).is_file():
        return "nothing had been trained yet"
    return f"continue with: perdure run --resume {folder}"


def _order(order: str | None) -> list[str]:
    return [] if order is None else [f"stream.order={order}"]


def _seeds(seed: int | None, seeds: str | None) -> int | list[int] | None:
    if seed is not None and seeds is not None:
        raise UsageError(f"--seed {seed} is one seed and --seeds {seeds} says which others; give one of them")
    if seed is not None and seed < 0:
        raise UsageError(f"--seed is {seed}, it must be at least 0")
    if seeds is None:
        return None if seed is None else [seed]
    try:
        return [int(part) for part in seeds.split(",") if part.strip()] if "," in seeds else int(seeds)
    except ValueError:
        raise UsageError(f"--seeds is '{seeds}', it must be a number of seeds or seeds such as 0,3,5") from None


def _refuse_beside_resume(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--resume takes everything from the folder of the run; leave {name} out")


def _show(runs: list[Results], folder: Path | None, json: bool) -> None:
    if json:
        from perdure.experiments.folders import summary_of

        print_json(runs[0].to_dict() if len(runs) == 1 else summary_of(runs))
    elif len(runs) == 1:
        print(runs[0])
    else:
        from perdure.comparison import compare

        print(f"{runs[0].label} on {runs[0].benchmark} ({runs[0].scenario}), mean ± std over {len(runs)} seeds\n")
        print(compare({runs[0].label: runs}))
    if folder is not None:
        say(f"written to {folder}")
