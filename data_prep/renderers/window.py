"""The part of an image that a mesh can touch: nothing else needs to be drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def projected_window(
    vertices: Array, K: Array, cam_from_world: Array, size_hw: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return the pixels that a mesh can touch, with one pixel to spare.

    Args:
        vertices: (V, 3) world points.
        K: (3, 3) intrinsics.
        cam_from_world: (4, 4) pose.
        size_hw: Height and width of the image.

    Returns:
        x0, y0, x1, y1, the last two exclusive; the whole image when a vertex is at or behind the
        camera; empty (x1 ≤ x0 or y1 ≤ y0) when the mesh is outside.
    """
    h, w = size_hw
    points = vertices @ cam_from_world[:3, :3].T + cam_from_world[:3, 3]
    if points[:, 2].min() <= 1e-3:
        return 0, 0, w, h
    xy = points[:, :2] / points[:, 2:] * [K[0, 0], K[1, 1]] + K[:2, 2]
    low = np.floor(xy.min(axis=0) - 1).clip(0, [w, h]).astype(int)
    high = np.ceil(xy.max(axis=0) + 1).clip(0, [w, h]).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])
