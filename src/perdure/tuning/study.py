"""A ledger in an optuna storage: several workers, on one machine or many, share it, and it survives them all.

A trial of the study is an *attempt* at a unit: it is created with its unit's key and its worker's name in one
transaction, which gives it a number that no other has. Two workers that reach for the same unit both make an attempt,
and the one with the lower number has it; the other takes his back. This needs nothing of a storage but numbers that
are unique, while optuna's own hand-over of waiting trials is no transaction in SQLite.

An attempt whose worker has died is taken back by whoever comes next, and made again with the same values.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from perdure.errors import StorageError, UsageError
from perdure.tuning.sampling import distribution, inner_value, optuna
from perdure.tuning.space import Space
from perdure.tuning.trials import Outcome, Trial, Unit

BEAT_SECONDS, SILENT_SECONDS = 10.0, 60.0
"""How often a worker says that it lives, and after how long a silence it is taken for dead."""

_LOCK_SECONDS = 60
_OPENINGS = 20
_MADE_BY_OTHERS = ("already exists", "unique", "duplicate", "locked", "no such table")
"""What storages say when several workers make their tables at the same moment: the next try finds them made."""


class StudyLedger:
    """The ledger in a study of an optuna storage; see `perdure.tuning.trials.Ledger`.

    Parameters
    ----------
    url
        What optuna takes: `sqlite:///search.db`, `postgresql://...`, `mysql://...`.
    name
        The name of the study; it is made if it is not there.
    space
        What is chosen, so that optuna's own tools understand the study.
    identity
        What the search is; a study of another search is refused.

    Raises
    ------
    MissingExtraError
        If optuna, or what the URL needs, is not installed.
    StorageError
        If the storage cannot be reached.
    UsageError
        If the study holds another search.
    """

    def __init__(self, url: str, name: str, space: Space, identity: str) -> None:
        self._optuna = optuna()
        self._states = self._optuna.trial.TrialState
        # Someone took an attempt for dead, which has ended it: what it gives is not wanted any more.
        self._ended_by_others = self._optuna.exceptions.UpdateFinishedTrialError
        self.space = space
        self.worker = {"machine": _machine(), "process": os.getpid(), "id": uuid.uuid4().hex}
        self._heard: dict[int, tuple[Any, float]] = {}
        self._hands: dict[str, Any] = {}
        self._study = self._open(url, name)
        self._storage = self._study._storage  # the attributes of a trial that somebody else made have no public setter
        known = self._study.user_attrs.get("search")
        if known is None:
            self._study.set_user_attr("search", identity)
        elif known != identity:
            raise UsageError(
                f"the study '{name}' holds a search with {_difference(known, identity)}; continue it with the same "
                "settings, or choose another --out or --study"
            )

    def look(self) -> tuple[dict[str, Trial], dict[str, Mapping[str, Any]]]:
        """See `Ledger`."""
        finished: dict[str, Trial] = {}
        in_hand: dict[str, Mapping[str, Any]] = {}
        for attempt in self._attempts():
            unit, params = _unit(attempt)
            if "outcome" in attempt.user_attrs:
                score, seconds, why = attempt.user_attrs["outcome"]
                finished.setdefault(unit.key, Trial(unit, params, Outcome(score, seconds, why)))
            elif attempt.state == self._states.RUNNING and self._lives(attempt):
                in_hand.setdefault(unit.key, params)
        return finished, in_hand

    def begun(self, key: str) -> Mapping[str, Any] | None:
        """See `Ledger`."""
        for attempt in self._attempts():
            if attempt.user_attrs["key"] == key and not attempt.user_attrs.get("lost"):
                return _unit(attempt)[1]
        return None

    @contextmanager
    def claim(self, unit: Unit, params: Mapping[str, Any]) -> Iterator[bool]:
        """See `Ledger`; while the block runs, others see that this worker lives."""
        attempt = self._make(unit, params)
        if not self._is_first(unit.key, attempt):
            self._take_back(attempt, lost=True)
            yield False
            return
        self._hands[unit.key] = attempt
        stop = threading.Event()
        thread = threading.Thread(target=self._beat, args=(attempt, stop), daemon=True)
        thread.start()
        try:
            yield True
        finally:
            stop.set()
            thread.join()
            if self._hands.pop(unit.key, None) is not None:
                self._take_back(attempt)  # an error or Ctrl-C, and time to say so

    def finish(self, unit: Unit, outcome: Outcome) -> None:
        """See `Ledger`."""
        attempt = self._hands.pop(unit.key)
        # The outcome alone makes it finished: a worker that is killed after the first line has lost nothing.
        with contextlib.suppress(self._ended_by_others):
            self._storage.set_trial_user_attr(
                attempt._trial_id, "outcome", [outcome.score, outcome.seconds, outcome.why]
            )
            state = self._states.PRUNED if outcome.score is None else self._states.COMPLETE
            values = None if outcome.score is None else [outcome.score]
            self._storage.set_trial_state_values(attempt._trial_id, state=state, values=values)

    # -- attempts -------------------------------------------------------------------------------------------------

    def _open(self, url: str, name: str) -> Any:
        options: dict[str, Any] = {"connect_args": {"timeout": _LOCK_SECONDS}} if url.startswith("sqlite") else {}
        for left in reversed(range(_OPENINGS)):
            try:
                storage = self._optuna.storages.RDBStorage(url, engine_kwargs=options)
                return self._optuna.create_study(
                    storage=storage, study_name=name, direction="maximize", load_if_exists=True
                )
            except ImportError as error:
                raise StorageError(
                    f"the storage {_hidden(url)} needs a package that is not installed: {error}"
                ) from error
            except Exception as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                if left and any(word in first.lower() for word in _MADE_BY_OTHERS):
                    time.sleep(random.uniform(0.1, 0.5))  # not the same for two that stumble over each other
                    continue
                raise StorageError(
                    f"cannot open the storage {_hidden(url)}: {first}; give a URL such as sqlite:///search.db"
                ) from error
        raise AssertionError("the last opening raises or returns")

    def _attempts(self) -> list[Any]:
        return [trial for trial in self._study.get_trials(deepcopy=False) if "key" in trial.user_attrs]

    def _make(self, unit: Unit, params: Mapping[str, Any]) -> Any:
        token = uuid.uuid4().hex
        known = {key: value for key, value in params.items() if key in self.space}
        self._study.add_trial(
            self._optuna.trial.create_trial(
                state=self._states.RUNNING,
                params={key: inner_value(self.space[key], value) for key, value in known.items()},
                distributions={key: distribution(self.space[key]) for key in known},
                user_attrs={
                    "key": unit.key,
                    "values": json.dumps(dict(params)),
                    "budget": unit.budget,
                    "bare": unit.bare,
                    "drawn": unit.params is None,
                    "worker": self.worker,
                    "token": token,
                    "beat": 0,
                },
            )
        )
        return next(attempt for attempt in self._attempts() if attempt.user_attrs["token"] == token)

    def _is_first(self, key: str, mine: Any) -> bool:
        """Whether no earlier attempt at the unit has finished or is in hand; takes those of dead workers back."""
        for attempt in self._attempts():
            if attempt.user_attrs["key"] != key or attempt.number >= mine.number:
                continue
            if "outcome" in attempt.user_attrs:
                return False
            if attempt.state == self._states.RUNNING:
                if self._lives(attempt):
                    return False
                self._take_back(attempt)
        return True

    def _take_back(self, attempt: Any, lost: bool = False) -> None:
        with contextlib.suppress(self._ended_by_others):
            if lost:
                self._storage.set_trial_user_attr(attempt._trial_id, "lost", True)
            self._storage.set_trial_state_values(attempt._trial_id, state=self._states.FAIL)

    def _lives(self, attempt: Any) -> bool:
        worker = attempt.user_attrs["worker"]
        if worker["id"] == self.worker["id"]:
            return attempt.user_attrs["key"] in self._hands or attempt.user_attrs["beat"] == 0
        if worker["machine"] == self.worker["machine"] and not _is_process(worker["process"]):
            return False
        # Clocks of machines differ: what counts is how long it has been silent here.
        beat, now = attempt.user_attrs["beat"], time.monotonic()
        heard, since = self._heard.get(attempt.number, (None, now))
        if beat != heard:
            self._heard[attempt.number] = (beat, now)
            return True
        return now - since < SILENT_SECONDS

    def _beat(self, attempt: Any, stop: threading.Event) -> None:
        number = 0
        while not stop.wait(BEAT_SECONDS):
            number += 1
            with contextlib.suppress(Exception):  # a storage that is away for a moment; the next beat tells
                self._storage.set_trial_user_attr(attempt._trial_id, "beat", number)


def _unit(attempt: Any) -> tuple[Unit, dict[str, Any]]:
    attributes = attempt.user_attrs
    params = json.loads(attributes["values"])
    unit = Unit(
        attributes["key"], None if attributes["drawn"] else params, attributes["budget"], bool(attributes["bare"])
    )
    return unit, params


def _machine() -> str:
    """A name that two machines, or two containers on one, do not share, and one machine before and after a restart."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id",):
        with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
            parts.append(file.read().strip())
    with contextlib.suppress(OSError):
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


def _is_process(number: int) -> bool:
    """Whether a process of this machine runs; one that waits for its parent to notice its end does not."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OSError):
        return True
    with contextlib.suppress(OSError), open(f"/proc/{number}/stat", encoding="latin-1") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return True


def _difference(known: str, wanted: str) -> str:
    """The first setting in which two searches differ, in words."""
    there, here = _flat(json.loads(known)), _flat(json.loads(wanted))
    key = next(key for key in [*there, *here] if there.get(key) != here.get(key))
    return f"{key} = {json.dumps(there.get(key))}, and this one has {json.dumps(here.get(key))}"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= _flat(item, f"{path}.{key}" if path else str(key))
        return found
    return {path: value}


def _hidden(url: str) -> str:
    """A URL without the password in it."""
    head, at, tail = url.rpartition("@")
    return f"{head.split('//')[0]}//...{at}{tail}" if at else url
