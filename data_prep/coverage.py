"""Does a rendered view show the mesh at all? A blank frame with exit code 0 must not pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.mesh import Mesh
from equifeat.errors import RenderError
from equifeat.seeding import numpy_generator

Array = NDArray[Any]

_POINTS = 2000
_ENOUGH = 20
_DEPTH_SLACK = 0.02


class CoverageCheck:
    """Compares views with surface points of the mesh, which never went through the renderer.

    Every surface point, hidden or not, projects to a pixel that the object covers, and the depth
    there is no larger than its own. Points on triangles seen edge-on or thinner than two pixels
    are left out; primitives with see-through texels as well.

    Args:
        mesh: The mesh.
    """

    def __init__(self, mesh: Mesh) -> None:
        solid = [p for p in mesh.primitives if not p.cuts]
        self._corners = np.zeros((0, 3, 3))
        self._points = np.zeros((0, 3))
        if not solid:
            return
        corners = np.concatenate([p.vertices[p.faces] for p in solid]).astype(np.float64)
        area = np.linalg.norm(
            np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1
        )
        if area.sum() <= 0:
            return
        rng = numpy_generator(0, len(corners))
        pick = rng.choice(len(corners), size=_POINTS, p=area / area.sum())
        bary = rng.dirichlet([1.0, 1.0, 1.0], size=_POINTS)
        self._corners = corners[pick]
        self._points = np.einsum("nk,nkc->nc", bary, self._corners)

    def __call__(self, K: Array, cam_from_world: Array, depth: Array, where: str) -> None:
        """Check one view.

        Args:
            K: (3, 3) intrinsics.
            cam_from_world: (4, 4) pose.
            depth: (H, W) z-depth, 0 = background.
            where: What the error message calls this view.

        Raises:
            RenderError: The view is blank, incomplete, or shows something else.
        """
        h, w = depth.shape
        corners = self._corners @ cam_from_world[:3, :3].T + cam_from_world[:3, 3]
        points = self._points @ cam_from_world[:3, :3].T + cam_from_world[:3, 3]
        front = (corners[..., 2] > 1e-3).all(axis=1) & (points[:, 2] > 1e-3)
        corners, points = corners[front], points[front]
        xy = points[:, :2] / points[:, 2:] * [K[0, 0], K[1, 1]] + K[:2, 2]
        inside = ((xy >= 1) & (xy < [w - 1, h - 1])).all(axis=1)
        if len(self._points) and not inside.any():
            raise RenderError(
                f"{where}: the object lies outside the image; give a larger --fov or --distance, "
                "or less jitter"
            )
        corners, points, xy = corners[inside], points[inside], xy[inside]
        thick, facing = _shape(corners, K)
        chosen, share = (thick, 0.9) if thick.sum() >= _ENOUGH else (facing, 0.25)
        if chosen.sum() < _ENOUGH:
            return  # edge-on, or nothing solid to compare with
        column, row = np.floor(xy[chosen]).astype(int).T
        nearest = np.where(depth > 0, depth, np.inf)
        around = np.stack(
            [nearest[row + dy, column + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        )
        good = around.min(axis=0) <= points[chosen, 2] + _DEPTH_SLACK
        if good.mean() < share:
            raise RenderError(
                f"{where}: the picture shows {good.mean():.0%} of the surface points that must be "
                "covered, so the renderer failed; try --renderer embree"
            )


def _shape(corners: Array, K: Array) -> tuple[Array, Array]:
    """Return which triangles are at least two pixels thick, and which face the camera."""
    xy = corners[..., :2] / corners[..., 2:] * [K[0, 0], K[1, 1]]
    e1, e2 = xy[:, 1] - xy[:, 0], xy[:, 2] - xy[:, 0]
    twice_area = np.abs(e1[:, 0] * e2[:, 1] - e1[:, 1] * e2[:, 0])
    sides = np.linalg.norm(xy - np.roll(xy, 1, axis=1), axis=2).max(axis=1)
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    view = corners.mean(axis=1)
    cosine = np.abs(np.einsum("nc,nc->n", normal, view))
    cosine /= np.maximum(np.linalg.norm(normal, axis=1) * np.linalg.norm(view, axis=1), 1e-300)
    return twice_area >= 2.0 * np.maximum(sides, 1e-12), cosine > 0.2
