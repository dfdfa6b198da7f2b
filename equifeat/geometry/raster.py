"""Depth of a triangle mesh at pixel centres: an exact scanline z-buffer, without a graphics card.

1/z is affine in the image (Heckbert, "Survey of Texture Mapping", 1986), so the depth at a pixel's
centre is perspective-correct. Only covered pixels are touched: the cost is that of the silhouette
times its layers, not of the image.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equifeat.geometry.pixels import SizeHW

# Pixels filled at once: bounds memory to some hundred megabytes.
_BLOCK = 2**21
# Triangles are cut this far in front of the camera, relative to the farthest vertex.
_NEAR = 1e-4
# Centres on an edge belong to both neighbours, so that rounding leaves no holes.
_EDGE = 1e-9


def rasterize_depth(
    vertices_cam: Float[Tensor, "v 3"],
    faces: Int[Tensor, "f 3"],
    K: Float[Tensor, "3 3"],
    size_hw: SizeHW,
) -> Float[Tensor, "h w"]:
    """Return the z-depth of the nearest triangle at every pixel centre.

    Args:
        vertices_cam: (V, 3) vertices in camera coordinates, OpenCV axes.
        faces: (F, 3) rows of vertices; both sides are drawn.
        K: (3, 3) intrinsics, corner convention.
        size_hw: Height and width of the image.

    Returns:
        (H, W) float64 z-depth in the vertices' unit, 0 where nothing is seen.
    """
    h, w = size_hw
    inverse = torch.zeros(h * w, dtype=torch.float64)
    corners = _in_front(vertices_cam.detach().cpu().double()[faces.cpu()])
    if len(corners):
        image = corners @ K.detach().cpu().double().mT
        xy = image[..., :2] / image[..., 2:]
        plane, bounds, good = _planes(xy, 1.0 / corners[..., 2])
        xy, plane, bounds = xy[good], plane[good], bounds[good]
        rows, owner = _rows(xy, h)
        for start in range(0, len(rows), _BLOCK):
            _fill(
                inverse,
                rows[start : start + _BLOCK],
                owner[start : start + _BLOCK],
                (xy, plane, bounds),
                size_hw,
            )
    depth = torch.where(inverse > 0, 1.0 / inverse.clamp(min=1e-300), 0.0)
    return depth.reshape(h, w)


def _in_front(corners: Tensor) -> Tensor:
    """Cut (F, 3, 3) triangles at a plane just in front of the camera."""
    if not len(corners) or not bool((corners[..., 2] > 0).any()):
        return corners[:0]
    near = _NEAR * float(corners[..., 2].max())
    front = corners[..., 2] > near
    count = front.sum(dim=1)
    out = [corners[count == 3]]
    for inside in (1, 2):
        cut = corners[count == inside]
        if not len(cut):
            continue
        # turn each triangle so that the odd corner comes first
        odd = front[count == inside] == (inside == 1)
        turn = (odd.long().argmax(dim=1)[:, None] + torch.arange(3)) % 3
        a, b, c = torch.gather(cut, 1, turn[..., None].expand(-1, -1, 3)).unbind(1)
        ab, ac = _cross(a, b, near), _cross(a, c, near)
        if inside == 1:
            out.append(torch.stack([a, ab, ac], dim=1))
        else:
            out.append(torch.stack([ab, b, c], dim=1))
            out.append(torch.stack([ab, c, ac], dim=1))
    return torch.cat(out)


def _cross(a: Tensor, b: Tensor, near: float) -> Tensor:
    """Points of the segments a-b at depth near."""
    share = (near - a[:, 2]) / (b[:, 2] - a[:, 2])
    return a + share[:, None] * (b - a)


def _planes(xy: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1/z = p . (x, y, 1) of each triangle, its bounds, and which triangles have an area."""
    e1, e2 = xy[:, 1] - xy[:, 0], xy[:, 2] - xy[:, 0]
    area = e1[:, 0] * e2[:, 1] - e1[:, 1] * e2[:, 0]
    good = area.isfinite() & (area.abs() > 1e-12)
    d1, d2 = inverse[:, 1] - inverse[:, 0], inverse[:, 2] - inverse[:, 0]
    safe = torch.where(good, area, 1.0)
    px = (d1 * e2[:, 1] - d2 * e1[:, 1]) / safe
    py = (d2 * e1[:, 0] - d1 * e2[:, 0]) / safe
    p0 = inverse[:, 0] - px * xy[:, 0, 0] - py * xy[:, 0, 1]
    bounds = torch.stack([inverse.amin(dim=1), inverse.amax(dim=1)], dim=1)
    return torch.stack([px, py, p0], dim=1), bounds, good


def _rows(xy: Tensor, height: int) -> tuple[Tensor, Tensor]:
    """Every image row that a triangle's pixel centres may lie in, and which triangle it is."""
    low, high = xy[..., 1].amin(dim=1), xy[..., 1].amax(dim=1)
    first = (low - 0.5 - _EDGE).ceil().clamp(0, height).long()
    last = (high - 0.5 + _EDGE).floor().clamp(-1, height - 1).long()
    return _ranges(first, last)


def _fill(
    inverse: Tensor, rows: Tensor, owner: Tensor, triangles: tuple[Tensor, ...], size_hw: SizeHW
) -> None:
    """Keep the largest 1/z of the pixels of some rows of triangles."""
    xy, plane, bounds = triangles
    width = size_hw[1]
    left, right = _span(xy[owner], rows + 0.5)
    first = (left - 0.5 - _EDGE).ceil().clamp(0, width).long()
    last = (right - 0.5 + _EDGE).floor().clamp(-1, width - 1).long()
    total = (last - first + 1).clamp(min=0).cumsum(0)
    start = 0
    while start < len(rows):
        # as many spans as hold about one block of pixels
        done = int(total[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(total, done + _BLOCK)))
        x, span = _ranges(first[start:stop], last[start:stop])
        y, of = rows[start:stop][span], owner[start:stop][span]
        px, py, p0 = plane[of].unbind(1)
        value = px * (x + 0.5) + py * (y + 0.5) + p0
        # edge-on triangles have steep planes: never leave what their corners span
        value = torch.minimum(torch.maximum(value, bounds[of, 0]), bounds[of, 1])
        inverse.scatter_reduce_(0, y * width + x, value, "amax")
        start = stop


def _span(xy: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Where the lines at y enter and leave (N, 3, 2) triangles."""
    lefts, rights = [], []
    for i, j in ((0, 1), (1, 2), (2, 0)):
        p, q = xy[:, i], xy[:, j]
        # neighbours share an edge: both must compute it from the same end
        swap = (p[:, 1] > q[:, 1]) | ((p[:, 1] == q[:, 1]) & (p[:, 0] > q[:, 0]))
        p, q = torch.where(swap[:, None], q, p), torch.where(swap[:, None], p, q)
        rise = q[:, 1] - p[:, 1]
        share = ((y - p[:, 1]) / torch.where(rise > 0, rise, 1.0)).clamp(0.0, 1.0)
        x = p[:, 0] + share * (q[:, 0] - p[:, 0])
        crossed = (y >= p[:, 1] - _EDGE) & (y <= q[:, 1] + _EDGE)
        flat = crossed & (rise <= 0)
        lefts.append(torch.where(crossed, x, torch.inf))
        rights.append(torch.where(crossed, torch.where(flat, q[:, 0], x), -torch.inf))
    return torch.stack(lefts).amin(dim=0), torch.stack(rights).amax(dim=0)


def _ranges(first: Tensor, last: Tensor) -> tuple[Any, Any]:
    """All whole numbers of the ranges first..last, and the range each is of."""
    count = (last - first + 1).clamp(min=0)
    owner = torch.repeat_interleave(torch.arange(len(count)), count)
    offset = torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]
    return first[owner] + offset, owner
