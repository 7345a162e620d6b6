"""Pictures as inline SVG, drawn by hand so that a report needs nothing else.

Colours are classes, so that the page's style sheet can give each theme its own: `m0`, `m1`, ... for methods and `h0` to
`h20` for accuracies. Each picture has a title and a description that says the same numbers in words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from perdure.metrics import Array
from perdure.report.palette import Style, level
from perdure.report.series import Series

WIDE_CELLS = 7
NUMBERED_CELLS = 20
CHARACTER = 6.4
# Corners, and the angle of the first.
_POLYGONS = {
    "s": (4, 45),
    "^": (3, -90),
    "D": (4, 0),
    "v": (3, 90),
    "<": (3, 180),
    ">": (3, 0),
    "p": (5, -90),
    "h": (6, 0),
}
_CROSS = [(0, 1), (1, 2), (2, 1), (1, 0), (2, -1), (1, -2), (0, -1), (-1, -2), (-2, -1), (-1, 0), (-2, 1), (-1, 2)]


def heat_map(ident: str, title: str, names: Sequence[str], matrix: Array, untrained: Array) -> str:
    """An accuracy matrix [T, T] in percent: a row after each task, a column for each task, NaN left empty."""
    tasks = len(names)
    cell = 40 if tasks <= WIDE_CELLS else 22 if tasks <= NUMBERED_CELLS else 9
    labels = _short(names, 6 if tasks <= WIDE_CELLS else 2)
    rows = [(f"after {label}", row) for label, row in zip(labels, matrix, strict=True)]
    if not all(math.isnan(value) for value in untrained):
        rows.insert(0, ("untrained", untrained))
    left = round(CHARACTER * max(len(name) for name, _ in rows)) + 10
    top = 22
    width, height = left + tasks * cell + 1, top + len(rows) * cell + 1
    every = 1 if tasks <= NUMBERED_CELLS else math.ceil(tasks / 10)
    parts = [
        f'<text x="{left + (j + 0.5) * cell:g}" y="{top - 8}" text-anchor="middle">{escape(labels[j])}</text>'
        for j in range(0, tasks, every)
    ]
    for i, (name, row) in enumerate(rows):
        y = top + i * cell
        if i % every == 0:
            middle = f'y="{y + cell / 2:g}" dominant-baseline="central" text-anchor="end"'
            parts.append(f'<text x="{left - 8}" {middle}>{escape(name)}</text>')
        parts += [_cell(left + j * cell, y, cell, float(value)) for j, value in enumerate(row)]
    spoken = "; ".join(f"{name}: {', '.join(_spoken(float(v)) for v in row)}" for name, row in rows)
    description = f"Accuracy in percent on each task ({', '.join(names)}), row by row. {spoken}."
    return _picture(ident, title, description, width, height, parts, "heat" if tasks <= WIDE_CELLS else "heat fine")


def line_chart(
    ident: str,
    title: str,
    lines: Sequence[Series],
    styles: Mapping[str, Style],
    axis: tuple[float, float, float],
    *,
    width: int,
    height: int,
    named: bool = False,
) -> str:
    """Accuracy over the stream: one line a method, its band one standard deviation, its name at the end if `named`."""
    bottom, top, step = axis
    start, end = lines[0].x[0], lines[0].x[-1]
    # A single position stands in the middle.
    first, last = (start, end) if end > start else (start - 1, start + 1)
    names = {line.label: f"{line.label} {100 * line.points[-1][1]:.1f}" for line in lines if line.points}
    right = round(CHARACTER * 1.05 * max((len(name) for name in names.values()), default=0)) + 24 if named else 12
    box = (38, 12, width - right, height - 38)
    order = list(styles)

    def px(x: float) -> float:
        return round(box[0] + 6 + (x - first) / (last - first) * (box[2] - box[0] - 12), 1)

    def py(y: float) -> float:
        return round(box[3] - (min(max(y, bottom), top) - bottom) / (top - bottom) * (box[3] - box[1]), 1)

    parts = []
    for k in range(round((top - bottom) / step) + 1):
        value = bottom + k * step
        parts.append(f'<path class="grid" d="M{box[0]} {py(value):g}H{box[2]}"/>')
        place = f'x="{box[0] - 6}" y="{py(value):g}" dominant-baseline="central" text-anchor="end"'
        parts.append(f"<text {place}>{100 * value:.0f}</text>")
    for x in range(start, end + 1, math.ceil((end - start + 1) / 10)):
        place = f'x="{px(x):g}" y="{box[3] + 16}" text-anchor="middle"'
        parts.append(f"<text {place}>{x}</text>")
    middle = f'x="{(box[0] + box[2]) / 2:g}" y="{height - 5}" text-anchor="middle"'
    parts.append(f"<text {middle}>tasks trained</text>")
    for line in lines:
        if line.std is not None and line.points:
            upper = [f"{px(x):g} {py(m + s):g}" for x, m, s in line.points]
            lower = [f"{px(x):g} {py(m - s):g}" for x, m, s in reversed(line.points)]
            parts.append(f'<path class="band m{order.index(line.label)}" d="M{"L".join(upper + lower)}Z"/>')
    for line in lines:
        dash = " dashed" if styles[line.label].dashed else ""
        path = "L".join(f"{px(x):g} {py(m):g}" for x, m, _ in line.points)
        if path:
            parts.append(f'<path class="line{dash} m{order.index(line.label)}" d="M{path}"/>')
        if end - start <= 24:
            kind = f"dot m{order.index(line.label)}"
            parts += [marker(styles[line.label].marker, px(x), py(m), kind) for x, m, _ in line.points]
    if named:
        ends = {line.label: py(line.points[-1][1]) for line in lines if line.points}
        for label, y in _apart(ends, 17, box[1], box[3]).items():
            number = f"m{order.index(label)}"
            parts.append(f'<path class="leader {number}" d="M{box[2] - 1} {ends[label]:g}L{box[2] + 12} {y:g}"/>')
            place = f'x="{box[2] + 16}" y="{y:g}" dominant-baseline="central"'
            parts.append(f'<text class="name" {place}>{escape(names[label])}</text>')
    said = {line.label: ", ".join(f"{100 * m:.1f} after {x}" for x, m, _ in line.points) for line in lines}
    spoken = "; ".join(f"{label}: {numbers or 'nothing'}" for label, numbers in said.items())
    description = f"Accuracy in percent by the number of tasks trained. {spoken}."
    return _picture(ident, title, description, width, height, parts, "chart")


def marker(kind: str, x: float, y: float, css: str, size: float = 3.6) -> str:
    """A marker centred on (x, y): the shapes of matplotlib's letters."""
    if kind == "o":
        return f'<circle class="{css}" cx="{x:g}" cy="{y:g}" r="{size:g}"/>'
    if kind == "X":
        points = [f"{x + a * size / 1.7:.1f} {y + b * size / 1.7:.1f}" for a, b in _CROSS]
    else:
        corners, turn = _POLYGONS[kind]
        angles = [math.radians(turn + 360 * k / corners) for k in range(corners)]
        points = [f"{x + 1.3 * size * math.cos(a):.1f} {y + 1.3 * size * math.sin(a):.1f}" for a in angles]
    return f'<path class="{css}" d="M{"L".join(points)}Z"/>'


def _cell(x: int, y: int, cell: int, value: float) -> str:
    square = f'x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" rx="{3 if cell > 20 else 1}"'
    if math.isnan(value):
        return f'<rect class="empty" {square}/>'
    shown = "" if cell < 20 else f"{100 * value:.{1 if cell >= 40 else 0}f}"
    place = f'x="{x + cell / 2:g}" y="{y + cell / 2:g}" text-anchor="middle" dominant-baseline="central"'
    text = f"<text {place}>{shown}</text>" if shown else ""
    return f'<g class="h{level(value)}"><rect {square}/>{text}</g>'


def _picture(ident: str, title: str, description: str, width: int, height: int, parts: list[str], css: str) -> str:
    return (
        f'<svg class="{css}" role="img" aria-labelledby="{ident}-title {ident}-desc" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">'
        f'<title id="{ident}-title">{escape(title)}</title><desc id="{ident}-desc">{escape(description)}</desc>'
        + "".join(parts)
        + "</svg>"
    )


def _short(names: Sequence[str], limit: int) -> list[str]:
    """The names if all fit, else their numbers from 1."""
    return list(names) if max(map(len, names)) <= limit else [str(k + 1) for k in range(len(names))]


def _spoken(value: float) -> str:
    return "not evaluated" if math.isnan(value) else f"{100 * value:.1f}"


def _apart(wanted: Mapping[str, float], gap: float, low: float, high: float) -> dict[str, float]:
    """Positions as near as possible to those wanted that keep `gap` between neighbours and stay within low and high."""
    ordered = sorted(wanted, key=lambda label: wanted[label])
    gap = min(gap, (high - low) / max(1, len(ordered) - 1))
    placed: dict[str, float] = {}
    floor = low
    for label in ordered:
        placed[label] = max(wanted[label], floor)
        floor = placed[label] + gap
    ceiling = high
    for label in reversed(ordered):
        placed[label] = min(placed[label], ceiling)
        ceiling = placed[label] - gap
    return placed
