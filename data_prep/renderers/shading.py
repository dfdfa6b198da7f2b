"""Textures in NumPy: mip levels, bilinear and trilinear sampling, wrap modes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.mesh import Mesh

Array = NDArray[Any]

_MODES = {"repeat": 0, "mirror": 1, "clamp": 2}


class TextureBank:
    """All textures of a mesh, with their mip levels, as one flat array of texels.

    Args:
        mesh: The mesh; primitive i is texture i, primitives without one get a white texel.
    """

    def __init__(self, mesh: Mesh) -> None:
        texels: list[Array] = []
        rows: list[list[tuple[int, int, int]]] = []
        start, done = 0, {}
        for part in mesh.primitives:
            key = id(part.texture) if part.uv is not None else None
            if key not in done:
                image = part.texture if part.texture is not None and key else _WHITE
                levels = []
                for level in _mip_chain(image):
                    levels.append((start, level.shape[1], level.shape[0]))
                    texels.append(level.reshape(-1, 4))
                    start += level.shape[0] * level.shape[1]
                done[key] = levels
            rows.append(done[key])
        most = max(len(levels) for levels in rows)
        table = np.array([levels + levels[-1:] * (most - len(levels)) for levels in rows])
        self._texels = np.concatenate(texels)
        self._start, self._width, self._height = (table[..., k].astype(np.int64) for k in range(3))
        self._wrap = np.array([[_MODES[w] for w in p.wrap] for p in mesh.primitives])
        self._plain_wrap = not self._wrap.any()
        self._top = np.array([len(levels) - 1 for levels in rows], dtype=np.float32)

    def texels_per_uv(self, part: Array) -> Array:
        """Return (N, 2) width and height of the full-resolution textures of primitives."""
        return np.stack([self._width[part, 0], self._height[part, 0]], axis=-1)

    def sample(self, part: Array, uv: Array, lod: Array) -> Array:
        """Sample trilinearly.

        Args:
            part: (N,) primitive indices.
            uv: (N, 2) texture coordinates, origin at the top left.
            lod: (N,) mip level, 0 is full resolution.

        Returns:
            (N, 4) float32 RGBA in [0, 255].
        """
        lod = np.clip(lod, 0.0, self._top[part])
        level = lod.astype(np.int64)
        blend = (lod - level).astype(np.float32)
        out = self.bilinear(part, uv, level)
        more = np.flatnonzero(blend > 0.02)
        if len(more):
            upper = self.bilinear(part[more], uv[more], level[more] + 1)
            out[more] += (upper - out[more]) * blend[more, None]
        return out

    def bilinear(self, part: Array, uv: Array, level: Array | int) -> Array:
        """Sample one mip level bilinearly.

        Args:
            part: (N,) primitive indices.
            uv: (N, 2) texture coordinates.
            level: (N,) mip levels, or one.

        Returns:
            (N, 4) float32 RGBA in [0, 255].
        """
        start = self._start[part, level]
        sizes = (self._width[part, level], self._height[part, level])
        low, high, weight = [], [], []
        for axis, size in enumerate(sizes):
            x = uv[:, axis].astype(np.float64) * size - 0.5
            floor = np.floor(x)
            weight.append((x - floor).astype(np.float32)[:, None])
            cell = floor.astype(np.int64)
            low.append(self._fold(cell, size, part, axis))
            high.append(self._fold(cell + 1, size, part, axis))
        (x0, y0), (x1, y1), (wx, wy) = low, high, weight
        row0, row1 = start + y0 * sizes[0], start + y1 * sizes[0]
        take = self._texels.take
        top = take(row0 + x0, axis=0).astype(np.float32)
        top += (take(row0 + x1, axis=0) - top) * wx
        bottom = take(row1 + x0, axis=0).astype(np.float32)
        bottom += (take(row1 + x1, axis=0) - bottom) * wx
        out: Array = top + (bottom - top) * wy
        return out

    def _fold(self, cell: Array, size: Array, part: Array, axis: int) -> Array:
        """Bring texel indices into the texture by the primitive's wrap mode."""
        repeat = cell % size
        if self._plain_wrap:
            return repeat
        mode = self._wrap[part, axis]
        twice = cell % (2 * size)
        mirror = np.minimum(twice, 2 * size - 1 - twice)
        return np.where(mode == 1, mirror, np.where(mode == 2, cell.clip(0, size - 1), repeat))


_WHITE = np.full((1, 1, 4), 255, dtype=np.uint8)


def _mip_chain(image: Array) -> list[Array]:
    """Halve by box filter down to one texel; odd sides drop their last row, like glGenerateMipmap.

    Colour is averaged straight, not weighted by alpha, also like glGenerateMipmap.
    """
    chain = [np.ascontiguousarray(image)]
    while max(chain[-1].shape[:2]) > 1:
        last = chain[-1]
        h, w = max(last.shape[0] // 2, 1), max(last.shape[1] // 2, 1)
        fy, fx = min(2, last.shape[0]), min(2, last.shape[1])
        cut = last[: h * fy, : w * fx].reshape(h, fy, w, fx, 4)
        total = cut.sum(axis=(1, 3), dtype=np.uint16)
        chain.append(((total + fx * fy // 2) // (fx * fy)).astype(np.uint8))
    return chain
