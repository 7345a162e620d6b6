"""What becomes of a trial, and the ledger that workers share: who does what, and what has finished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Unit:
    """One thing to train and score.

    Attributes
    ----------
    key
        Its name within the search, the same in every process and after every restart.
    params
        Setting -> value; None if the sampler draws them from what has finished.
    budget
        Epochs or steps that it may take; None for all.
    bare
        Whether it is fine-tuning, without the experiment's methods.
    """

    key: str
    params: Mapping[str, Any] | None
    budget: int | None = None
    bare: bool = False

    @property
    def cost(self) -> int:
        """What it takes, beside others of the same search."""
        return self.budget or 1


@dataclass(frozen=True)
class Outcome:
    """The score of a trial, None if it diverged, with the reason; and the seconds that it took."""

    score: float | None
    seconds: float
    why: str = ""


@dataclass(frozen=True)
class Trial:
    """A unit that has finished."""

    unit: Unit
    params: Mapping[str, Any]
    outcome: Outcome

    @property
    def score(self) -> float:
        """The score; below all others if it diverged."""
        return float("-inf") if self.outcome.score is None else self.outcome.score


class Ledger(Protocol):
    """What several workers agree on: a unit is done once, and by one of them at a time."""

    def look(self) -> tuple[dict[str, Trial], dict[str, Mapping[str, Any]]]:
        """All trials that have finished, and the values of those that a living worker has in hand, by key."""

    def begun(self, key: str) -> Mapping[str, Any] | None:
        """The values that a worker, who died since, began a unit with."""

    @contextmanager
    def claim(self, unit: Unit, params: Mapping[str, Any]) -> Iterator[bool]:
        """Take a unit in hand while the block runs; false if somebody else was faster."""
        yield False

    def finish(self, unit: Unit, outcome: Outcome) -> None:
        """Keep the outcome of a unit in hand."""


@dataclass
class Memory:
    """A ledger of one process, which ends with it."""

    trials: dict[str, Trial] = field(default_factory=dict)
    in_hand: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def look(self) -> tuple[dict[str, Trial], dict[str, Mapping[str, Any]]]:
        """See `Ledger`."""
        return dict(self.trials), dict(self.in_hand)

    def begun(self, key: str) -> Mapping[str, Any] | None:
        """See `Ledger`."""
        return None

    @contextmanager
    def claim(self, unit: Unit, params: Mapping[str, Any]) -> Iterator[bool]:
        """See `Ledger`."""
        self.in_hand[unit.key] = params
        try:
            yield True
        finally:
            del self.in_hand[unit.key]

    def finish(self, unit: Unit, outcome: Outcome) -> None:
        """See `Ledger`."""
        self.trials[unit.key] = Trial(unit, self.in_hand[unit.key], outcome)
