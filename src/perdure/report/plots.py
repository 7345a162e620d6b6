"""The same pictures as PNG files, with matplotlib (`pip install 'perdure[plot]'`)."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perdure.comparison import check_groups, label_of, summarise
from perdure.errors import MissingExtraError
from perdure.files import write_atomically
from perdure.report import series
from perdure.report.palette import PAPER, styles
from perdure.results import Results

INK = {"light": ("#1c2126", "#5a636c", "#e1e5e9"), "dark": ("#e6e9ec", "#a0a9b2", "#2d343c")}


def write(
    groups: Mapping[str, Sequence[Results]],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    theme: str = "light",
    dpi: int = 150,
) -> list[Path]:
    """Draw the average accuracy over the stream, with bands of one standard deviation, beside the final bars.

    Parameters
    ----------
    path
        A `.png` file, or a folder that gets `accuracy.png`.
    theme
        `light` or `dark`.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    UsageError
        If the runs cannot stand in one picture.
    StorageError
        If the file cannot be written.
    """
    check_groups(groups)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib; pip install 'perdure[plot]' installs it") from error
    target = Path(path)
    if target.suffix.lower() != ".png":
        target = target / "accuracy.png"
    # Without pyplot there is no global figure, backend or rcParams that could change under the caller.
    layout = ConstrainedLayoutEngine(w_pad=0.16, h_pad=0.14)
    figure = Figure(figsize=(10, 4.2), dpi=dpi, layout=layout, facecolor=PAPER[theme])
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.55, 1])
    _stream(left, groups, theme)
    _bars(right, groups, theme)
    if title:
        figure.suptitle(title, x=0.016, ha="left", color=INK[theme][0], fontsize=12, fontweight="bold")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", facecolor=PAPER[theme], metadata={"Software": None})
    return [write_atomically(target, picture.getvalue())]


def _stream(axes: Any, groups: Mapping[str, Sequence[Results]], theme: str) -> None:
    lines = series.seen_average(groups)
    drawn = styles(groups)
    for line in lines:
        style = drawn[line.label]
        colour = getattr(style, theme)
        x, mean, std = zip(*line.points, strict=True) if line.points else ((), (), ())
        axes.plot(
            x,
            [100 * m for m in mean],
            color=colour,
            marker=style.marker,
            linestyle="--" if style.dashed else "-",
            linewidth=1.8,
            markersize=5.5,
            markeredgecolor=PAPER[theme],
            markeredgewidth=0.6,
            label=line.label,
        )
        lower = [100 * (m - s) for m, s in zip(mean, std, strict=True)]
        upper = [100 * (m + s) for m, s in zip(mean, std, strict=True)]
        axes.fill_between(x, lower, upper, color=colour, alpha=0.16, linewidth=0)
    bottom, top, _ = series.accuracy_range(lines)
    _plain(axes, theme, "average accuracy over the tasks seen, %", grid="y")
    axes.set_ylim(100 * bottom, 100 * top + 2)
    axes.set_xlabel("tasks trained", color=INK[theme][1], fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    paper = {"facecolor": PAPER[theme], "edgecolor": "none", "framealpha": 0.85}
    axes.legend(fontsize=9, labelcolor=INK[theme][0], handlelength=2.6, **paper)


def _bars(axes: Any, groups: Mapping[str, Sequence[Results]], theme: str) -> None:
    name = "final_average_accuracy"
    drawn = styles(groups)
    for row, (label, runs) in enumerate(groups.items()):
        summary = summarise(runs)
        mean, std = summary["mean"][name], summary["std"][name]
        if mean is None:
            continue
        error = {"xerr": 100 * std, "error_kw": {"ecolor": INK[theme][0], "elinewidth": 1.2}} if std else {}
        axes.barh(row, 100 * mean, height=0.5, color=getattr(drawn[label], theme), **error)
        end = 100 * (mean + (std or 0)) + 1.5
        axes.text(end, row, f"{100 * mean:.1f}", va="center", color=INK[theme][0], fontsize=9)
    _plain(axes, theme, f"{label_of(name)}, %", grid="x")
    axes.set_yticks(range(len(groups)), list(groups), color=INK[theme][0])
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xticks([0, 25, 50, 75, 100])


def _plain(axes: Any, theme: str, title: str, *, grid: str) -> None:
    ink, quiet, rule = INK[theme]
    axes.set_facecolor(PAPER[theme])
    axes.set_title(title, loc="left", fontsize=10, color=ink)
    axes.grid(axis=grid, color=rule, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=quiet, labelsize=9, length=0)
    axes.spines[:].set_visible(False)
