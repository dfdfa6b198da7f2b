"""Pictures of a check, for a person to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from equifeat.data.object_views import ObjectViews
from equifeat.files import atomic_file
from equifeat.geometry.camera import relative, transform
from equifeat.geometry.pixels import inside, pixel_centers, pixel_index, resize

_GOOD, _BAD, _LINE = (70, 160, 80), (215, 70, 50), 14
_MOST_VIEWS = 12


def sheet(
    rows: Sequence[tuple[ObjectViews, dict[int, list[str]], str]], out_png: Path, tile: int = 112
) -> Path:
    """Draw a contact sheet: one row an object, flagged views framed red with their flags.

    Args:
        rows: Objects, their flags by view, and what to write beside the name.
        out_png: The picture to write.
        tile: Side of one view in pixels.

    Returns:
        The picture's path.
    """
    font = ImageFont.load_default(11)
    columns = max(min(len(views), _MOST_VIEWS) for views, _, _ in rows)
    height = tile + 3 * _LINE
    canvas = Image.new("RGB", (max(columns * tile, 480), len(rows) * height), (32, 32, 32))
    draw = ImageDraw.Draw(canvas)
    for r, (views, flags, note) in enumerate(rows):
        top = r * height
        bad = bool(flags) or note != "ok"
        draw.text((4, top), f"{views.name}: {note}", _BAD if bad else (255, 255, 255), font)
        for c, i in enumerate(_shown(len(views), flags)):
            view = views.view(i)
            small = _small(view.image, tile - 4)
            left, upper = c * tile, top + _LINE
            canvas.paste(small, (left + 2, upper + 2))
            box = (left, upper, left + tile - 1, upper + tile - 1)
            draw.rectangle(box, outline=_BAD if i in flags else _GOOD, width=2)
            draw.text((left + 5, upper + 3), str(i), (255, 255, 255), font)
            for line, flag in enumerate(flags.get(i, [])[:2]):
                draw.text((left + 2, upper + tile + line * _LINE - 1), flag[:20], _BAD, font)
    with atomic_file(out_png) as temporary:
        canvas.save(temporary, format="PNG")
    return out_png


def reprojection(views: ObjectViews, pair: tuple[int, int], out_png: Path, title: str) -> Path:
    """Draw view j, view i carried into view j by its depth, and both blended.

    Args:
        views: The object.
        pair: Views i and j.
        out_png: The picture to write.
        title: What to write above.

    Returns:
        The picture's path.
    """
    source, target = views.view(pair[0]), views.view(pair[1])
    size_hw = target.camera.size_hw
    there = source.mask & (source.depth > 0)
    xy = pixel_centers(source.camera.size_hw)[there]
    points = transform(
        relative(source.cam_from_world, target.cam_from_world),
        source.camera.unproject(xy, source.depth[there]),
    )
    at = target.camera.project(points)
    seen = inside(at, size_hw) & at.isfinite().all(-1)
    # Far points first, so that near ones cover them.
    order = points[seen, 2].argsort(descending=True)
    column, row = pixel_index(at[seen])[order].unbind(-1)
    warped = torch.zeros(3, *size_hw)
    warped[:, row, column] = source.image[:, there][:, seen][:, order]
    landed = torch.zeros(size_hw, dtype=torch.bool)
    landed[row, column] = True
    blend = torch.where(landed, 0.5 * warped + 0.5 * target.image, 0.5 * target.image)
    side = 288
    parts = [source.image, target.image, warped, blend]
    names = [
        f"view {pair[0]}",
        f"view {pair[1]}",
        f"{pair[0]} carried into {pair[1]}" + ("" if landed.any() else ": nothing lands in it"),
        "both",
    ]
    canvas = Image.new("RGB", (4 * side, side + 2 * _LINE), (32, 32, 32))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(11)
    draw.text((4, 0), title, (255, 255, 255), font)
    for k, (part, name) in enumerate(zip(parts, names, strict=True)):
        draw.text((k * side + 4, _LINE), name, (200, 200, 200), font)
        canvas.paste(_small(part, side - 4), (k * side + 2, 2 * _LINE))
    with atomic_file(out_png) as temporary:
        canvas.save(temporary, format="PNG")
    return out_png


def _shown(count: int, flags: dict[int, list[str]]) -> list[int]:
    """Flagged views first come, the others evenly spread."""
    if count <= _MOST_VIEWS:
        return list(range(count))
    chosen = sorted(flags)[: _MOST_VIEWS // 2]
    spread = [math.floor(k * count / _MOST_VIEWS) for k in range(_MOST_VIEWS)]
    for i in spread:
        if len(chosen) < _MOST_VIEWS and i not in chosen:
            chosen.append(i)
    return sorted(chosen)


def _small(image: torch.Tensor, side: int) -> Image.Image:
    h, w = image.shape[-2:]
    fit = side / max(h, w)
    size = (max(round(h * fit), 1), max(round(w * fit), 1))
    shown = resize(image[None], size)[0].clamp(0, 1)
    pixels = (shown.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    out = Image.new("RGB", (side, side))
    out.paste(Image.fromarray(pixels), ((side - size[1]) // 2, (side - size[0]) // 2))
    return out
