"""The HTML report: one valid file that loads nothing and shows the numbers of the metrics, readable in both themes."""

from __future__ import annotations

import base64
import html.parser
import itertools
import math
import re

import numpy as np
import pytest

from perdure import report
from perdure.comparison import human_bytes, human_seconds, summarise
from perdure.errors import StorageError, UsageError
from perdure.pictures import png
from perdure.report.palette import LEVELS, PAPER, contrast, fill_and_ink, level, styles
from perdure.report.svg import _apart
from perdure.results import Results

NAN = math.nan
LABELS = ("finetune", "ewc", "replay", "derpp", "joint")
VOID = {"meta", "br", "link", "img", "input", "hr"}


def run(label: str, seed: int, *, tasks: int = 5, scenario: str = "class", names: list[str] | None = None) -> Results:
    rng = np.random.default_rng([LABELS.index(label), seed, tasks])
    matrix = rng.random((tasks, tasks))
    own = np.where(np.tri(tasks, dtype=bool), matrix, NAN) if scenario == "class" else matrix
    untrained = np.full(tasks, NAN) if scenario == "class" else rng.random(tasks)
    return Results(
        scenario,
        names or [f"{2 * j}/{2 * j + 1}" for j in range(tasks)],
        own,
        untrained,
        benchmark="split_digits",
        methods=[] if label == "finetune" else [label],
        seed=seed,
        test_sizes=np.full(tasks, 72),
        task_restricted={"matrix": np.clip(matrix + 0.1, 0, 1), "untrained": np.full(tasks, 0.5)},
        seconds={"train": 2.0 + seed},
        state_bytes={} if label in ("finetune", "joint") else {label: 14_400},
        peak_memory_bytes=231_000_000,
        versions={"perdure": "0.1.0", "torch": "2.5.0"},
    )


def groups(seeds: int = 3, **options: object) -> dict[str, list[Results]]:
    return {label: [run(label, seed, **options) for seed in range(seeds)] for label in LABELS}  # type: ignore[arg-type]


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced and collects what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: dict[tuple[str, str], str] = {}
        self.stack: list[str] = []
        self.text: list[str] = []
        self._cell: tuple[str, str] | None = None
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "td":
            self._cell = (found["data-method"], found.get("data-metric") or found["data-cost"])
            self.cells[self._cell] = ""

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag
        if tag == "td":
            self._cell = None

    def handle_data(self, data):
        self.text.append(data)
        if self._cell:
            self.cells[self._cell] += data

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def written(tmp_path, found, **options) -> str:
    (path,) = report.write(found, tmp_path / "r.html", **options)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("options", [{}, {"scenario": "domain"}, {"tasks": 1}, {"tasks": 12}, {"tasks": 30}])
def test_the_page_is_well_formed_and_every_name_in_it_is_unique(tmp_path, options):
    page = Page(written(tmp_path, groups(2, **options)))
    names = [found["id"] for _, found in page.tags if "id" in found]
    assert len(names) == len(set(names))
    pictures = [found for tag, found in page.tags if tag == "svg"]
    for picture in pictures:
        if picture.get("role") == "img":
            assert set(picture["aria-labelledby"].split()) <= set(names)
        else:
            assert picture["aria-hidden"] == "true"
    assert sum("heat" in (found.get("class") or "") for found in pictures) == len(LABELS)


def pictured() -> dict[str, list[Results]]:
    found = groups()
    for k, result in enumerate(found["replay"]):
        result.pictures = {"replay": {j: png(np.full((3, 2 + k), j, dtype=np.uint8)) for j in (0, 2, 4)}}
    return found


def test_pictures_stand_in_the_page_as_they_are_with_words_for_those_who_do_not_see_them(tmp_path):
    found = pictured()
    page = Page(written(tmp_path, found))
    shown = [attributes for tag, attributes in page.tags if tag == "img"]
    kept = found["replay"][0].pictures["replay"]
    assert [base64.b64decode(img["src"].partition("base64,")[2]) for img in shown] == list(kept.values())
    assert [img["alt"] for img in shown] == [
        f"Images that replay replays after task {j + 1}: {2 * j}/{2 * j + 1}" for j in (0, 2, 4)
    ]
    assert {(img["width"], img["height"]) for img in shown} == {("2", "3")}
    assert "replay, seed 0" in page.words()
    assert "What is replayed" not in Page(written(tmp_path, groups())).words()


def test_of_many_pictures_some_are_shown_the_first_and_the_last_among_them(tmp_path):
    found = groups(1, tasks=30)
    found["replay"][0].pictures = {"replay": {j: png(np.full((1, 1), j, dtype=np.uint8)) for j in range(30)}}
    alts = [attributes["alt"] for tag, attributes in Page(written(tmp_path, found)).tags if tag == "img"]
    assert len(alts) == 10
    assert "after task 1:" in alts[0]
    assert "after task 30:" in alts[-1]


@pytest.mark.parametrize("made", [groups, pictured])
def test_the_page_loads_nothing_and_runs_nothing(tmp_path, made):
    text = written(tmp_path, made(), settings={"note": "see https://example.org"})
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "use", "image"}
    pictures = [found for tag, found in page.tags if tag == "img"]
    assert all(found.pop("src").startswith("data:image/png;base64,") for found in pictures)
    attributes = {key for _, found in page.tags for key in found}
    assert not [key for key in attributes if key in ("src", "href", "xlink:href") or key.startswith("on")]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in text.replace("see https://example.org", "").replace("http-equiv", "")
    policy = next(found["content"] for tag, found in page.tags if found.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "img-src data:" in policy


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_every_number_in_the_table_is_the_metric(tmp_path, scenario, seeds):
    found = groups(seeds, scenario=scenario)
    page = Page(written(tmp_path, found))
    seen = set()
    for (label, name), shown in page.cells.items():
        summary = summarise(found[label])
        if name not in summary["mean"]:
            continue
        seen.add(name)
        mean, std = summary["mean"][name], summary["std"][name]
        if mean is None:
            assert shown == "–"
            continue
        first, *second = shown.replace("−", "-").split(" ± ")
        assert float(first) == pytest.approx(100 * mean, abs=0.0501)
        assert [float(s) for s in second] == ([] if std is None else [pytest.approx(100 * std, abs=0.0501)])
    defined = {name for name, value in found["ewc"][0].metrics().items() if value is not None}
    assert seen == defined
    assert len(page.cells) == len(LABELS) * (len(defined) + 3)


def test_costs_stand_beside_the_metrics(tmp_path):
    page = Page(written(tmp_path, groups()))
    assert page.cells["ewc", "training time"] == human_seconds(3.0)
    assert page.cells["ewc", "peak memory"] == human_bytes(231_000_000)
    assert page.cells["ewc", "state kept"] == human_bytes(14_400)
    assert page.cells["finetune", "state kept"] == "0 B"


def test_a_heat_map_shows_the_mean_matrix_and_leaves_the_rest_empty(tmp_path):
    found = {"ewc": [run("ewc", seed) for seed in range(3)]}
    text = written(tmp_path, found)
    picture = re.search(r'<svg class="heat.*?</svg>', text, re.S).group()
    mean = np.mean([r.matrix for r in found["ewc"]], axis=0)
    cells = re.findall(r'<g class="h(\d+)"><rect [^>]*/><text [^>]*>([\d.]+)</text></g>', picture)
    known = mean[~np.isnan(mean)]
    assert [shown for _, shown in cells] == [f"{100 * value:.1f}" for value in known]
    assert [int(step) for step, _ in cells] == [level(value) for value in known]
    assert picture.count('class="empty"') == np.isnan(mean).sum() == 10
    assert "untrained" not in picture
    description = re.search(r"<desc[^>]*>(.*?)</desc>", picture).group(1)
    assert f"after 0/1: {100 * mean[0, 0]:.1f}, not evaluated" in description


def test_a_line_stands_where_its_numbers_are(tmp_path):
    flat = [Results("domain", ["a", "b"], np.full((2, 2), value), np.full(2, NAN), methods=["ewc"], seed=seed)
            for seed, value in enumerate([0.4, 0.6])]  # fmt: skip
    text = written(tmp_path, {"ewc": flat})
    picture = re.search(r'<svg class="chart".*?</svg>', text, re.S).group()
    ticks = {int(t): float(y) for y, t in re.findall(r'<text x="[\d.]+" y="([\d.]+)"[^>]*end">(\d+)</text>', picture)}
    per_percent = (ticks[0] - ticks[50]) / 50
    (line,) = re.findall(r'class="line m0" d="M([\d. L]+)"', picture)
    heights = [float(point.split()[1]) for point in line.split("L")]
    assert heights == pytest.approx([ticks[50]] * 2, abs=0.11)
    (band,) = re.findall(r'class="band m0" d="M([\d. L]+)Z"', picture)
    edges = {float(point.split()[1]) for point in band.split("L")}
    std = 100 * np.std([0.4, 0.6], ddof=1)
    assert sorted(edges) == pytest.approx([ticks[50] - std * per_percent, ticks[50] + std * per_percent], abs=0.11)


def test_one_seed_has_no_band_and_no_significance(tmp_path):
    text = written(tmp_path, {"ewc": [run("ewc", 0)]})
    assert 'class="band' not in text
    assert "What the seeds support" not in text


def test_it_says_what_the_seeds_support_and_what_is_not_defined(tmp_path):
    words = Page(written(tmp_path, groups())).words()
    assert "smallest two-sided p that a paired permutation test can give is 0.25" in words
    assert "Forward transfer needs an accuracy before training; class-incremental columns do not exist then." in words


def test_the_guide_defines_every_column(tmp_path):
    page = Page(written(tmp_path, groups(scenario="domain")))
    words = page.words()
    for term in ("Final average accuracy is", "Forgetting is", "Backward transfer is", "Forward transfer is"):
        assert term in words
    assert "(every task counts once)" in words
    assert "(every example counts once)" in Page(written(tmp_path, groups())).words()


def test_joint_training_is_a_reference_and_not_the_winner(tmp_path):
    found = groups()
    for result in found["joint"]:
        result.matrix = np.where(np.isnan(result.matrix), NAN, 1.0)
    text = written(tmp_path, found)
    lead = re.search(r'<p class="lead">(.*?)</p>', text).group(1)
    best = max(LABELS[:-1], key=lambda label: summarise(found[label])["mean"]["final_average_accuracy"])
    assert lead.startswith(f"<b>{best}</b>")
    assert "joint training" in lead
    bold = re.findall(r'data-method="(\w+)" data-metric="final_average_accuracy" class="best"', text)
    assert bold == [best]


def test_what_people_wrote_is_text_and_not_markup(tmp_path):
    evil = '<script>alert("x")</script>&'
    found = {evil: [run("ewc", 0, names=[evil, "b", "c", "d", "e"])]}
    text = written(tmp_path, found, title=evil, settings={evil: {"a": [evil]}})
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert evil in page.text


def test_settings_and_origins_are_in_the_details(tmp_path):
    settings = {"train": {"epochs": 2, "optimizer": "adam"}, "model": {"hidden": [100, 100]}}
    words = Page(written(tmp_path, groups(), settings=settings)).words()
    for detail in ("train.epochs 2", "train.optimizer adam", "model.hidden [100, 100]", "seeds 0, 1, 2", "torch 2.5.0"):
        assert detail in words


def test_seeds_with_their_own_class_orders_share_task_numbers_only(tmp_path):
    found = {"ewc": [run("ewc", 0, names=list("abcde")), run("ewc", 1, names=list("edcba"))]}
    words = Page(written(tmp_path, found)).words()
    assert "tasks 1, 2, 3, 4, 5" in words
    assert "Task 1: a" not in words


def test_the_same_results_give_the_same_bytes(tmp_path):
    assert written(tmp_path / "a", groups()) == written(tmp_path / "b", groups())


def test_a_folder_gets_a_report_and_errors_leave_nothing(tmp_path):
    assert report.write(groups(1), tmp_path / "new") == [tmp_path / "new" / "report.html"]
    with pytest.raises(UsageError):
        report.write({}, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        report.write(groups(1), tmp_path / "file" / "r.html")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_numbers_and_lines_stand_out_from_what_is_behind_them(theme):
    for step in range(LEVELS + 1):
        fill, ink = fill_and_ink(step, theme)
        assert contrast(fill, ink) >= 4.5
    for style in styles([*LABELS, "a", "b", "c", "d", "e", "f"]).values():
        assert contrast(getattr(style, theme), PAPER[theme]) >= 3.0


def test_methods_look_different_from_each_other_and_the_same_in_every_report():
    labels = [*LABELS, *(f"method {k}" for k in range(15))]
    assert len(set(styles(labels).values())) == len(labels)
    assert styles(["joint", "ewc"])["joint"] == styles(LABELS)["joint"]


def test_darker_means_more_on_light_paper_and_brighter_means_more_on_dark():
    for theme in ("light", "dark"):
        ratios = [contrast(fill_and_ink(step, theme)[0], PAPER[theme]) for step in range(LEVELS + 1)]
        assert all(a < b for a, b in itertools.pairwise(ratios))


def test_labels_at_the_ends_of_lines_never_overlap():
    rng = np.random.default_rng(0)
    for count in range(1, 12):
        wanted = {str(k): float(y) for k, y in enumerate(rng.uniform(100, 160, size=count))}
        placed = _apart(wanted, 17, 12, 320)
        assert sorted(placed, key=placed.get) == sorted(wanted, key=wanted.get)
        ordered = sorted(placed.values())
        assert all(b - a >= 17 - 1e-9 for a, b in itertools.pairwise(ordered))
        assert ordered[0] >= 12
        assert ordered[-1] <= 320
