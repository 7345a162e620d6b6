"""A worker: takes a unit in hand, trains it, keeps its score, until the search has no more."""

from __future__ import annotations

import time
from collections.abc import Callable

from perdure.tuning.sampling import drawn
from perdure.tuning.scoring import Evaluate
from perdure.tuning.searches import Search
from perdure.tuning.settings import Rules
from perdure.tuning.space import Space
from perdure.tuning.trials import Ledger, Unit

WAIT_SECONDS = 0.2
"""Between two looks at units that others have in hand."""


def work(
    ledger: Ledger,
    search: Search,
    evaluate: Evaluate,
    draw: Callable[[Unit, Ledger], dict[str, object]],
    looked: Callable[[], None] = lambda: None,
) -> None:
    """Run units until all are finished, by this worker or by others.

    Parameters
    ----------
    draw
        Gives the values of a unit that has none of its own.
    looked
        Called after every look at the ledger.
    """
    while True:
        finished, taken = ledger.look()
        looked()
        left = [unit for unit in search.ready(finished) if unit.key not in finished]
        if not left:
            return
        free = [unit for unit in left if unit.key not in taken]
        if not free:
            time.sleep(WAIT_SECONDS)
            continue
        unit = free[0]
        params = unit.params
        if params is None:
            params = ledger.begun(unit.key) or draw(unit, ledger)
        with ledger.claim(unit, params) as mine:
            if mine:
                ledger.finish(unit, evaluate(unit, params))


def sampler(space: Space, rules: Rules) -> Callable[[Unit, Ledger], dict[str, object]]:
    """A `draw` for `work`: the sampler of the rules, which learns from what has finished."""

    def draw(unit: Unit, ledger: Ledger) -> dict[str, object]:
        finished, running = ledger.look()
        ordered = sorted(finished.values(), key=lambda trial: _number(trial.unit))
        history = [(trial.params, trial.outcome.score) for trial in ordered]
        return drawn(space, rules.sampler, (rules.seed, _number(unit)), history, list(running.values()), rules.trials)

    return draw


def _number(unit: Unit) -> int:
    """Its place in the plan: a history in that order does not depend on when a trial was finished."""
    return int(unit.key.split()[-1])
