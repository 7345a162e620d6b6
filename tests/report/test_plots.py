"""PNG plots: drawn from the same numbers, without touching matplotlib's global state."""

from __future__ import annotations

import math
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from perdure.errors import MissingExtraError, UsageError
from perdure.report import plots
from perdure.report.palette import PAPER, styles
from perdure.results import Results


def groups(seeds: int = 2) -> dict[str, list[Results]]:
    matrix = np.array([[0.9, math.nan], [0.4, 0.8]])
    return {
        label: [Results("class", ["a", "b"], matrix + lift, np.full(2, math.nan), seed=seed) for seed in range(seeds)]
        for label, lift in (("ewc", 0.0), ("replay", 0.05))
    }


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_has_the_papers_colour_and_each_methods(tmp_path, theme):
    (path,) = plots.write(groups(), tmp_path, title="Two methods", theme=theme, dpi=60)
    assert path == tmp_path / "accuracy.png"
    with Image.open(path) as picture:
        assert picture.size == (600, 252)
        colours = {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in picture.convert("RGB").getcolors(200_000)}
    assert PAPER[theme] in colours
    assert {getattr(style, theme) for style in styles(groups()).values()} <= colours


def test_global_settings_stay_as_they_are(tmp_path):
    before, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    plots.write(groups(1), tmp_path / "a.png", dpi=40)
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_bars_are_the_final_average_accuracies():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    plots._bars(axes, groups(), "light")
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([60.0, 65.0])
    assert [text.get_text() for text in axes.texts] == ["60.0", "65.0"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["ewc", "replay"]


def test_lines_are_the_accuracy_on_the_tasks_seen():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    plots._stream(axes, groups(), "light")
    assert [list(line.get_ydata()) for line in axes.lines] == [pytest.approx([90, 60]), pytest.approx([95, 65])]


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"perdure\[plot\]"):
        plots.write(groups(), tmp_path)
    with pytest.raises(UsageError):
        plots.write({}, tmp_path)
    assert list(tmp_path.iterdir()) == []
