"""One self-contained HTML page: summary, table, pictures, how it was made."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from equifeat.files import atomic_file

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem;
  color: #1d2530; background: #fff; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #d8dee6; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; white-space: normal; }
.wide { overflow-x: auto; }
figure { margin: 1rem 0; } figcaption { color: #4a5666; margin-bottom: .4rem; }
img { max-width: 100%; height: auto; border: 1px solid #d8dee6; }
code, pre { background: #f3f5f8; padding: .1rem .3rem; border-radius: 3px; overflow-x: auto; }
.lead { font-size: 1.08rem; }
"""


class Picture(NamedTuple):
    """A picture of the report.

    Attributes:
        title: Heading.
        caption: What is to be seen, in one or two sentences.
        image: The picture.
    """

    title: str
    caption: str
    image: Image.Image


class Table(NamedTuple):
    """A table of the report.

    Attributes:
        title: Heading.
        cells: Rows of text, the header first.
        note: What the numbers mean, below the table.
    """

    title: str
    cells: Sequence[Sequence[str]]
    note: str


def _image(picture: Picture) -> str:
    buffer = io.BytesIO()
    picture.image.convert("RGB").save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<h2>{html.escape(picture.title)}</h2><figure>"
        f"<figcaption>{html.escape(picture.caption)}</figcaption>"
        f'<img alt="{html.escape(picture.title, quote=True)}" src="data:image/png;base64,{data}">'
        "</figure>"
    )


def _table(table: Table) -> str:
    header, *rows = table.cells
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<h2>{html.escape(table.title)}</h2><div class="wide"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div><p>{html.escape(table.note)}</p>"
    )


def write_report(
    path: str | Path,
    title: str,
    paragraphs: Sequence[str],
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    details: Mapping[str, str],
) -> None:
    """Write a page that needs no other file and no network.

    Args:
        path: File to write.
        title: Heading of the page.
        paragraphs: What was found, in plain sentences.
        tables: Tables, in order.
        pictures: Pictures, in order.
        details: How it was made: name and value.
    """
    lead = "".join(f'<p class="lead">{html.escape(text)}</p>' for text in paragraphs)
    how = "".join(
        f"<tr><td>{html.escape(key)}</td><td class='text'>{html.escape(value)}</td></tr>"
        for key, value in details.items()
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{lead}"
        + "".join(map(_table, tables))
        + "".join(map(_image, pictures))
        + f'<h2>How this was made</h2><div class="wide"><table>{how}</table></div></body></html>\n'
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
