"""Depth of one view carried to another and compared with what that view measured.

All functions take a batch of H hypotheses about cameras, so that many can be compared at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.check_surface import BACKGROUND, UNKNOWN, Surface

Array = NDArray[Any]
FLOOR, CEILING = 1e-4, 0.1
TOLERANCE = 0.01
CONSISTENT, LEAST_AGREE = 0.8, 0.08
LOST = np.inf
IN_THE_AIR = -np.inf


class Cameras(NamedTuple):
    """H hypotheses about the cameras of V views.

    Attributes:
        cam_from_world: (H, V, 4, 4).
        K: (H, V, 3, 3) in pixels of the pictures.
        scale: (H,) factor of the depth.
        ray: (H,) 1 where depth is to be divided by the length of the pixel's ray, -1 for times.
    """

    cam_from_world: Array
    K: Array
    scale: Array
    ray: Array


class Score(NamedTuple):
    """How well views agree.

    Attributes:
        consistency: Points that agree, of those that agree or contradict. A point that another
            surface hides does not count; one in front of what the other view saw contradicts.
        agree: Points that agree, of all that were tried.
        residual: Median distance to the other view's surface over that part of the object's size,
            over the points that landed near it.
        cost: Mean logarithm of the clipped distance; smaller is better, for comparing hypotheses.
        points: Points that were tried.
    """

    consistency: float
    agree: float
    residual: float
    cost: float
    points: int

    @property
    def consistent(self) -> bool:
        """Whether views with this score fit together."""
        return self.consistency >= CONSISTENT and self.agree >= LEAST_AGREE


def thinned_intrinsics(K: Array, step: int) -> Array:
    """Carry intrinsics to a picture of which every step-th pixel was kept.

    Args:
        K: (..., 3, 3).
        step: See `Surface`.

    Returns:
        (..., 3, 3).
    """
    if step == 1:
        return K
    out = K.copy()
    out[..., :2, 2] = (K[..., :2, 2] - (step // 2 + 0.5)) / step + 0.5
    out[..., :2, :2] /= step
    return out


def residuals(
    source: Surface, target: Surface, i: int, j: int, cameras: Cameras, rows: Array, extent: float
) -> Array:
    """Reproject points of view i into view j.

    Args:
        source: Surface of view i.
        target: Surface of view j.
        i: Index of the source view in cameras.
        j: Index of the target view in cameras.
        cameras: The hypotheses.
        rows: (N,) which points of the source.
        extent: Size of the object in units of the depth.

    Returns:
        (H, N) distances along the target's normal over the extent, positive behind its surface;
        NaN where the target knows nothing, LOST outside it, IN_THE_AIR on empty background.
    """
    Ki, Kj = (
        thinned_intrinsics(cameras.K[:, i], source.step),
        thinned_intrinsics(cameras.K[:, j], target.step),
    )
    xy, depth = source.xy[rows], source.depth[rows]
    across = (xy[None] - Ki[:, None, :2, 2]) / Ki[:, None, [0, 1], [0, 1]]
    ray = np.concatenate([across, np.ones((*across.shape[:2], 1))], axis=-1)
    length = np.linalg.norm(ray, axis=-1) ** -cameras.ray[:, None]
    points = ray * (depth * length * cameras.scale[:, None])[..., None]
    poses = cameras.cam_from_world
    there = poses[:, j] @ np.linalg.inv(poses[:, i])
    points = points @ there[:, :3, :3].transpose(0, 2, 1) + there[:, None, :3, 3]
    z = points[..., 2]
    ahead = z > 1e-9
    across = points[..., :2] / np.where(ahead, z, 1.0)[..., None]
    at = across * Kj[:, None, [0, 1], [0, 1]] + Kj[:, None, :2, 2]
    h, w = target.kind.shape
    inside = ahead & (at >= 0).all(-1) & (at[..., 0] < w) & (at[..., 1] < h)
    pixel = np.where(inside[..., None], np.floor(np.where(inside[..., None], at, 0)), 0)
    column, row = pixel[..., 0].astype(np.int64), pixel[..., 1].astype(np.int64)
    kind = target.kind[row, column]
    gx, gy = target.slope_xy[:, row, column]
    offset = at - pixel - 0.5
    inverse = target.inverse[row, column] + gx * offset[..., 0] + gy * offset[..., 1]
    known = inside & (kind == 0) & (inverse > 0)
    safe = np.where(known, inverse, 1.0)
    length = np.sqrt((across**2).sum(-1) + 1.0) ** -cameras.ray[:, None]
    seen = cameras.scale[:, None] * np.where(known, length, 1.0) / safe
    steep = np.hypot(gx * Kj[:, None, 0, 0], gy * Kj[:, None, 1, 1]) / safe
    normal = (z - seen) / np.sqrt(1.0 + steep**2) / (extent * cameras.scale[:, None])
    out: Array = np.where(known, normal, np.nan)
    out[inside & (kind == BACKGROUND)] = IN_THE_AIR
    out[inside & (kind == UNKNOWN)] = np.nan
    out[~inside] = LOST
    return out


def score(found: Array, noise: float, ceiling: float | None = None) -> list[Score]:
    """Sum up residuals of several pairs of views.

    Args:
        found: (H, N) of `residuals`.
        noise: Standard deviation of the residuals that the sensor's noise alone makes.
        ceiling: Where the cost clips residuals, CEILING when None.

    Returns:
        One score a hypothesis.
    """
    tolerance = max(TOLERANCE, 3 * noise)
    size = np.abs(found)
    agree = (size <= tolerance).sum(axis=1)
    contradict = (found < -tolerance).sum(axis=1)
    near = size < max(CEILING, tolerance)
    cost = costs(found, ceiling)
    return [
        Score(
            int(agree[h]) / max(int(agree[h] + contradict[h]), 1),
            int(agree[h]) / max(found.shape[1], 1),
            float(np.median(size[h, near[h]])) if near[h].any() else CEILING,
            float(cost[h]),
            found.shape[1],
        )
        for h in range(len(found))
    ]


def costs(found: Array, ceiling: float | None = None) -> Array:
    """Return only the costs of `score`.

    Args:
        found: (H, N) of `residuals`.
        ceiling: See there.

    Returns:
        (H,) mean logarithms over what is known; 0 where nothing is.
    """
    known = ~np.isnan(found)
    size = np.where(known, np.abs(found), 1.0).clip(FLOOR, ceiling or CEILING)
    total = np.where(known, np.log(size), 0.0).sum(axis=1)
    out: Array = total / np.maximum(known.sum(axis=1), 1)
    return out


def choose_pairs(cam_from_world: Array, usable: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Choose pairs of views that see the same things from different places, spread over all views.

    Only the angle between the cameras is used: it is the same for inverted, mirrored and turned
    poses, so that one choice serves most hypotheses.

    Args:
        cam_from_world: (V, 4, 4) poses.
        usable: Which views may be used.
        count: How many pairs at most.

    Returns:
        Pairs of indices, i < j.
    """
    views = np.asarray(usable)
    if len(views) > 400:
        views = views[np.linspace(0, len(views) - 1, 400).astype(int)]
    R = cam_from_world[views, :3, :3]
    trace = np.einsum("iab,jab->ij", R, R)
    angle = np.degrees(np.arccos(((np.abs(trace) - 1) / 2).clip(-1, 1)))
    # 25 degrees tell poses apart and still show the same surface; 5 say little, 60 hide much.
    badness = np.abs(np.log(np.maximum(angle, 0.05) / 25.0))
    np.fill_diagonal(badness, np.inf)
    chosen: list[tuple[int, int]] = []
    used = np.zeros(len(views))
    order = np.argsort((np.arange(len(views)) * 0.6180339887) % 1.0)
    for a in [*order, *order, *order]:
        if len(chosen) >= count:
            break
        b = int(np.argmin(badness[a] + 0.3 * used))
        if not np.isfinite(badness[a, b]):
            continue
        badness[a, b] = badness[b, a] = np.inf
        used[[a, b]] += 1
        first, second = sorted((int(views[a]), int(views[b])))
        chosen.append((first, second))
    return chosen
