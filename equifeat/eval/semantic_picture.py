"""A picture of a semantic pair: where keypoints were found, beside where they are."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from equifeat.draw import to_bytes
from equifeat.draw_matches import match_picture

_HEIGHT, _WIDEST, _RADIUS = 360, 580, 5
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)


def pair_picture(
    image0: Float[Tensor, "3 h0 w0"],
    image1: Float[Tensor, "3 h1 w1"],
    xy0: Float[Tensor, "n 2"],
    found: Float[Tensor, "n 2"],
    true: Float[Tensor, "n 2"],
    errors: Float[Tensor, "n"],
    *,
    label: str,
    title: str,
    category: str,
) -> Image.Image:
    """Draw lines from keypoints to where they were found, and from there to where they are.

    Args:
        image0: The source, RGB in [0, 1].
        image1: The target.
        xy0: (N, 2) keypoints in pixels of the source.
        found: (N, 2) where they were found, in pixels of the target.
        true: (N, 2) where they are.
        errors: (N,) relative errors, which colour the lines.
        label: What errors are relative to.
        title: Heading.
        category: What both pictures show.

    Returns:
        The picture.
    """
    height = min(
        _HEIGHT, *(int(_WIDEST * image.shape[-2] / image.shape[-1]) for image in (image0, image1))
    )
    large, scale = _enlarged(image1, max(1, height))
    draw = ImageDraw.Draw(large)
    for (x, y), (u, v) in zip((true * scale).tolist(), (found * scale).tolist(), strict=True):
        draw.line((x, y, u, v), fill=_WHITE, width=1)
        for radius, color in ((_RADIUS, _BLACK), (_RADIUS - 1, _WHITE), (_RADIUS - 2, _BLACK)):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color)
    target = torch.from_numpy(np.array(large)).permute(2, 0, 1).float() / 255.0
    return match_picture(
        image0,
        target,
        xy0,
        found * scale,
        errors,
        label=label,
        titles=(f"{category}: keypoints", "dots: found, rings: true"),
        title=title,
        height=max(1, height),
    )


def _enlarged(image: Tensor, height: int) -> tuple[Image.Image, Tensor]:
    """The picture at a height, and the factors of x and y that points take."""
    h, w = int(image.shape[-2]), int(image.shape[-1])
    width = max(1, round(w * height / h))
    small = Image.fromarray(to_bytes(image.permute(1, 2, 0)))
    scale = torch.tensor([width / w, height / h], dtype=torch.float64)
    return small.resize((width, height), Image.Resampling.LANCZOS), scale
