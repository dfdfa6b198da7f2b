"""One picture of many rendered views, for a person to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from equifeat.errors import ViewsError

_LABEL = 14


def contact_sheet(
    folders: str | Path | Sequence[str | Path],
    out_png: str | Path,
    views_per_object: int = 6,
    tile: int = 128,
    columns: int = 4,
) -> Path:
    """Lay out views of rendered objects with their names.

    Args:
        folders: One object's folder, a folder of objects, or a list of object folders.
        out_png: The picture to write.
        views_per_object: How many views of each object, evenly spread.
        tile: Side of one view in pixels.
        columns: Objects side by side.

    Returns:
        The picture's path.

    Raises:
        ViewsError: No rendered object is there.
    """
    objects = _objects(folders)
    strips = [_strip(folder, views_per_object, tile) for folder in objects]
    width, height = views_per_object * tile, tile + _LABEL
    rows = math.ceil(len(strips) / columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * height), (40, 40, 40))
    for i, strip in enumerate(strips):
        sheet.paste(strip, (i // rows * (width + 4), i % rows * height))
    out = Path(out_png)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return out


def _objects(folders: str | Path | Sequence[str | Path]) -> list[Path]:
    if not isinstance(folders, (str, Path)):
        found = [Path(f) for f in folders]
    elif (Path(folders) / "views.json").is_file():
        found = [Path(folders)]
    else:
        found = sorted(p.parent for p in Path(folders).glob("[!.]*/views.json"))
    if not found:
        raise ViewsError(f"{folders}: no rendered object (a folder with views.json) is there")
    return found


def _strip(folder: Path, count: int, tile: int) -> Image.Image:
    files = sorted(folder.glob("color_*.png"))
    if not files:
        raise ViewsError(f"{folder}: holds no color_*.png")
    strip = Image.new("RGB", (count * tile, tile + _LABEL))
    for i in range(min(count, len(files))):
        with Image.open(files[i * len(files) // count if len(files) > count else i]) as view:
            small = view.convert("RGB").resize((tile, tile), Image.Resampling.LANCZOS)
        strip.paste(small, (i * tile, _LABEL))
    font = ImageFont.load_default(11)
    ImageDraw.Draw(strip).text((3, 0), folder.name, (255, 255, 255), font)
    return strip
