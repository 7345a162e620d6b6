"""`perdure report`: the HTML report and the plot of runs that are on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from perdure.cli.output import Json, print_json, say
from perdure.errors import UsageError


def report(
    *folders: Annotated[Path, Parameter(help="Folders of runs or comparisons.")],
    output: Annotated[
        Path | None,
        Parameter(name=["--output", "-o"], help="An .html file or a folder; default: in the only folder, else here."),
    ] = None,
    json: Json = False,
) -> None:
    """Write one self-contained HTML file about finished runs, and a plot beside it."""
    if not folders:
        raise UsageError("there is no folder to report on; give the folders of finished runs")
    from perdure import report as html
    from perdure.comparison import compare
    from perdure.errors import MissingExtraError
    from perdure.experiments.config import read_yaml
    from perdure.experiments.folders import CONFIG, read_groups
    from perdure.experiments.settings import settings_of
    from perdure.report import plots

    groups, found = read_groups(folders)
    comparison = compare(groups)
    target = output or (folders[0] if len(folders) == 1 else Path())
    configs = {label: folder / CONFIG for label, folder in found.items()}
    settings = settings_of({label: read_yaml(config) for label, config in configs.items() if config.is_file()})
    page = html.write(groups, target, settings=settings)[0]
    try:
        picture = page.with_name("accuracy.png") if page.name == "report.html" else page.with_suffix(".png")
        plot: Path | None = plots.write(groups, picture)[0]
    except MissingExtraError as error:
        plot = None
        say(f"no plot: {error}")
    if json:
        print_json({"report": str(page), "plot": None if plot is None else str(plot), **comparison.to_dict()})
        return
    print(f"{comparison}\n\nreport   {page}")
    if plot is not None:
        print(f"plot     {plot}")
