"""`perdure data`: which data sets are here, and getting those that are not."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import App, Parameter

from perdure.cli.output import DataRoot, Json, aligned, only_results_on_stdout, print_json
from perdure.cli.progress import download_progress

data = App(name="data", help="Show or download data sets.", help_format="plaintext")


@data.command
def get(
    name: Annotated[str, Parameter(help="A name of 'perdure list datasets'.")],
    /,
    *,
    data_root: DataRoot = None,
    json: Json = False,
) -> None:
    """Download a data set, or do nothing if it is there; a download that broke off goes on where it stopped."""
    from perdure.data.download import download

    with only_results_on_stdout(), download_progress() as progress:
        folder = download(name, data_root, progress=progress)
    if json:
        print_json({"name": name.replace("-", "_"), "folder": str(folder)})
    else:
        print(folder)


@data.command(name="list")
def list_sets(*, data_root: DataRoot = None, json: Json = False) -> None:
    """Show every data set and where it lies."""
    from perdure.registry import datasets

    entries = [_state(name, data_root) for name in datasets.names()]
    if json:
        print_json(entries)
        return
    print(aligned([(entry["name"], entry["folder"] or _how_to_get(entry)) for entry in entries]))


def _state(name: str, data_root: str | None) -> dict[str, Any]:
    from perdure.data.store import locate
    from perdure.errors import DataError
    from perdure.registry import datasets

    try:
        folder: str | None = str(locate(name, data_root))
    except DataError:
        folder = None
    size = datasets.get(name).download_size
    return {"name": name, "present": folder is not None, "folder": folder, "download_size": size}


def _how_to_get(entry: dict[str, Any]) -> str:
    return f"not here; 'perdure data get {entry['name']}' fetches {entry['download_size'] / 1e6:.0f} MB"
