"""results.md and report.html of made-up results: whole, escaped, offline, readable."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from equifeat.eval.result_tables import main_table, markdown_text, paired_table
from equifeat.eval.results import Results
from equifeat.eval_report import console_text, report_html, results_markdown, write_evaluation
from equifeat.eval_report.charts import nice_top, short
from equifeat.report import Picture, Section, page_html
from tests.eval.made_up import ATTACK, NAMES, made_up_results, made_up_task

VOID = {"meta", "img", "br", "hr", "link", "input", "path", "use", "rect", "circle"}


class Page(HTMLParser):
    """Checks balance, and keeps what tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open, f"</{tag}> without a start"
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def results() -> Results:
    return made_up_results()


@pytest.fixture(scope="module")
def text(results: Results) -> str:
    return report_html(results, published=True)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_page_needs_nothing_outside(page: Page, text: str) -> None:
    for _, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:image/", "#")), value
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert not page.all("script")
    assert not page.all("link")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', text):
        assert target in ids


def test_names_cannot_be_markup(page: Page, text: str) -> None:
    assert ATTACK not in text
    words = "".join(page.words)
    assert f"ours {ATTACK}" in words
    assert f"dog {ATTACK}" in words
    assert "$\\frac{1}{0}$ & more" in words
    for _, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)


def test_every_picture_and_chart_says_what_it_shows(page: Page, results: Results) -> None:
    images = page.all("img")
    drawn = sum(len(task.pictures) for task in results.tasks)
    assert len(images) == drawn > 0
    assert all(image.get("alt") for image in images)
    charts = page.all("svg")
    # radar, two scatter plots, lines twice, bars
    assert len(charts) == 6
    assert all(c.get("role") == "img" and c.get("aria-label") for c in charts)
    words = "".join(page.words)
    assert words.count("Pearson") == 2
    assert "higher is better" in words
    assert "one measure is better when lower" not in words.lower()
    best = [w for w in page.words if w.startswith("Best 1 of raw")]
    worst = [w for w in page.words if w.startswith("Worst 1 of raw")]
    assert len(best) == len(worst) == 2


def test_pictures_are_embedded_whole() -> None:
    noise = Image.effect_noise((900, 900), 80).convert("RGB")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), (255, 0, 0)).save(buffer, "PNG")
    section = Section("s", "s", [Picture("a", "", noise), Picture("b", "", buffer.getvalue())])
    sources = [i["src"] or "" for i in Page(page_html("t", [], [section], "")).all("img")]
    assert [s.split(";")[0] for s in sources] == ["data:image/jpeg", "data:image/png"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))).size for s in sources]
    assert sizes == [(900, 900), (8, 4)]


def test_published_numbers_stand_apart(results: Results) -> None:
    for make in (report_html, results_markdown, console_text):
        assert "12.50" not in make(results)
        shown = make(results, published=True)
        assert "12.50" in shown
        assert "(published)" in shown
        assert "arXiv 0000.00000" in shown
    measured = main_table(results.tasks[0]).cells
    assert [row[0] for row in measured] == ["model", *NAMES]


def test_never_a_bare_mean(results: Results) -> None:
    for task in results.tasks:
        for row in main_table(task).cells[1:]:
            assert all(re.fullmatch(r"-?[\d.]+ \[.+\]( ± [\d.]+)?", cell) for cell in row[1:])
        paired = paired_table(task)
        assert paired is not None
        for row in paired.cells[1:]:
            assert all("[" in cell and "p = " in cell for cell in row[1:])
    single = Results((made_up_task(models=2, units=1),), {})
    said = results_markdown(single)
    assert "(1 object)" in said
    assert "There is one object only, so there are no intervals and no tests." in said
    assert "Fewer than two objects: there is no test." in said
    few = paired_table(made_up_task(models=2, units=4))
    assert few is not None
    assert "4 objects are too few for 2 tests: uncorrected p cannot fall below 0.12." in few.note


def test_markdown_tables_keep_their_columns(results: Results) -> None:
    said = results_markdown(results, published=True)
    assert ATTACK not in said
    for block in re.findall(r"(?:^\|.*\n)+", said, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1
    for word in ("PCDP@.05 [%] ↑", "APE [points] ↓", "By category", "How this was made"):
        assert markdown_text(word) in said
    assert markdown_text("a | *b*\n`c` <i>") == "a \\| \\*b\\* \\`c\\` &lt;i&gt;"


@pytest.mark.parametrize("models", [1, 2])
def test_few_models_and_tasks_say_what_is_missing(models: int) -> None:
    small = Results((made_up_task(models=models, units=2),), {})
    words = "".join(Page(report_html(small)).words)
    assert "A radar plot needs at least three tasks with the same models; here are 1." in words
    assert "needs results of an equivariance protocol and of another task" in words
    if models == 2:
        two = made_up_results(models=2, units=3)
        assert "needs at least three models; here are 2." in "".join(Page(report_html(two)).words)


def test_files(results: Results, tmp_path: Path) -> None:
    write_evaluation(results, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "report.html",
        "results.json",
        "results.md",
    ]
    again = Results.load(tmp_path / "out" / "results.json")
    assert results_markdown(again) == (tmp_path / "out" / "results.md").read_text()
    Page(report_html(Results((), {})))


def test_scales_and_names() -> None:
    assert [nice_top([v]) for v in (0.0, 0.03, 1.0, 17.0, 41.0, 81.0)] == [1, 0.04, 1, 20, 50, 100]
    assert short("a" * 40, 10) == "aaaaa…aaaa"
    assert short("abc") == "abc"
