"""Seeded textures full of distinctive detail: patterns, letters, labels, scratches and noise."""

from __future__ import annotations

import colorsys
import io
import string
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[Any]
Color = tuple[int, int, int]


def texture_atlas(
    rng: np.random.Generator, cell: int, columns: int = 3, rows: int = 2
) -> Image.Image:
    """Draw an atlas whose cells are all different but share one palette.

    Args:
        rng: Source of all choices.
        cell: Side of a cell in pixels.
        columns: Cells along u.
        rows: Cells along v.

    Returns:
        An RGB JPEG image of columns * cell by rows * cell pixels.
    """
    palette = _palette(rng)
    atlas = Image.new("RGB", (columns * cell, rows * cell))
    for i in range(columns * rows):
        atlas.paste(_cell(rng, cell, palette), (i % columns * cell, i // columns * cell))
    # JPEG in the GLB: a third of the size, and a real decoder in the path
    packed = io.BytesIO()
    atlas.save(packed, "JPEG", quality=90)
    packed.seek(0)
    return Image.open(packed)


def _palette(rng: np.random.Generator) -> list[Color]:
    """Pick a main colour, a near one, a contrasting one, a dark and a light one."""
    hue = float(rng.uniform())
    saturation = float(rng.choice([0.15, 0.5, 0.8]))
    hues = [hue, hue + rng.uniform(0.03, 0.1), hue + rng.uniform(0.35, 0.65), hue, hue + 0.1]
    values = [rng.uniform(0.5, 0.9), rng.uniform(0.35, 0.75), rng.uniform(0.6, 1.0), 0.13, 0.95]
    saturations = [saturation, saturation, 0.8, 0.4, 0.1]
    out = []
    for h, s, v in zip(hues, saturations, values, strict=True):
        r, g, b = colorsys.hsv_to_rgb(float(h) % 1.0, float(s), float(v))
        out.append((int(r * 255), int(g * 255), int(b * 255)))
    return out


def _cell(rng: np.random.Generator, size: int, palette: list[Color]) -> Image.Image:
    """Draw one cell: smooth two-colour ground, a pattern, marks, grain."""
    a, b = (np.array(palette[i], np.float64) for i in rng.permutation(3)[:2])
    ground = a + (b - a) * _smooth_noise(rng, size, int(rng.integers(3, 7)))[..., None]
    pattern = _PATTERNS[int(rng.integers(len(_PATTERNS)))](rng, size)
    ink = np.array(palette[int(rng.integers(2, 5))], np.float64)
    strength = float(rng.uniform(0.45, 0.9))
    ground += (ink - ground) * pattern[..., None] * strength
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    _marks(rng, image, palette)
    grain = rng.normal(0.0, 5.0, (size, size, 1)) + rng.normal(0.0, 14.0) * (
        _smooth_noise(rng, size, 24)[..., None] - 0.5
    )
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def _smooth_noise(rng: np.random.Generator, size: int, knots: int) -> Array:
    """Return (size, size) smooth noise in [0, 1]."""
    coarse = Image.fromarray((rng.uniform(size=(knots, knots)) * 255).astype(np.uint8))
    out: Array = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255.0
    return out


def _grid(size: int) -> tuple[Array, Array]:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / np.float32(size)
    return x, y


def _stripes(rng: np.random.Generator, size: int) -> Array:
    x, y = _grid(size)
    turn = rng.uniform(0, np.pi)
    phase = (x * np.cos(turn) + y * np.sin(turn)) * rng.uniform(3, 9)
    # a chirp: no two stripes are equally wide
    phase += rng.uniform(0.2, 0.8) * np.sin(2 * np.pi * (x + y * rng.uniform(-1, 1)))
    out: Array = (np.mod(phase, 1.0) < rng.uniform(0.25, 0.6)) * 1.0
    return out


def _dots(rng: np.random.Generator, size: int) -> Array:
    x, y = _grid(size)
    out = np.zeros((size, size))
    spots = np.stack([*rng.uniform(size=(2, 22)), rng.uniform(0.02, 0.09, 22)], axis=1)
    for cx, cy, r in spots:
        out[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = 1.0
    return out


def _cells(rng: np.random.Generator, size: int) -> Array:
    x, y = _grid(size)
    sites = rng.uniform(size=(26, 2))
    squared = (x[..., None] - sites[:, 0]) ** 2 + (y[..., None] - sites[:, 1]) ** 2
    near = np.sqrt(np.partition(squared, 1, axis=-1)[..., :2])
    out: Array = (near[..., 1] - near[..., 0] < rng.uniform(0.015, 0.04)) * 1.0
    return out


def _patches(rng: np.random.Generator, size: int) -> Array:
    x, y = _grid(size)
    sites, tone = rng.uniform(size=(18, 2)), rng.uniform(size=18)
    squared = (x[..., None] - sites[:, 0]) ** 2 + (y[..., None] - sites[:, 1]) ** 2
    out: Array = tone[squared.argmin(axis=-1)]
    return out


def _rings(rng: np.random.Generator, size: int) -> Array:
    x, y = _grid(size)
    radius = np.hypot(x - rng.uniform(0.2, 0.8), y - rng.uniform(0.2, 0.8))
    return (np.mod(radius**0.8 * rng.uniform(5, 10), 1.0) < 0.4).astype(np.float64)


def _bricks(rng: np.random.Generator, size: int) -> Array:
    x, y = _grid(size)
    rows, columns = int(rng.integers(4, 8)), int(rng.integers(2, 5))
    row = np.floor(y * rows).astype(int)
    column = np.floor(x * columns + 0.5 * (row % 2)).astype(int)
    tone = rng.uniform(size=(rows + 1, columns + 2))
    joint = (np.mod(y * rows, 1) < 0.12) | (np.mod(x * columns + 0.5 * (row % 2), 1) < 0.07)
    out: Array = np.where(joint, 1.0, 0.6 * tone[row, column])
    return out


def _blots(rng: np.random.Generator, size: int) -> Array:
    out: Array = (_smooth_noise(rng, size, int(rng.integers(6, 14))) > 0.55) * 1.0
    return out


_PATTERNS: list[Callable[[np.random.Generator, int], Array]] = [
    _stripes,
    _dots,
    _cells,
    _patches,
    _rings,
    _bricks,
    _blots,
]


def _marks(rng: np.random.Generator, image: Image.Image, palette: list[Color]) -> None:
    """Add what a toy or a tool carries: letters, a label with a bar code, screws, scratches."""
    size = image.width
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 4))):
        text = "".join(
            rng.choice(list(string.ascii_uppercase + string.digits), int(rng.integers(1, 4)))
        )
        font = ImageFont.load_default(int(size * rng.uniform(0.18, 0.5)))
        stamp = Image.new("L", (size, size))
        ImageDraw.Draw(stamp).text((size / 2, size / 2), text, 255, font, anchor="mm")
        stamp = stamp.rotate(float(rng.uniform(0, 360)))
        dx, dy = (int(s) for s in rng.integers(-size // 3, size // 3, 2))
        image.paste(palette[int(rng.integers(2, 5))], (dx, dy), stamp)
    if rng.uniform() < 0.6:
        x, y = rng.uniform(0.05, 0.55, 2) * size
        w, h = rng.uniform(0.25, 0.4) * size, rng.uniform(0.12, 0.25) * size
        draw.rectangle((x, y, x + w, y + h), palette[4], palette[3], 2)
        for bar in np.sort(rng.uniform(0.08, 0.92, 9)):
            draw.line(
                (x + w * bar, y + 4, x + w * bar, y + h - 5), palette[3], int(rng.integers(1, 4))
            )
    for x, y in rng.uniform(0.04, 0.96, (int(rng.integers(1, 6)), 2)) * size:
        r = 0.025 * size
        draw.ellipse((x - r, y - r, x + r, y + r), palette[1], palette[3], 2)
        turn = rng.uniform(0, np.pi)
        dx, dy = r * np.cos(turn), r * np.sin(turn)
        draw.line((x - dx, y - dy, x + dx, y + dy), palette[3], 2)
    for x, y in rng.uniform(size=(int(rng.integers(2, 7)), 2)) * size:
        dx, dy = rng.normal(0, 0.15 * size, 2)
        draw.line((x, y, x + dx, y + dy), palette[int(rng.integers(3, 5))], 1)
