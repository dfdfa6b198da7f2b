"""A picture of matches: two images side by side with lines between matched points."""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from equifeat.draw import GAP, QUIET, Pixels, color_bar, font_of, sheet, to_bytes
from equifeat.geometry.pixels import resize


def match_picture(
    image0: Float[Tensor, "3 h0 w0"],
    image1: Float[Tensor, "3 h1 w1"],
    xy0: Float[Tensor, "n 2"],
    xy1: Float[Tensor, "n 2"],
    values: Float[Tensor, "n"] | None = None,
    *,
    value_range: tuple[float, float] = (0.0, 0.2),
    label: str = "error / box",
    colormap: str = "RdYlGn_r",
    titles: tuple[str, str] = ("view 0", "view 1"),
    title: str = "Matches",
    height: int = 420,
    max_lines: int = 150,
) -> Image.Image:
    """Draw two images side by side with lines between matched points.

    Args:
        image0: RGB in [0, 1].
        image1: RGB in [0, 1].
        xy0: Pixels of image 0.
        xy1: Their matches, pixels of image 1.
        values: What the lines are coloured by; all alike when None.
        value_range: Values at the two ends of the colour bar.
        label: What the values are.
        colormap: Name of a matplotlib colour map; the default goes from green (low) to red.
        titles: Above the images.
        title: Heading.
        height: Height of both images in the picture, in pixels.
        max_lines: Evenly chosen lines are drawn when there are more.

    Returns:
        The picture, with a colour bar below when there are values.
    """
    photos = [_at_height(image, height) for image in (image0, image1)]
    bottom = 34 if values is None or not len(xy0) else 56
    page = sheet(title, titles, [""], [photos], [["", ""]], "", bottom=bottom)
    top = page.height - height - bottom
    ends = []
    for image, xy, left in (
        (image0, xy0, GAP),
        (image1, xy1, 2 * GAP + photos[0].shape[1]),
    ):
        scale = height / image.shape[-2]
        ends.append(xy.detach().cpu().double().numpy() * scale + np.array([left, 0.0]))
    low, high = value_range
    every = np.zeros(len(xy0)) if values is None else values.detach().cpu().double().numpy()
    scaled = np.clip((every - low) / max(high - low, 1e-12), 0.0, 1.0)
    lut = to_bytes(torch.from_numpy(matplotlib.colormaps[colormap](np.linspace(0, 1, 256))[:, :3]))
    chosen = np.unique(np.linspace(0, max(len(xy0) - 1, 0), min(max_lines, len(xy0))).astype(int))
    colors = lut[(255 * scaled[chosen]).astype(int)]
    box = (0, top, page.width, top + height)
    page.paste(_with_lines(page.crop(box), ends[0][chosen], ends[1][chosen], colors), box)
    draw = ImageDraw.Draw(page)
    text = f"{len(chosen)} of {len(xy0)} matches drawn" if len(xy0) else "no matches"
    draw.text((GAP, page.height - 26), text, fill=QUIET, font=font_of(13))
    if values is not None and len(xy0):
        color_bar(page, lut, value_range, label)
    return page


def _at_height(image: Tensor, height: int) -> Pixels:
    h, w = int(image.shape[-2]), int(image.shape[-1])
    size_hw = (height, max(1, round(w * height / h)))
    return to_bytes(resize(image.detach().float().cpu()[None], size_hw)[0].permute(1, 2, 0))


def _with_lines(
    image: Image.Image, a: NDArray[np.float64], b: NDArray[np.float64], colors: Pixels
) -> Image.Image:
    """Lines are drawn three times as large and shrunk: PIL's own are not smooth."""
    large = image.resize((3 * image.width, 3 * image.height), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(large)
    for start, end, color in zip(3.0 * a, 3.0 * b, colors.tolist(), strict=True):
        draw.line((*start.tolist(), *end.tolist()), fill=tuple(color), width=4)
        for x, y in (start.tolist(), end.tolist()):
            draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=tuple(color), outline=(0, 0, 0))
    return large.resize(image.size, Image.Resampling.LANCZOS)
