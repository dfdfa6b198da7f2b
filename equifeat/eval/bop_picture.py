"""Draw objects in their true and estimated poses over an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from equifeat.data.triangles import Triangles
from equifeat.geometry.camera import Camera, transform
from equifeat.geometry.pixels import resize
from equifeat.geometry.raster import rasterize_depth

_WIDTH = 1000
_TRUE, _FOUND = (0.1, 0.9, 0.2), (1.0, 0.15, 0.1)

Posed = tuple[Triangles, Tensor]


def pose_picture(
    image: Tensor, K: Tensor, true: Sequence[Posed], found: Sequence[Posed]
) -> Image.Image:
    """Draw outlines: the truth green and broad, estimates red and thin over it.

    Args:
        image: (3, H, W) RGB in [0, 1].
        K: (3, 3) intrinsics, corner convention.
        true: Surfaces with their (4, 4) true poses.
        found: Surfaces with their (4, 4) estimated poses.

    Returns:
        The picture, some 1,000 px wide.
    """
    h, w = image.shape[-2:]
    size_hw = (max(1, round(h * _WIDTH / w)), _WIDTH)
    camera = Camera(K, (int(h), int(w))).resized(size_hw)
    page = resize(image[None], size_hw)[0].clamp(0.0, 1.0) * 0.8
    for posed, color, width in ((true, _TRUE, 3), (found, _FOUND, 1)):
        for surface, pose in posed:
            corners = transform(pose.double(), surface.vertices)
            drawn = rasterize_depth(corners, surface.faces, camera.K, size_hw) > 0
            page[:, _outline(drawn, width)] = torch.tensor(color)[:, None]
    return Image.fromarray((page * 255).round().byte().permute(1, 2, 0).numpy())


def _outline(mask: Tensor, width: int) -> Tensor:
    """Pixels of the mask within so many pixels of its outside."""
    inner = mask.clone()
    for step in range(1, width + 1):
        for axis in (0, 1):
            for shift in (-step, step):
                inner &= torch.roll(mask, shift, dims=axis)
    return mask & ~inner
