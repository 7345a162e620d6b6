"""The report's page: what stands in it, in order, as HTML."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from perdure.comparison import TABLE, Comparison, Summary, compare, human_costs, label_of, spread
from perdure.metrics import DESCRIPTIONS
from perdure.pictures import png_size
from perdure.report import series
from perdure.report.palette import LEVELS, Style, styles
from perdure.report.style import style_sheet
from perdure.report.svg import WIDE_CELLS, heat_map, line_chart, marker
from perdure.results import ONE_OUTPUT, Results, kind_of

COSTS = ("training time", "peak memory", "state kept")
MOST_PANELS, MOST_PICTURES = 24, 10
MINUS = "−"
# Not even a stylesheet of another origin could be loaded from this page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(
    groups: Mapping[str, Sequence[Results]], *, title: str | None = None, settings: Mapping[str, Any] | None = None
) -> str:
    """The report as one HTML document."""
    comparison = compare(groups)
    drawn = styles(groups)
    run = next(iter(groups.values()))[0]
    scenario = kind_of(run.scenario)
    seeds = sorted({seed for found in comparison.seeds.values() for seed in found})
    counts = [_count(len(run.matrix), "task"), _count(len(groups), "method"), _count(len(seeds), "seed")]
    heading = title or f"{run.benchmark or 'Methods compared'}, {scenario}"
    body = [
        "<header>",
        f"<h1>{escape(heading)}</h1>",
        f'<p class="quiet">{escape(" · ".join([*filter(None, [run.benchmark]), scenario, *counts]))}</p>',
        "</header>",
        _headline(comparison),
        _table_section(comparison, groups),
        _guide(comparison, run, len(seeds)),
        _stream_section(groups, drawn),
        _task_section(groups, drawn),
        _matrix_section(groups, drawn),
        _picture_section(groups, drawn),
        _notes_section(comparison),
        _details_section(groups, comparison, settings or {}, scenario),
    ]
    version = run.versions.get("perdure", "")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(heading)}</title>\n<style>{style_sheet(drawn.values())}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n<footer>Made by perdure {escape(version)}. This page is one file and loads nothing else.</footer>"
        "\n</main>\n</body>\n</html>\n"
    )


def _headline(comparison: Comparison) -> str:
    scores = {label: summary["mean"]["final_average_accuracy"] for label, summary in comparison.summaries.items()}
    known = {label: score for label, score in scores.items() if score is not None}
    contenders = {label: score for label, score in known.items() if label != "joint"} or known
    if not contenders:
        return ""
    best = max(contenders, key=lambda label: contenders[label])
    shown = {label: _percent(summary) for label, summary in comparison.summaries.items()}
    sentence = f"<b>{escape(best)}</b> ends with a final average accuracy of {shown[best]}"
    if len(contenders) > 1:
        sentence += f", the highest of {len(contenders)} methods"
    if "joint" in known and best != "joint":
        sentence += f"; joint training, which sees the data of all tasks so far, reaches {shown['joint']}"
    return f'<p class="lead">{sentence}.</p>'


def _table_section(comparison: Comparison, groups: Mapping[str, Sequence[Results]]) -> str:
    named = {name for summary in comparison.summaries.values() for name in summary["mean"]}
    others = [name for name in [*DESCRIPTIONS, *sorted(named - set(DESCRIPTIONS))] if name in named]
    others = [
        name
        for name in others
        if name not in comparison.columns
        and any(summary["mean"].get(name) is not None for summary in comparison.summaries.values())
    ]
    reasons = dict.fromkeys(
        why for runs in groups.values() for run in runs for name, why in run.reasons().items() if name in TABLE
    )
    parts = ["<section>", _table(comparison, comparison.columns, "Metrics and costs", costs=True)]
    if reasons:
        sentences = " ".join(f"{why[0].upper()}{why[1:]}." for why in reasons)
        parts.append(f'<p class="under">{escape(sentences)}</p>')
    if others:
        table = _table(comparison, others, "More metrics", costs=False)
        terms = " ".join(_definition(name) for name in others if name in DESCRIPTIONS)
        parts.append(f'<details><summary>More metrics</summary>{table}<p class="guide">{terms}</p></details>')
    return "\n".join([*parts, "</section>"])


def _table(comparison: Comparison, columns: Sequence[str], caption: str, *, costs: bool) -> str:
    drawn = styles(comparison.summaries)
    head = ['<th scope="col">method</th>']
    for name in columns:
        unit = "%" if name in DESCRIPTIONS else ""
        head.append(f'<th scope="col">{escape(label_of(name))} <small>{_direction(name)} {unit}</small></th>')
    if costs:
        gaps = [" gap", "", ""]
        head += [f'<th scope="col" class="cost{gap}">{name}</th>' for name, gap in zip(COSTS, gaps, strict=True)]
    best = {name: _best(comparison, name) for name in columns}
    rows = []
    for k, (label, summary) in enumerate(comparison.summaries.items()):
        cells = [f'<th scope="row"><span class="who">{_sign(drawn[label], k)}{escape(label)}</span></th>']
        for name in columns:
            mean, *std = spread(summary, name).split(" ± ")
            shown = "–" if mean == "-" else mean.replace("-", MINUS) + "".join(f" <i>± {s}</i>" for s in std)
            mark = ' class="best"' if label in best[name] else ""
            cells.append(f'<td data-method="{escape(label)}" data-metric="{escape(name)}"{mark}>{shown}</td>')
        if costs:
            numbers = human_costs(comparison.costs[label])
            cells += [
                f'<td class="cost{gap}" data-method="{escape(label)}" data-cost="{name}">{escape(number)}</td>'
                for name, number, gap in zip(COSTS, numbers, gaps, strict=True)
            ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
        f"<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _guide(comparison: Comparison, run: Results, seeds: int) -> str:
    spread_over = f", as mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    counts = "every example counts once" if run.scenario in ONE_OUTPUT else "every task counts once"
    remarks = {"average_incremental_accuracy": counts, "forgetting": "lower is better"}
    terms = " ".join(_definition(name, remarks.get(name)) for name in comparison.columns)
    return (
        f'<section><h2>How to read this</h2><p class="guide">Accuracies are shares of correct predictions on held-out '
        f"examples in %{spread_over}; bold is the best of a column, joint training apart. {terms}</p></section>"
    )


def _definition(name: str, remark: str | None = None) -> str:
    aside = f" ({remark})" if remark else ""
    return f"<b>{escape(label_of(name).capitalize())}</b> is {escape(DESCRIPTIONS[name].meaning)}{aside}."


def _stream_section(groups: Mapping[str, Sequence[Results]], drawn: Mapping[str, Style]) -> str:
    lines = series.seen_average(groups)
    axis = series.accuracy_range(lines)
    title = "Average accuracy over the tasks seen so far"
    wide = line_chart("stream", title, lines, drawn, axis, width=1070, height=400, named=True)
    narrow = line_chart("stream-narrow", title, lines, drawn, axis, width=360, height=270)
    band = "The band is one standard deviation over seeds. " if any(line.std is not None for line in lines) else ""
    return (
        f'<section><h2>Over the stream</h2><p class="quiet">{title}, in %. {band}</p>'
        f'<figure class="wide">{wide}</figure><figure class="narrow">{_key(drawn)}{narrow}</figure></section>'
    )


def _task_section(groups: Mapping[str, Sequence[Results]], drawn: Mapping[str, Style]) -> str:
    names = series.task_names(groups)
    shown = _spread_out(list(range(len(names))), MOST_PANELS)
    panels = {j: series.per_task(groups, j) for j in shown}
    axis = series.accuracy_range([line for lines in panels.values() for line in lines])
    figures = []
    for j, lines in panels.items():
        name = f"Task {j + 1}" + ("" if names[j] == str(j + 1) else f": {names[j]}")
        chart = line_chart(f"task-{j}", f"Accuracy on {name}", lines, drawn, axis, width=330, height=215)
        figures.append(f"<figure><h3>{escape(name)}</h3>{chart}</figure>")
    some = "" if len(shown) == len(names) else f" {len(shown)} of the {len(names)} tasks are shown."
    return (
        '<section><h2>Each task</h2><p class="quiet">Accuracy on one task after each task of the stream, in %.'
        f'{some}</p>{_key(drawn)}<div class="panels">{"".join(figures)}</div></section>'
    )


def _matrix_section(groups: Mapping[str, Sequence[Results]], drawn: Mapping[str, Style]) -> str:
    names = series.task_names(groups)
    figures = []
    # Up to this size a matrix fits a phone; a larger one scrolls within its own frame instead of shrinking.
    large = len(names) > WIDE_CELLS
    for k, (label, runs) in enumerate(groups.items()):
        picture = heat_map(f"matrix-{k}", f"Accuracy matrix of {label}", names, *series.mean_matrix(runs))
        if large:
            region = f'class="scroll" role="region" tabindex="0" aria-label="Accuracy matrix of {escape(label)}"'
            picture = f"<div {region}>{picture}</div>"
        figures.append(f"<figure><h3>{_sign(drawn[label], k)}{escape(label)}</h3>{picture}</figure>")
    steps = "".join(f'<g class="h{k}"><rect x="{k * 10}" width="10.5" height="10"/></g>' for k in range(LEVELS + 1))
    scale = f'<svg viewBox="0 0 {10 * LEVELS + 10} 10" aria-hidden="true">{steps}</svg>'
    mean = " Mean over seeds." if any(len(runs) > 1 for runs in groups.values()) else ""
    return (
        '<section><h2>Accuracy matrices</h2><p class="quiet">Rows: after training on a task. Columns: accuracy on a '
        f"task, in %. An empty cell was not evaluated or is not defined.{mean}</p>"
        f'<div class="panels{" large" * large}">{"".join(figures)}</div>'
        f'<div class="scale">0 % {scale} 100 %</div></section>'
    )


def _picture_section(groups: Mapping[str, Sequence[Results]], drawn: Mapping[str, Style]) -> str:
    """What methods have to show, of the first seed of each set of methods."""
    names, rows = series.task_names(groups), []
    for k, (label, runs) in enumerate(groups.items()):
        run = next((run for run in runs if run.pictures), None)
        for method, by_task in {} if run is None else run.pictures.items():
            assert run is not None
            figures = []
            for j in _spread_out(sorted(by_task), MOST_PICTURES):
                after = f"after task {j + 1}" + ("" if names[j] == str(j + 1) else f": {names[j]}")
                width, height = png_size(by_task[j])
                source = f"data:image/png;base64,{base64.b64encode(by_task[j]).decode()}"
                alt = f"Images that {method} replays {after}"
                figures.append(
                    f'<figure><img class="grid" src="{source}" width="{width}" height="{height}" alt="{escape(alt)}">'
                    f"<figcaption>{escape(after)}</figcaption></figure>"
                )
            seed = f", seed {run.seed}" if len(runs) > 1 else ""
            head = f"{_sign(drawn[label], k)}{escape(label)}{seed}"
            rows.append(f'<h3 class="pictured">{head}</h3><div class="panels small">{"".join(figures)}</div>')
    if not rows:
        return ""
    return (
        '<section><h2>What is replayed</h2><p class="quiet">Images that a generator draws after each task, '
        f"in the order of the classes that the model sees in them.</p>{''.join(rows)}</section>"
    )


def _notes_section(comparison: Comparison) -> str:
    if not comparison.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
    return f'<section><h2>What the seeds support</h2><ul class="notes">{items}</ul></section>'


def _details_section(
    groups: Mapping[str, Sequence[Results]], comparison: Comparison, settings: Mapping[str, Any], scenario: str
) -> str:
    runs = [run for group in groups.values() for run in group]
    names = series.task_names(groups)
    rows = {"benchmark": runs[0].benchmark, "scenario": scenario}
    rows["tasks"] = ", ".join(f"{k + 1}" if name == str(k + 1) else f"{k + 1}: {name}" for k, name in enumerate(names))
    seeds = {label: ", ".join(map(str, sorted(found))) for label, found in comparison.seeds.items()}
    same = len(set(seeds.values())) == 1
    rows["seeds"] = next(iter(seeds.values())) if same else "; ".join(f"{label}: {s}" for label, s in seeds.items())
    rows |= {f"{label} state": state for label, group in groups.items() if (state := _state(group[0]))}
    rows |= dict(_flat(settings))
    names_and_versions = sorted({(name, version) for run in runs for name, version in run.versions.items()})
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in names_and_versions)
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows.items() if value)
    return f"<section><h2>Run details</h2><dl>{items}</dl></section>"


def _state(run: Results) -> str:
    return ", ".join(f"{name} {size:,} bytes" for name, size in run.state_bytes.items())


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            yield f"{prefix}{key}", text


def _spread_out(items: Sequence[int], most: int) -> list[int]:
    """At most so many of the items, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in sorted({round(k * (len(items) - 1) / (most - 1)) for k in range(most)})]


def _best(comparison: Comparison, name: str) -> set[str]:
    """The labels with the best mean as it is printed, so that two equal numbers look equal."""
    if name not in DESCRIPTIONS or len(comparison.summaries) < 2:
        return set()
    shown = {
        label: round(100 * mean, 1)
        for label, summary in comparison.summaries.items()
        if label != "joint" and (mean := summary["mean"].get(name)) is not None
    }
    pick = min if DESCRIPTIONS[name].better == "lower" else max
    return {label for label, value in shown.items() if value == pick(shown.values())}


def _percent(summary: Summary) -> str:
    """The final average accuracy in one piece that no line break can part."""
    return f"{spread(summary, 'final_average_accuracy')} %".replace(" ", "\N{NO-BREAK SPACE}")


def _key(drawn: Mapping[str, Style]) -> str:
    items = "".join(f"<li>{_sign(style, k)}{escape(label)}</li>" for k, (label, style) in enumerate(drawn.items()))
    return f'<ul class="key">{items}</ul>'


def _sign(style: Style, k: int) -> str:
    line = f'<path class="line{" dashed" if style.dashed else ""} m{k}" d="M1 7H29"/>'
    dot = marker(style.marker, 15, 7, f"dot m{k}", 4)
    return f'<svg class="sign" viewBox="0 0 30 14" aria-hidden="true">{line}{dot}</svg>'


def _direction(name: str) -> str:
    if name not in DESCRIPTIONS:
        return ""
    return "↓" if DESCRIPTIONS[name].better == "lower" else "↑"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
