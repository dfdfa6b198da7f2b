"""A picture of tracks: a few frames with predicted points, and lines to the true ones."""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from equifeat.data.tracked_video import TrackedVideo
from equifeat.draw import Pixels, sheet, to_bytes
from equifeat.geometry.pixels import resize, scale_xy

_FRAMES, _POINTS, _WIDTH = 4, 24, 290
# PIL's lines are not smooth: draw large and shrink
_LARGER = 3


def track_picture(
    video: TrackedVideo, tracks: Tensor, occluded: Tensor, title: str
) -> Image.Image | None:
    """Draw a few frames with the queries of the first frame that is asked.

    Args:
        video: The video.
        tracks: (N, T, 2) predicted places in its pixels.
        occluded: (N, T) where points are predicted to be hidden.
        title: Heading.

    Returns:
        The picture; None for a video without queries.
    """
    truth = video.queries
    if not len(truth.frame):
        return None
    start = int(truth.frame.min())
    here = (truth.frame == start).nonzero()[:, 0]
    some = here[torch.linspace(0, len(here) - 1, min(len(here), _POINTS)).long()]
    h, w = video.size_hw
    small = (max(1, round(h * _WIDTH / w)), _WIDTH)
    found = scale_xy(tracks[some].double(), video.size_hw, small)
    true = scale_xy(truth.tracks[some].double(), video.size_hw, small)
    frames = np.linspace(0, len(video) - 1, min(len(video), _FRAMES)).round().astype(int)
    shown = sorted({start, *frames.tolist()})[:_FRAMES]
    cells = []
    for t in shown:
        photo = to_bytes(resize(video.read(t)[None], small)[0].permute(1, 2, 0))
        known = ~truth.occluded[some, t]
        cells.append(draw_points(photo, found[:, t], occluded[some, t], true[:, t], known))
    return sheet(
        title,
        [f"frame {t}" + (" (asked)" if t == start else "") for t in shown],
        [""],
        [cells],
        [[""] * len(cells)],
        f"{len(some)} of {len(truth.frame)} queries. Filled: predicted; hollow: predicted as "
        "hidden; line: to the true place, where the point is seen.",
    )


def draw_points(
    image: Pixels, xy: Tensor, hollow: Tensor, true_xy: Tensor, known: Tensor
) -> Pixels:
    """Draw points, each in a colour of its own, with a line to where it truly is.

    Args:
        image: Drawn on a copy.
        xy: (N, 2) pixels of the image.
        hollow: (N,) which are drawn as rings.
        true_xy: (N, 2) where the points truly are.
        known: (N,) where that is known; no line elsewhere.

    Returns:
        The picture.
    """
    spread = np.linspace(0.0, 1.0, len(xy))
    colors = to_bytes(torch.from_numpy(matplotlib.colormaps["turbo"](spread)[:, :3]))
    size = (image.shape[1] * _LARGER, image.shape[0] * _LARGER)
    page = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(page)
    for k, color in enumerate(map(tuple, colors.tolist())):
        x, y = (xy[k] * _LARGER).tolist()
        if known[k]:
            draw.line((x, y, *(true_xy[k] * _LARGER).tolist()), fill=color, width=4)
        box = (x - 9, y - 9, x + 9, y + 9)
        draw.ellipse(box, fill=None if hollow[k] else color, outline=color, width=4)
    return np.array(page.resize((image.shape[1], image.shape[0]), Image.Resampling.LANCZOS))
