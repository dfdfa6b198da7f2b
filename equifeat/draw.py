"""What pictures are laid out with: sheets of titled cells and colour bars, by NumPy and PIL."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, uint8

Pixels = NDArray[np.uint8]
PAPER, INK, QUIET = (255, 255, 255), (29, 37, 48), (95, 107, 122)
GAP = 6
_LINE = 20


def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Return the font that matplotlib brings along, so that pictures look alike everywhere.

    Args:
        size: Height in pixels.

    Returns:
        DejaVu Sans.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / "DejaVuSans.ttf"), size)


def to_bytes(values: Tensor) -> Pixels:
    """Turn colours in [0, 1] into bytes.

    Args:
        values: Any shape; clipped.

    Returns:
        uint8 array of the same shape.
    """
    return (values.clamp(0.0, 1.0) * 255.0).round().to(uint8).numpy()


def sheet(
    title: str,
    column_titles: Sequence[str],
    row_titles: Sequence[str],
    rows: Sequence[Sequence[Pixels]],
    notes: Sequence[Sequence[str]],
    footer: str,
    bottom: int = 0,
) -> Image.Image:
    """Lay out a titled grid of cells.

    Args:
        title: Above everything.
        column_titles: Above the columns.
        row_titles: Left of the rows; all empty for no margin.
        rows: (h, w, 3) cells, equally many in every row.
        notes: Text below each cell, rows of it like the cells.
        footer: Text below the grid, wrapped.
        bottom: Free space below, in pixels.

    Returns:
        The page.
    """
    font, small = font_of(14), font_of(12)
    wrapped = [textwrap.wrap(name, 16) for name in row_titles]
    margin = max((font.getlength(t) for name in wrapped for t in name), default=0.0)
    left = int(margin) + 2 * GAP if margin else GAP
    widths = [max(row[k].shape[1] for row in rows) for k in range(len(rows[0]))]
    noted = [_LINE if any(note) else 0 for note in notes]
    heights = [max(c.shape[0] for c in row) + n for row, n in zip(rows, noted, strict=True)]
    width = left + sum(widths) + GAP * len(widths)
    lines = textwrap.wrap(footer, max(20, int((width - 2 * GAP) / small.getlength("n"))))
    top = 32 + _LINE
    height = top + sum(heights) + GAP * (len(rows) - 1) + _LINE * len(lines)
    page = Image.new("RGB", (width, height + (bottom or GAP)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 7), title, fill=INK, font=font_of(17))
    y = top
    for i, row in enumerate(rows):
        for n, text in enumerate(wrapped[i]):
            draw.text((GAP, y + 4 + n * _LINE), text, fill=INK, font=font)
        x = left
        for k, cell in enumerate(row):
            if not i:
                draw.text((x, 32), column_titles[k], fill=QUIET, font=font)
            page.paste(Image.fromarray(cell), (x, y))
            draw.text((x, y + cell.shape[0] + 2), notes[i][k], fill=INK, font=small)
            x += widths[k] + GAP
        y += heights[i] + GAP
    for n, text in enumerate(lines):
        draw.text((GAP, y + n * _LINE - 2), text, fill=QUIET, font=small)
    return page


def color_bar(page: Image.Image, lut: Pixels, value_range: tuple[float, float], label: str) -> None:
    """Draw a colour bar into the lower right corner, which needs 56 free pixels.

    Args:
        page: Drawn into.
        lut: (256, 3) colours.
        value_range: Values at both ends.
        label: What the values are.
    """
    draw, font = ImageDraw.Draw(page), font_of(12)
    bar = Image.fromarray(np.broadcast_to(lut[None], (12, 256, 3)).copy())
    left, top = page.width - 256 - 4 * GAP, page.height - 44
    page.paste(bar, (left, top))
    draw.text((left, top + 15), f"{value_range[0]:g}", fill=INK, font=font)
    end = f"≥ {value_range[1]:g}"
    draw.text((left + 256 - font.getlength(end), top + 15), end, fill=INK, font=font)
    middle = left + 128 - font.getlength(label) / 2
    draw.text((middle, top + 15), label, fill=INK, font=font)
