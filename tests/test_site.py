"""The documentation site builds without a warning, and no link of any page is dead."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.helpers import ROOT

OUTSIDE = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
MARKDOWN_LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")


class Links(HTMLParser):
    """Every link, picture and anchor of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [value for key in ("href", "src") if (value := found.get(key))]
        self.anchors |= {value for key in ("id", "name") if (value := found.get(key))}


def links_of(page: Path) -> Links:
    parser = Links()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def dead_links(site: Path) -> list[str]:
    """Links within a site that lead nowhere."""
    pages = {page: links_of(page) for page in site.rglob("*.html") if page.name != "404.html"}
    dead = []
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            where = f"{page.relative_to(site)}: {link}"
            if not target.is_file():
                dead.append(where)
            elif parts.fragment and target in pages:
                anchors = pages[target].anchors
                dead += [where] if unquote(parts.fragment) not in anchors else []
    return dead


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_no_link_of_the_site_is_dead(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) > 50
    assert not dead_links(site)


def test_every_page_is_in_the_site_and_the_api_is_filled(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        inner = page.relative_to(ROOT / "docs").with_suffix("")
        folder = inner.parent if inner.name == "index" else inner
        assert (site / folder / "index.html").is_file(), page
    model = links_of(site / "api" / "model" / "index.html").anchors
    assert "equifeat.model.extractor.FeatureExtractor.dense" in model
    assert "equifeat.checkpoint.load_model" in model


def test_site_asks_no_other_server(site: Path) -> None:
    """It is read offline and behind firewalls: no fonts, no scripts, no counters."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=[\"']?(https?:[^\"' >]+)", text)
        loaded += re.findall(
            r"<link[^>]+rel=[\"']?stylesheet[^>]+href=[\"']?(https?:[^\"' >]+)", text
        )
        assert not loaded, (page, loaded)


@pytest.mark.parametrize("page", OUTSIDE, ids=lambda page: str(page.name))
def test_links_of_pages_beside_the_site(page: Path) -> None:
    for link in MARKDOWN_LINK.findall(page.read_text(encoding="utf-8")):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
        else:
            assert (page.parent / parts.path).exists(), link


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here">x</a> <a href="b.html#gone">y</a> <a href="c.html">z</a>'
    )
    (tmp_path / "b.html").write_text('<h2 id="here">t</h2> <a href="https://x.org">out</a>')
    assert dead_links(tmp_path) == ["a.html: b.html#gone", "a.html: c.html"]
