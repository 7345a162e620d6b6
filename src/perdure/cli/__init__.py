"""The command line: `perdure compare`, `run`, `tune`, `list`, `explain`, `choose`, `data`, `report`, `reproduce`,
`audit`.

Exit code 0: done; 1: failed; 2: bad usage; 130: interrupted. Results go to standard output, everything else to standard
error. Nothing here imports torch before a command runs, so that help is there at once.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

from cyclopts import App, CycloptsError

from perdure.cli.allocator import keep_freed_memory
from perdure.cli.audit import audit
from perdure.cli.choose import choose
from perdure.cli.compare import compare
from perdure.cli.data import data
from perdure.cli.explain import explain
from perdure.cli.list import list_names
from perdure.cli.report import report
from perdure.cli.reproduce import reproduce
from perdure.cli.run import run
from perdure.cli.tune import tune
from perdure.errors import PerdureError, PerdureWarning, UsageError

OK, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130


def _version() -> str:
    try:
        return version_of("perdure")
    except PackageNotFoundError:
        return "0+unknown"


app = App(
    name="perdure",
    help="Train a model on a stream of tasks without losing what it knew.",
    version=_version,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
app.command(compare)
app.command(run)
app.command(list_names, name="list")
app.command(explain)
app.command(choose)
app.command(data)
app.command(report)
app.command(reproduce)
app.command(tune)
app.command(audit)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; errors become one sentence on standard error.

    >>> main(["explain", "no-such-method"])
    2
    """
    keep_freed_memory()
    with _warnings_as_lines():
        try:
            code = app(argv, exit_on_error=False, print_error=False, result_action="return_value")
            sys.stdout.flush()
            return code if isinstance(code, int) else OK
        except CycloptsError as error:
            return _say(f"{_one_line(str(error))} ('perdure --help' shows what there is)", BAD_USAGE)
        except UsageError as error:
            return _say(str(error), BAD_USAGE)
        except PerdureError as error:
            return _say(str(error), FAILED)
        except KeyboardInterrupt as stop:
            return _say(f"interrupted{'; ' if stop.args else ''}{stop}", INTERRUPTED)
        except BrokenPipeError:
            # Whoever read the output has left; the interpreter must not try to flush it once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except MemoryError:
            return _say("out of memory; use a smaller batch, buffer or model", FAILED)
        except OSError as error:
            where = "" if error.filename is None else f"{error.filename}: "
            return _say(f"{where}{(error.strerror or str(error)).lower()}; check the path and its permissions", FAILED)
        except Exception as error:
            return _unexpected(error)
    return OK


def _unexpected(error: Exception) -> int:
    if os.environ.get("PERDURE_TRACEBACK"):
        traceback.print_exc()
    what = _one_line(str(error)) or "no details"
    return _say(f"{type(error).__name__}: {what}; PERDURE_TRACEBACK=1 shows where, please report it", FAILED)


def _say(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Each warning once, as one line."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        text = _one_line(str(message))
        if text not in shown:
            shown.add(text)
            print(f"warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PerdureWarning)
        handler: Callable[..., None] = show
        warnings.showwarning = handler
        yield
