"""A measured ratio beside its goal."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.timing import ratio


@dataclass(frozen=True)
class Row:
    """`what` took `median` times as long as `base`; `low` and `high` are quartiles of single rounds.

    A goal is the largest ratio that is good enough, or the smallest where `more` says that more is better.
    """

    model: str
    what: str
    base: str
    median: float
    low: float
    high: float
    goal: float | None = None
    more: bool = False

    @classmethod
    def of(
        cls,
        model: str,
        what: str,
        base: str,
        seconds: dict[str, list[float]],
        pair: tuple[str, str],
        goal: float | None,
    ) -> Row:
        """The ratio of two interleaved variants."""
        return cls(model, what, base, *ratio(seconds, *pair), goal)

    @property
    def missed(self) -> bool:
        """Whether the ratio, as it is printed, is worse than the goal."""
        if self.goal is None:
            return False
        shown = round(self.median, 2)
        return shown < self.goal if self.more else shown > self.goal

    def __str__(self) -> str:
        target = "" if self.goal is None else f"{'≥' if self.more else '≤'} {self.goal:.2f}"
        verdict = "" if self.goal is None else "**missed**" if self.missed else "reached"
        spread = f"{self.low:.2f} to {self.high:.2f}"
        return f"| {self.model} | {self.what} | {self.base} | {self.median:.2f} | {spread} | {target} | {verdict} |"


HEAD = "| model | what | to | ratio | rounds | goal | |\n|---|---|---|---|---|---|---|"
