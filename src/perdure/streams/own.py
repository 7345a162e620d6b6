"""A stream from a user's own file or folder."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from perdure.data.source import read_path
from perdure.errors import DataError, UsageError
from perdure.streams.classes import ClassOrder
from perdure.streams.scenarios import domain_incremental, split_classes
from perdure.streams.shaping import shapable
from perdure.streams.task import ANNOUNCED, Stream, check_scenario


@shapable
def stream_from_path(
    path: str | PathLike[str],
    *,
    scenario: str = "class",
    tasks: int | Sequence[int] | None = None,
    classes_per_task: int | None = None,
    target: str | None = None,
    domain: str | None = None,
    ignore: Sequence[str] = (),
    class_order: ClassOrder = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    **arguments: Any,
) -> Stream:
    """Make a stream of a .csv or .tsv file or an image folder (root/CLASS/*.png, or root/train and root/test of them).

    Parameters
    ----------
    path
        The file or folder.
    scenario, tasks, classes_per_task, class_order
        How the classes are split, as in `split_classes`.
    target
        The column to predict; default: the one called target, label, class or y.
    domain
        For `scenario="domain"`: the column whose every value is a task, in the order in which they first appear; or
        "rows" for `tasks` consecutive blocks of rows. Default: the classes are split, and a target is its class's
        position within the task.
    ignore
        Columns that are no features.
    test_fraction
        The share of every class that is held out for testing, unless the folder has a test part.
    seed
        The seed of everything random about the stream.
    size
        (height, width) to which images are resized; needed if they differ.
    arguments
        `name` and `prepare` of `Stream`; and the keywords of `perdure.streams.shaping.shape`, as for the benchmarks.

    Raises
    ------
    UsageError
        If the classes cannot be split like that, or `domain` is given for another scenario.
    DataError
        If the data cannot be read or used.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "flowers.csv"
    >>> rows = "".join(f"{i},{i % 7},{'abcd'[i % 4]}\\n" for i in range(40))
    >>> _ = path.write_text("length,width,kind\\n" + rows)
    >>> stream = stream_from_path(path, tasks=2, target="kind")
    >>> stream.columns, stream.input_shape, [task.name for task in stream]
    (4, (2,), ['a, b', 'c, d'])
    """
    check_scenario(scenario, ANNOUNCED)
    if domain is not None and scenario != "domain":
        raise UsageError(f"domain='{domain}' is for scenario='domain', not for scenario='{scenario}'; leave one out")
    options: dict[str, Any] = {
        "path": fspath(path),
        "scenario": scenario,
        "tasks": tasks if tasks is None or isinstance(tasks, int) else [int(count) for count in tasks],
        "classes_per_task": classes_per_task,
        "target": target,
        "domain": domain,
        "ignore": list(ignore),
        "class_order": class_order if class_order is None or isinstance(class_order, str) else list(class_order),
        "test_fraction": test_fraction,
        "seed": seed,
        "size": list(size) if isinstance(size, (tuple, list)) else size,
    }
    arguments = {
        "name": Path(path).name.split(".")[0],
        "options": options,
        "tasks": tasks,
        "class_order": class_order,
        "test_fraction": test_fraction,
        "seed": seed,
        **arguments,
    }
    by_column = domain is not None and domain != "rows"
    arrays = read_path(path, target=target, domain=domain if by_column else None, ignore=ignore, size=size)
    if domain is None:
        return split_classes(arrays, scenario=scenario, classes_per_task=classes_per_task, **arguments)
    if by_column and arrays.domains is None:
        raise DataError(f"'{fspath(path)}' is an image folder and has no column '{domain}'; leave domain= out")
    if classes_per_task is not None:
        raise UsageError(f"classes_per_task={classes_per_task} splits classes but domain='{domain}' splits domains")
    domains = arrays.domains if by_column else "rows"
    return domain_incremental(arrays, domains=domains, domain_names=arrays.domain_names or None, **arguments)
