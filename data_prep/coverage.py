"""Does a rendered view show the mesh at all? A blank frame with exit code 0 must not pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.mesh import Mesh, Primitive
from data_prep.opaque import alpha_at_corners, opaque_room
from equifeat.errors import RenderError
from equifeat.seeding import numpy_generator

Array = NDArray[Any]

_POINTS = 2000
_ENOUGH = 20
_DEPTH_SLACK = 0.02
# A pixel's centre is at most 0.71 pixels from any point in it.
_REACH = 0.75
# Of more pixels than this with an opaque point in each, some centre meets one.
_BLANK = 50


class CoverageCheck:
    """Compares views with surface points of the mesh, which never went through the renderer.

    Every opaque surface point, hidden or not, projects to a pixel that the object covers, and the
    depth there is no larger than its own. Points on triangles seen edge-on or thinner than two
    pixels are left out, and where the material has see-through texels, points that have one within
    reach of the pixel's centre.

    Args:
        mesh: The mesh.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._corners = np.zeros((0, 3, 3))
        self._points = np.zeros((0, 3))
        rng = numpy_generator(0, mesh.num_faces)
        # parts without see-through texels are enough where there are any
        for parts in ([p for p in mesh.primitives if not p.cuts], mesh.primitives):
            corners = np.concatenate(
                [p.vertices[p.faces] for p in parts] or [np.zeros((0, 3, 3))]
            ).astype(np.float64)
            area = np.linalg.norm(
                np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1
            )
            if area.sum() > 0:
                count = _POINTS if parts is not mesh.primitives else 4 * _POINTS
                pick = rng.choice(len(corners), size=count, p=area / area.sum())
                self._sample(parts, corners[pick], pick, rng.dirichlet([1.0] * 3, size=count))
                return

    def _sample(self, parts: list[Primitive], corners: Array, pick: Array, bary: Array) -> None:
        """Keep the opaque ones among points on triangles."""
        self._corners = corners
        self._points = np.einsum("nk,nkc->nc", bary, corners)
        # how far it is to what may be see-through, in texels; where the corners lie, in texels
        self._room = np.full(len(pick), np.inf)
        self._texels = np.zeros((len(pick), 3, 2))
        # alpha of factor and vertex colours above what is needed; at the corners
        self._spare = np.full(len(pick), np.inf)
        self._alpha = np.ones((len(pick), 3))
        ends = np.cumsum([len(p.faces) for p in parts])
        owner = np.searchsorted(ends, pick, side="right")
        for number in np.unique(owner):
            part, rows = parts[number], np.flatnonzero(owner == number)
            if not part.cuts:
                continue
            faces = pick[rows] - (ends[number] - len(part.faces))
            self._alpha[rows] = alpha_at_corners(part)[faces]
            self._spare[rows] = np.einsum("nk,nk->n", bary[rows], self._alpha[rows])
            self._spare[rows], room = opaque_room(part, faces, bary[rows], self._spare[rows])
            if part.texture is not None and part.uv is not None:
                size = np.array(part.texture.shape[1::-1], np.float64)
                self._room[rows] = room
                self._texels[rows] = part.uv[part.faces[faces]] * size
        keep = np.flatnonzero((self._spare > 0) & (self._room > 1))[:_POINTS]
        for name in ("_corners", "_points", "_room", "_texels", "_spare", "_alpha"):
            setattr(self, name, getattr(self, name)[keep])

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
        if not len(self._points):
            return
        h, w = depth.shape
        corners = self._corners @ cam_from_world[:3, :3].T + cam_from_world[:3, 3]
        points = self._points @ cam_from_world[:3, :3].T + cam_from_world[:3, 3]
        front = (corners[..., 2] > 1e-3).all(axis=1) & (points[:, 2] > 1e-3)
        xy = points[:, :2] / np.maximum(points[:, 2:], 1e-3) * [K[0, 0], K[1, 1]] + K[:2, 2]
        inside = front & ((xy >= 1) & (xy < [w - 1, h - 1])).all(axis=1)
        if not inside.any():
            raise RenderError(
                f"{where}: the object lies outside the image; give a larger --fov or --distance, "
                "or less jitter"
            )
        column, row = np.floor(xy[inside]).astype(int).T
        corners, points = corners[inside], points[inside]
        edges = _edges(corners, K)
        thick, facing = _shape(corners, edges)
        # a flat object seen edge-on is rightly blank
        if not depth.any() and len(np.unique((row * w + column)[facing])) > _BLANK:
            raise RenderError(
                f"{where}: the picture is blank, so the renderer failed; try --renderer embree"
            )
        sure = self._surely_opaque(inside, edges)
        thick, facing = thick & sure, facing & sure
        chosen, share = (thick, 0.9) if thick.sum() >= _ENOUGH else (facing, 0.25)
        if chosen.sum() < _ENOUGH:
            return  # edge-on, or nothing surely opaque to compare with
        column, row = column[chosen], row[chosen]
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

    def _surely_opaque(self, rows: Array, edges: Array) -> Array:
        """Return which points have nothing see-through within reach of a pixel's centre."""
        room, spare = self._room[rows], self._spare[rows]
        if not np.isfinite(room).any() and not np.isfinite(spare).any():
            return np.ones(len(room), bool)
        det = edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0]
        flat = np.abs(det) < 1e-9
        det = np.where(flat, 1.0, det)
        inverse = np.stack([edges[:, 1, 1], -edges[:, 0, 1], -edges[:, 1, 0], edges[:, 0, 0]], -1)
        inverse = inverse.reshape(-1, 2, 2) / det[:, None, None]
        texels, alpha = self._texels[rows], self._alpha[rows]
        # change a pixel; edges are rows, so d = inverse @ (change along the edges)
        moves = inverse @ (texels[:, 1:] - texels[:, :1])
        fades = np.einsum("nij,nj->ni", inverse, alpha[:, 1:] - alpha[:, :1])
        step = np.linalg.norm(moves, axis=(1, 2)) * _REACH + 1.0
        fade = np.linalg.norm(fades, axis=1) * _REACH
        out: Array = ~flat & (room > step) & (spare > fade)
        return out


def _edges(corners: Array, K: Array) -> Array:
    """Return (N, 2, 2): two edges of each triangle as rows, in pixels."""
    xy = corners[..., :2] / corners[..., 2:] * [K[0, 0], K[1, 1]]
    out: Array = xy[:, 1:] - xy[:, :1]
    return out


def _shape(corners: Array, edges: Array) -> tuple[Array, Array]:
    """Return which triangles are at least two pixels thick, and which face the camera."""
    e1, e2 = edges[:, 0], edges[:, 1]
    twice_area = np.abs(e1[:, 0] * e2[:, 1] - e1[:, 1] * e2[:, 0])
    lengths = [np.linalg.norm(side, axis=1) for side in (e1, e2, e2 - e1)]
    sides = np.max(lengths, axis=0)
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    view = corners.mean(axis=1)
    cosine = np.abs(np.einsum("nc,nc->n", normal, view))
    cosine /= np.maximum(np.linalg.norm(normal, axis=1) * np.linalg.norm(view, axis=1), 1e-300)
    return twice_area >= 2.0 * np.maximum(sides, 1e-12), cosine > 0.2
