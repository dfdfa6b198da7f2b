"""One self-contained HTML page, light and dark: text, tables, charts and pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from equifeat.files import atomic_file

# Colours c0 to c7: Okabe and Ito's, told apart by most colour-blind readers; the dark theme has
# lighter ones of the same hues.
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2530; --quiet: #4a5666; --line: #d3dae3;
  --soft: #f3f5f8; --link: #0b5cad; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #aa4499;
  --c4: #b8860b; --c5: #2e9bd6; --c6: #555; --c7: #882255; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181e; --ink: #e4e9ef; --quiet: #a5b0bd;
  --line: #38424e; --soft: #1f262e; --link: #7cb8f2; --c0: #4fa8e0; --c1: #ff8a3d; --c2: #2fc79b;
  --c3: #e08fd0; --c4: #e3b341; --c5: #8fd0f5; --c6: #b5bec8; --c7: #e27a9c; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.6rem; }
h1, h2, h3, p, figcaption, .note { overflow-wrap: anywhere; }
h2.major { border-bottom: 2px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
a { color: var(--link); }
nav ul { padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); }
th { vertical-align: bottom; } .long th:first-child,
  .long td:first-child { white-space: normal; min-width: 14rem;
  max-width: 20rem; overflow-wrap: anywhere; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.note { color: var(--quiet); font-size: .92rem; max-width: 75ch; }
figure { margin: 1rem 0; } figcaption { color: var(--quiet); margin-bottom: .4rem; }
.charts, .pictures { display: grid; gap: 1rem 2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); }
.charts figure { max-width: 540px; margin: 0; } .charts h3 { margin-top: .6rem; }
.pictures h3 { margin-top: .6rem; font-size: .98rem; } .pictures figure { margin: 0; }
svg.chart { width: 100%; height: auto; color: var(--ink); }
svg.chart text { font-family: system-ui, sans-serif; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); background: #fff; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--link); }
code, pre { background: var(--soft); padding: .1rem .3rem; border-radius: 3px; overflow-x: auto; }
.lead { font-size: 1.08rem; }
footer { margin-top: 3rem; color: var(--quiet); font-size: .9rem; }
@media (max-width: 600px) { body { margin: 1rem auto; padding: 0 .7rem; }
  th, td { padding: .3rem .5rem; font-size: .9rem; }
  .long th:first-child, .long td:first-child { min-width: 8rem; max-width: 9rem; } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --quiet: #333;
  --line: #bbb; --link: #000; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #aa4499;
  --c4: #b8860b; --c5: #2e9bd6; --c6: #555; --c7: #882255; }
  body { max-width: none; margin: 0; font-size: 10.5pt; } nav { display: none; }
  .wide { overflow: visible; } th, td { white-space: normal; padding: .2rem .4rem; }
  th:first-child, td:first-child { position: static; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""
# Larger pictures are embedded as JPEG.
_PNG_BYTES, _JPEG_QUALITY = 60_000, 90


class Picture(NamedTuple):
    """A picture of the report.

    Attributes:
        title: Heading.
        caption: What is to be seen, in one or two sentences.
        image: The picture, or its PNG bytes.
    """

    title: str
    caption: str
    image: Image.Image | bytes


class Table(NamedTuple):
    """A table of the report.

    Attributes:
        title: Heading.
        cells: Rows of text, the header first.
        note: What the numbers mean, below the table.
        folded: Whether it is shown only when asked for.
    """

    title: str
    cells: Sequence[Sequence[str]]
    note: str
    folded: bool = False


class Chart(NamedTuple):
    """A chart of the report.

    Attributes:
        title: Heading.
        caption: What is to be seen.
        svg: An SVG element with colours by the page's variables, see equifeat.eval_report.charts;
            the only part of a page that is not escaped.
    """

    title: str
    caption: str
    svg: str


class Note(NamedTuple):
    """A plain paragraph.

    Attributes:
        text: What it says.
    """

    text: str


Content = Picture | Table | Chart | Note


class Section(NamedTuple):
    """A part of the page with an entry in its list of contents.

    Attributes:
        title: Heading.
        anchor: Name for links, letters, digits and dashes.
        content: In order; charts, and pictures, that follow each other stand side by side.
    """

    title: str
    anchor: str
    content: Sequence[Content]


def page_html(title: str, lead: Sequence[str], sections: Sequence[Section], foot: str) -> str:
    """Return a page that needs no other file and no network.

    Args:
        title: Heading of the page.
        lead: Paragraphs below it.
        sections: Parts of the page.
        foot: Last line.

    Returns:
        HTML.
    """
    links = "".join(
        f'<li><a href="#{html.escape(s.anchor, quote=True)}">{html.escape(s.title)}</a></li>'
        for s in sections
    )
    body = "".join(
        f'<section id="{html.escape(s.anchor, quote=True)}"><h2 class="major">'
        f"{html.escape(s.title)}</h2>{_contents(s.content)}</section>"
        for s in sections
    )
    return _page(
        title,
        _lead(lead) + f'<nav aria-label="Contents"><ul>{links}</ul></nav><main>{body}</main>'
        f"<footer>{html.escape(foot)}</footer>",
    )


def write_report(
    path: str | Path,
    title: str,
    paragraphs: Sequence[str],
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    details: Mapping[str, str],
) -> None:
    """Write a short page that needs no other file and no network.

    Args:
        path: File to write.
        title: Heading of the page.
        paragraphs: What was found, in plain sentences.
        tables: Tables, in order.
        pictures: Pictures, in order.
        details: How it was made: name and value.
    """
    how = [["what", "value"], *([key, value] for key, value in details.items())]
    page = _page(
        title,
        _lead(paragraphs)
        + "".join(_table(table, 2) for table in tables)
        + "".join(_picture(picture, 2) for picture in pictures)
        + _table(Table("How this was made", how, ""), 2),
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # nothing is fetched, whatever a name in a table tries
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def _lead(paragraphs: Sequence[str]) -> str:
    return "".join(f'<p class="lead">{html.escape(text)}</p>' for text in paragraphs)


def _contents(content: Sequence[Content]) -> str:
    out, held = "", ""
    for part in (*content, None):
        kind = {Chart: "charts", Picture: "pictures"}.get(type(part), "")
        if held and kind != held:
            out += "</div>"
        if kind and kind != held:
            out += f'<div class="{kind}">'
        held = kind
        if isinstance(part, Picture):
            out += _picture(part, 3)
        elif isinstance(part, Chart):
            out += _chart(part)
        elif isinstance(part, Table):
            out += _table(part, 3)
        elif part is not None:
            out += f'<p class="note">{html.escape(part.text)}</p>'
    return out


def _chart(chart: Chart) -> str:
    return (
        f"<figure><h3>{html.escape(chart.title)}</h3>{chart.svg}"
        f"<figcaption>{html.escape(chart.caption)}</figcaption></figure>"
    )


def _picture(picture: Picture, level: int) -> str:
    # a short page holds few pictures, which stay exact
    kind, data = _embedded(picture.image, _PNG_BYTES if level > 2 else None)
    return (
        f"<figure><h{level}>{html.escape(picture.title)}</h{level}>"
        f"<figcaption>{html.escape(picture.caption)}</figcaption>"
        f'<img alt="{html.escape(picture.title, quote=True)}" loading="lazy" '
        f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}"></figure>'
    )


def _embedded(image: Image.Image | bytes, limit: int | None) -> tuple[str, bytes]:
    """Kind and bytes; JPEG where a PNG would be larger than the limit."""
    if isinstance(image, bytes):
        if limit is None or len(image) <= limit:
            return "png", image
        image = Image.open(io.BytesIO(image))
    rgb, png = image.convert("RGB"), io.BytesIO()
    rgb.save(png, "PNG", optimize=True)
    if limit is None or png.tell() <= limit:
        return "png", png.getvalue()
    jpeg = io.BytesIO()
    rgb.save(jpeg, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    small = jpeg.tell() < png.tell()
    return ("jpeg", jpeg.getvalue()) if small else ("png", png.getvalue())


def _table(table: Table, level: int) -> str:
    header, *rows = table.cells
    text = len(header) == 2 and header[1] == "value"
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    mark = ' class="text"' if text else ""
    body = "".join(
        "<tr>"
        + "".join(f"<td{mark if k else ''}>{html.escape(cell)}</td>" for k, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    title = html.escape(table.title)
    whole = (
        f'<div class="wide"><table class="long"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        + (f'<p class="note">{html.escape(table.note)}</p>' if table.note else "")
    )
    if table.folded:
        return f"<details><summary>{title}, as a table</summary>{whole}</details>"
    return (f"<h{level}>{title}</h{level}>" if title else "") + whole
