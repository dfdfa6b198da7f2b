"""Where a part of a mesh is surely opaque, computed from its material and not by a renderer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.primitives import Primitive

Array = NDArray[Any]

# Renderers work in float32.
_MARGIN = 0.01


def alpha_at_corners(part: Primitive) -> Array:
    """Return alpha of factor times vertex colour.

    Args:
        part: The part.

    Returns:
        (F, 3) float64.
    """
    alpha = np.full(part.faces.shape, part.base_color[3], np.float64)
    if part.vertex_colors is not None:
        alpha *= part.vertex_colors[part.faces, 3]
    return alpha


def opaque_room(part: Primitive, faces: Array, bary: Array, alpha: Array) -> tuple[Array, Array]:
    """Return how far points are from what may be see-through.

    Args:
        part: The part they lie on.
        faces: (N,) numbers of their triangles.
        bary: (N, 3) their barycentric coordinates.
        alpha: (N,) factor times vertex colour there.

    Returns:
        (N,) alpha above what is needed, and (N,) texels to the next one that may be see-through
        (infinite without a texture, 0 at such a texel).
    """
    need = part.cutoff + _MARGIN
    if part.texture is None or part.uv is None:
        return alpha - need, np.full(len(alpha), np.inf)
    # what the clearest points need of the texture; those much less clear are not used
    best = float(alpha.max(initial=0.0))
    clear = max(0.9 * best, 1e-6)
    threshold = need / clear
    h, w = part.texture.shape[:2]
    opaque = part.texture[..., 3] >= 255.0 * threshold
    if opaque.all():
        return alpha - clear + 1e-9, np.full(len(alpha), np.inf)
    h, w = opaque.shape
    uv = np.einsum("nk,nkc->nc", bary, part.uv[part.faces[faces]].astype(np.float64))
    index = []
    for axis, size in ((0, w), (1, h)):
        texel = np.floor(uv[:, axis] * size)
        if part.wrap[axis] == "clamp":
            texel = np.clip(texel, 0, size - 1)
        elif part.wrap[axis] == "mirror":
            texel = np.mod(texel, 2 * size)
            texel = np.where(texel < size, texel, 2 * size - 1 - texel)
        else:
            texel = np.mod(texel, size)
        index.append(texel.astype(np.int64))
    return alpha - clear + 1e-9, _room(opaque, index[0], index[1])


def _room(opaque: Array, column: Array, row: Array) -> Array:
    """Return half the side of the largest opaque square around each texel, up to the border."""
    h, w = opaque.shape
    holes = np.zeros((h + 1, w + 1), np.int32)
    holes[1:, 1:] = (~opaque).cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
    low = np.zeros(len(row), np.int64)  # this side is free, counted from 0 = not even the texel
    high = np.minimum.reduce([column, row, w - 1 - column, h - 1 - row]) + 1
    while (low < high).any():
        side = (low + high + 1) // 2
        left, right, top, bottom = column - side + 1, column + side, row - side + 1, row + side
        count = holes[bottom, right] - holes[top, right] - holes[bottom, left] + holes[top, left]
        free = count == 0
        low, high = np.where(free, side, low), np.where(free, high, side - 1)
    return low.astype(np.float64)
