"""Interleaved timing in one process, on one thread: ratios of medians, and how much they spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleave(variants: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, list[float]]:
    """Processor seconds of every variant, `rounds` times each, in the order A B C, C B A, A B C, ...

    Many short rounds say more than few long ones: the machine is faster in one second than in the next.
    """
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        names = list(variants) if number % 2 == 0 else list(reversed(variants))
        for name in names:
            start = time.process_time()
            variants[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> tuple[float, float, float]:
    """Ratio of medians, and the quartiles of the ratios of single rounds."""
    low, _, high = statistics.quantiles([a / b for a, b in zip(seconds[name], seconds[base], strict=True)], n=4)
    return statistics.median(seconds[name]) / statistics.median(seconds[base]), low, high
