"""`perdure reproduce`: published tables, run again and held against the published numbers."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from perdure.cli.output import DataRoot, Json, only_results_on_stdout, print_json, say
from perdure.cli.progress import comparison_progress
from perdure.errors import StorageError, UsageError

if TYPE_CHECKING:
    from perdure.experiments.reproduce import Reproduction


def reproduce(
    *names: Annotated[str, Parameter(help="der-split-mnist, der-permuted-mnist, vandeven-split-mnist.")],
    rows: Annotated[str | None, Parameter(help="Such as er-200,derpp-500 or 'task-*'; default: all.")] = None,
    seeds: Annotated[int | None, Parameter(help="Seeds a row; default: what the protocol says.")] = None,
    jobs: Annotated[
        int | None, Parameter(name=["--jobs", "-j"], help="Processes of one thread; default: the number of cores.")
    ] = None,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"], help="Write the table to this Markdown file.")] = None,
    work: Annotated[
        Path,
        Parameter(
            help="Folder that keeps runs: finished ones are not run again, a killed one goes on after its last task."
        ),
    ] = Path("runs/reproduce"),
    fresh: Annotated[bool, Parameter(negative="", help="Run again what is kept in --work.")] = False,
    data_root: DataRoot = None,
    json: Json = False,
) -> None:
    """Run published tables again and say which numbers come out inside their bands.

    perdure reproduce der-split-mnist --rows er-500,derpp-200 --seeds 1
    """
    patterns = [part.strip() for part in rows.split(",") if part.strip()] if rows is not None else []
    if rows is not None and not patterns:
        raise UsageError("--rows is empty; give names such as er-200,derpp-500, or leave it out for all rows")
    for name, value in (("--seeds", seeds), ("--jobs", jobs)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}, it must be at least 1")
    if out is not None:
        _check_place(out)
    with only_results_on_stdout():
        found = _reproduce(names, patterns, seeds, jobs, work, fresh, data_root)
    _show(found, _command(names, rows, seeds), out, json)


def _reproduce(
    names: tuple[str, ...],
    patterns: list[str],
    seeds: int | None,
    jobs: int | None,
    work: Path,
    fresh: bool,
    data_root: str | None,
) -> Reproduction:
    from perdure.experiments.executors import cores
    from perdure.experiments.protocol import choose_rows, protocol_names, protocol_of
    from perdure.experiments.reproduce import reproduce as run_protocols

    if not names:
        raise UsageError(f"give the name of a protocol; there are {', '.join(protocol_names())}")
    protocols = list({name.replace("_", "-"): protocol_of(name) for name in names}.values())
    chosen = choose_rows(protocols, patterns)
    for name, found in chosen.items():
        if not found:
            say(f"{name} has no such row")
    try:
        with comparison_progress(1, "reproducing") as listen:

            def hear(event: dict[str, Any]) -> None:
                if event["event"] == "start":
                    say(f"{_runs(event['missing'])} to do in {work}, {event['kept']} finished before (--fresh: again)")
                else:
                    listen(event)

            return run_protocols(
                protocols,
                chosen,
                work,
                seeds=seeds,
                jobs=jobs or cores(),
                fresh=fresh,
                data_root=data_root,
                on_event=hear,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{work} keeps what was done; continue with the same command") from None


def _check_place(out: Path) -> None:
    """Hours of runs should not end at a file that cannot be written."""
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the name of a Markdown file")
    there = next(folder for folder in out.absolute().parents if folder.exists())
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError:
        raise StorageError(f"cannot write --out {out}: {there} is no folder that may be written to") from None


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _command(names: tuple[str, ...], rows: str | None, seeds: int | None) -> str:
    options = [f"--rows {rows}"] * (rows is not None) + [f"--seeds {seeds}"] * (seeds is not None)
    return " ".join(["perdure reproduce", *(name.replace("_", "-") for name in names), *options])


def _show(found: Reproduction, command: str, out: Path | None, json: bool) -> None:
    from perdure.experiments.reproduced import as_markdown, as_text

    if out is not None:
        from perdure.files import write_atomically

        write_atomically(out, as_markdown(found, command).encode())
    if json:
        print_json(found.to_dict())
    else:
        print(as_text(found))
    if out is not None:
        say(f"written to {out}")
