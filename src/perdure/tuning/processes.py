"""Workers in processes of this machine; the death of one loses nothing but what it had in hand."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from perdure.errors import PerdureError, PerdureWarning
from perdure.experiments.executors import follow_parent, interrupts_held_back

LOOK_SECONDS = 0.3


def run_workers(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    workers: int,
    modules: list[str],
    look: Callable[[], None],
) -> None:
    """Call `function(*arguments)` in so many processes at once, and `look` here now and then, until all have returned.

    Parameters
    ----------
    function
        Of a module, so that another process can import it.
    modules
        Imported there first, because they register names.

    Raises
    ------
    PerdureError
        If all workers have been killed; what `function` raises otherwise, in any of them. Nothing runs any more then,
        or after Ctrl-C.
    """
    context = multiprocessing.get_context("spawn")
    started: dict[Any, Connection] = {}
    try:
        with _one_thread(), interrupts_held_back():
            for _ in range(workers):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_called, args=(theirs, os.getpid(), modules, function, arguments))
                process.start()
                theirs.close()
                started[process] = ours
        killed = _followed(started, look)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()
    if killed == workers:
        raise PerdureError(
            "all worker processes died; free memory or use fewer --workers, and give the same command again: finished "
            "trials are kept"
        )


def _followed(started: Mapping[Any, Connection], look: Callable[[], None]) -> int:
    """Wait for all; returns how many were killed."""
    left, killed = dict(started), 0
    while left:
        look()
        for process, connection in list(left.items()):
            if process.is_alive() and not connection.poll():
                continue
            try:
                error = connection.recv()
            except EOFError:
                killed += 1
                error = None
                if killed < len(started):
                    warnings.warn(
                        "a worker process died; the others go on with what it had", PerdureWarning, stacklevel=2
                    )
            if error is not None:
                raise error
            del left[process]
        time.sleep(LOOK_SECONDS if left else 0)
    look()
    return killed


def _called(
    connection: Connection, parent: int, modules: list[str], function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    follow_parent(parent)
    for module in modules:
        if module != "__main__":
            with suppress(ImportError):  # a name that nobody can find here is an error of whoever asks for it
                import_module(module)
    try:
        function(*arguments)
    except PerdureError as error:
        connection.send(error)
    except Exception as error:
        connection.send(PerdureError(f"a worker failed with {type(error).__name__}: {error}"))
    else:
        connection.send(None)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started here have libraries that start no threads of their own accord."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
