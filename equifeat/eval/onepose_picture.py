"""Draw the box of an object in its true and estimated pose over a picture."""

from __future__ import annotations

import itertools

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from equifeat.draw import font_of, to_bytes
from equifeat.geometry.camera import Camera, transform
from equifeat.geometry.pixels import resize

_SIDE = 640
# Free space around the picture, as boxes are larger than objects, and above for the title.
_BORDER, _TITLE = 110, 28
_PAPER, _INK, _QUIET = (255, 255, 255), (29, 37, 48), (226, 229, 233)
_TRUE, _FOUND = (40, 220, 70), (255, 60, 40)
_AXES = ((255, 80, 80), (80, 220, 80), (90, 140, 255))
_DIM = 0.75


def box_corners(low: Tensor, high: Tensor) -> Tensor:
    """Return the corners of a box.

    Args:
        low: (3,) smallest coordinates.
        high: (3,) largest coordinates.

    Returns:
        (8, 3); corners that differ in one bit of their number share an edge.
    """
    bits = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=low.dtype)
    return low + bits * (high - low)


def box_picture(
    image: Tensor,
    camera: Camera,
    corners: Tensor,
    true: Tensor,
    found: Tensor | None,
    title: str,
) -> Image.Image:
    """Draw boxes: the truth green, the estimate red with its axes.

    Args:
        image: (3, H, W) RGB in [0, 1].
        camera: Of the picture.
        corners: (8, 3) of `box_corners`, in the object's axes.
        true: (4, 4) true pose.
        found: (4, 4) estimated pose, if there is one.
        title: One line above.

    Returns:
        The picture in a frame, its longer side 860 px.
    """
    h, w = image.shape[-2:]
    factor = _SIDE / max(h, w)
    size_hw = (max(1, round(h * factor)), max(1, round(w * factor)))
    pixels = to_bytes(resize(image[None].cpu(), size_hw)[0].permute(1, 2, 0) * _DIM)
    inner = (size_hw[1] + 2 * _BORDER, size_hw[0] + 2 * _BORDER)
    page = Image.new("RGB", inner, _QUIET)
    page.paste(Image.fromarray(pixels), (_BORDER, _BORDER))
    draw = ImageDraw.Draw(page)
    big = camera.resized(size_hw)
    _box(draw, big, corners, true, _TRUE, 5)
    if found is not None:
        _box(draw, big, corners, found, _FOUND, 2)
        middle = corners.mean(dim=0)
        length = 0.5 * float((corners[-1] - corners[0]).max())
        tips = middle + length * torch.eye(3, dtype=corners.dtype)
        ends = big.project(transform(found.double(), torch.cat([middle[None], tips]).double()))
        for axis, color in enumerate(_AXES):
            _line(draw, ends[0], ends[1 + axis], color, 3)
    whole = Image.new("RGB", (inner[0], inner[1] + _TITLE), _PAPER)
    whole.paste(page, (0, _TITLE))
    ImageDraw.Draw(whole).text((6, 6), title, fill=_INK, font=font_of(14))
    return whole


def _box(
    draw: ImageDraw.ImageDraw,
    camera: Camera,
    corners: Tensor,
    pose: Tensor,
    color: tuple[int, int, int],
    width: int,
) -> None:
    xy = camera.project(transform(pose.double(), corners.double()))
    for a, b in itertools.combinations(range(8), 2):
        if (a ^ b).bit_count() == 1:
            _line(draw, xy[a], xy[b], color, width)


def _line(
    draw: ImageDraw.ImageDraw, start: Tensor, end: Tensor, color: tuple[int, int, int], width: int
) -> None:
    # ends behind the camera are no numbers
    if bool(torch.isfinite(torch.stack([start, end])).all()):
        points = [(float(x) + _BORDER, float(y) + _BORDER) for x, y in (start, end)]
        draw.line(points, fill=color, width=width)
