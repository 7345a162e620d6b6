"""Colours for methods and for accuracies, readable on light and dark paper and by colour-blind readers.

The hues are those of Okabe and Ito (2008), darkened for light paper and lightened for dark paper until each stands at
least 3:1 from it. Colour is never alone: every method has a marker of its own too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

PAPER = {"light": "#ffffff", "dark": "#14181d"}
LEVELS = 20


class Style(NamedTuple):
    """How one method is drawn: a colour a theme, a marker (a matplotlib letter), and whether its line is dashed."""

    light: str
    dark: str
    marker: str
    dashed: bool


_COLOURS = [
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#f58345"),
    ("#009e73", "#2bc79a"),
    ("#b8578f", "#e49bc6"),
    ("#a67c00", "#f0c94a"),
    ("#6f4fa8", "#b79be6"),
]
_MARKERS = "os^Dv<>p"
# The two ends between which every other method lies are neutral.
_REFERENCES = {"finetune": Style("#6b7278", "#9aa3ab", "X", False), "joint": Style("#1c2126", "#eef1f4", "h", True)}

_SCALE = {"light": ("#eef3f8", "#8dbbdd", "#0b4a7d"), "dark": ("#222a32", "#2d6b9a", "#b9e0fa")}


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style for each label, in the order given; `finetune` and `joint` always look the same.

    >>> styles(["finetune", "ewc"])["ewc"].light
    '#0072b2'
    """
    chosen: dict[str, Style] = {}
    k = 0
    for label in labels:
        if label in _REFERENCES:
            chosen[label] = _REFERENCES[label]
        else:
            light, dark = _COLOURS[k % len(_COLOURS)]
            chosen[label] = Style(light, dark, _MARKERS[k % len(_MARKERS)], dashed=k // len(_COLOURS) % 2 == 1)
            k += 1
    return chosen


def level(accuracy: float) -> int:
    """The step 0 to `LEVELS` of the colour scale for an accuracy between 0 and 1."""
    return round(min(max(accuracy, 0.0), 1.0) * LEVELS)


def fill_and_ink(step: int, theme: str) -> tuple[str, str]:
    """The colour of a cell at a step of the scale, and black or white, whichever can be read better on it."""
    low, middle, high = (_rgb(colour) for colour in _SCALE[theme])
    position = 2 * step / LEVELS
    start, end = (low, middle) if position <= 1 else (middle, high)
    share = position if position <= 1 else position - 1
    mixed = tuple(round(a + (b - a) * share) for a, b in zip(start, end, strict=True))
    fill = "#" + "".join(f"{channel:02x}" for channel in mixed)
    return fill, max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, fill))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours `#rrggbb`, from 1 to 21 (Web Content Accessibility Guidelines 2.1)."""
    brighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5))


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _rgb(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
