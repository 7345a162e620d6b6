"""Calls spread over processes of this machine, which end at once with whoever started them."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import resource_tracker, spawn
from typing import Any, TypeVar

from perdure import registry
from perdure.errors import PerdureError, UsageError

K = TypeVar("K")
T = TypeVar("T")

IDLE_SECONDS = 10
"""How long a worker without work waits for more before it ends."""

_CALLS = itertools.count()
_reading_script = False


def run_each(
    function: Callable[..., T],
    arguments: Mapping[K, tuple[Any, ...]],
    jobs: int,
    finished: Callable[[K, T], None],
    threads: int = 1,
) -> None:
    """Call `function` once for each key, in `jobs` processes; `finished` is called here, in the order of their ends.

    Parameters
    ----------
    function
        Of a module, so that another process can import it.
    jobs
        With 1, or a single key, everything happens in this process.
    threads
        Of each worker, for libraries that start threads of their own accord.

    Raises
    ------
    PerdureError
        If a worker dies; whatever `function` raises otherwise. Nothing runs any more then, or after Ctrl-C.
    """
    if _reading_script:
        raise UsageError("each process reads the script again; put what runs under if __name__ == '__main__':")
    jobs = min(jobs, len(arguments))
    if jobs > 1:
        _in_processes(function, arguments, jobs, finished, threads)
        return
    for key, own in arguments.items():
        finished(key, function(*own))


def cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux says which cores a process may use
        return os.cpu_count() or 1


def _in_processes(
    function: Callable[..., T],
    arguments: Mapping[K, tuple[Any, ...]],
    jobs: int,
    finished: Callable[[K, T], None],
    threads: int,
) -> None:
    from joblib import Parallel, delayed
    from joblib.externals.loky.backend.process import LokyProcess
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    parallel = Parallel(
        jobs,
        backend="loky",
        return_as="generator_unordered",
        # Calls are long and few: one at a time, all known from the start, and no files for their arguments.
        batch_size=1,
        pre_dispatch="all",
        max_nbytes=None,
        inner_max_num_threads=threads,
        idle_worker_timeout=IDLE_SECONDS,
        initializer=_start_worker,
        # Another number each time: the backend would use workers again, that know an older folder and environment.
        initargs=(os.getpid(), next(_CALLS)),
    )
    modules = sorted(registry.homes_of_additions())
    script = spawn.get_preparation_data("") if "__main__" in modules else {}
    setup = (modules, {name: value for name, value in script.items() if name.startswith("init_main")})
    calls = (delayed(_call)(setup, key, function, each) for key, each in arguments.items())
    ends: Iterator[tuple[K, T]] = iter(())
    with _quiet_backend():
        try:
            _start_trackers()
            with interrupts_held_back():
                ends = parallel(calls)
            for key, result in ends:
                finished(key, result)
        except BaseException as error:
            if isinstance(ends, Generator):
                ends.close()
            # The backend kills its workers here by a command that small systems do not have, or not at all.
            for process in multiprocessing.active_children():
                if isinstance(process, LokyProcess):
                    process.terminate()
                    process.join()
            if isinstance(error, TerminatedWorkerError):
                raise PerdureError("a worker process died; free memory, or try --jobs 1") from error
            raise


def _call(
    setup: tuple[list[str], dict[str, Any]], key: K, function: Callable[..., T], arguments: tuple[Any, ...]
) -> tuple[K, T]:
    """In a worker: import what registers names that are not the library's own, the script itself included, and call."""
    modules, script = setup
    global _reading_script
    _reading_script = True
    spawn.prepare(script)
    _reading_script = False
    for module in modules:
        if module != "__main__":
            # A name that nobody can find here is an error of whoever asks for it.
            with suppress(ImportError):
                import_module(module)
    return key, function(*arguments)


@contextmanager
def _quiet_backend() -> Iterator[None]:
    """Silence about calls given up: the backend warns of them, and its thread may stumble over their cancellation."""
    before = threading.excepthook

    def hook(failure: Any) -> None:
        flags = getattr(failure.thread, "executor_flags", None)
        if flags is None or not (flags.kill_workers or flags.broken):
            before(failure)

    threading.excepthook = hook
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"joblib\.")
            yield
    finally:
        threading.excepthook = before


def _start_trackers() -> None:
    """Start the backend's helpers, which remove what killed workers leave: without talk of it, and before its workers.

    Their start ends with Ctrl-C let through, whatever it was before.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows needs no helpers
        return
    from joblib.externals.loky.backend import resource_tracker as ours

    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join([*([before] if before else []), "ignore:resource_tracker:UserWarning"])
    try:
        for tracker in (resource_tracker, ours):
            tracker.ensure_running()
    finally:
        os.environ.pop("PYTHONWARNINGS")
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Processes started here see no Ctrl-C before `follow_parent`, where it would be a traceback in some import.

    The backend starts its processes as they come: it cannot be told to do this.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(parent: int, _: int) -> None:
    follow_parent(parent)


def follow_parent(parent: int) -> None:
    """In a worker: leave Ctrl-C to the parent, which kills its workers, and end with it however it ends.

    The backend's own workers learn of the end of their parent when they are done with what they do, after hours.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "pthread_sigmask"):
        return  # On Windows a process keeps the number of a parent that is gone.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
