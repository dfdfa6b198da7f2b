"""Ray casting with Embree (PyPI embreex): exact depth, no GL, no system package.

Embree answers in float32 which triangle a ray hits. Depth is then computed again in float64 from
that triangle's plane. One ray goes through each pixel centre inside the mesh's projection; more
rays are spent only where the picture changes (silhouettes, creases, borders of materials), and
textures are filtered by mip level, so that colour is antialiased at about 1.5 rays a pixel.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.mesh import Mesh
from data_prep.renderers import Rendered
from data_prep.renderers.lights import FIXED_LIGHT, Lights, shade
from data_prep.renderers.shading import TextureBank
from data_prep.renderers.window import projected_window
from equifeat.errors import MissingExtraError

Array = NDArray[Any]

# Rotated-grid offsets from the pixel centre, added to the centre's own sample.
_EXTRA = np.array([[-0.125, -0.375], [0.375, -0.125], [0.125, 0.375], [-0.375, 0.125]])
_MAX_LAYERS = 64


def unavailable() -> str:
    """Return why embree cannot be used here, or an empty string."""
    try:
        import embreex.rtcore_scene  # noqa: F401
    except ImportError as error:
        return f'embreex is not installed ({error}): pip install "equifeat[render]"'
    return ""


class _Hits(NamedTuple):
    """Rays that hit something: which ray, which triangle, barycentrics, z-depth."""

    ray: Array
    face: Array
    bary: Array
    depth: Array


class EmbreeRenderer:
    """Draws one mesh by ray casting.

    Args:
        mesh: The mesh.
    """

    name = "embree"
    device = "CPU"

    def __init__(self, mesh: Mesh) -> None:
        try:
            from embreex.mesh_construction import TriangleMesh
            from embreex.rtcore_scene import EmbreeScene
        except ImportError as error:
            raise MissingExtraError("embreex", "render", "Ray casting") from error
        self.details: dict[str, Any] = {}
        self.version = importlib.metadata.version("embreex")
        faces = mesh.faces
        self._part = np.concatenate(
            [np.full(len(p.faces), i, dtype=np.int64) for i, p in enumerate(mesh.primitives)]
        )
        self._vertices = mesh.vertices
        corners = self._vertices[faces].astype(np.float64)
        self._corners = corners
        self._plane = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        self._plane_offset = np.einsum("fc,fc->f", self._plane, corners[:, 0])
        # robust: without it rays slip through shared edges
        self._scene = EmbreeScene(robust=True)
        TriangleMesh(
            self._scene,
            np.ascontiguousarray(self._vertices, dtype=np.float32),
            np.ascontiguousarray(faces, dtype=np.int32),
        )
        self._textures = TextureBank(mesh)
        self._normals = _per_corner(mesh, "normals", 3)
        self._uv = _per_corner(mesh, "uv", 2)
        has_colors = any(p.vertex_colors is not None for p in mesh.primitives)
        self._colors = _per_corner(mesh, "vertex_colors", 4) if has_colors else None
        self._factor = np.array([p.base_color for p in mesh.primitives], dtype=np.float32)
        self._cutoff = np.array([p.cutoff if p.cuts else 0.0 for p in mesh.primitives])
        self._density = self._texel_density()

    def close(self) -> None:
        """Free the scene."""
        self._scene = None

    def render(
        self,
        K: Array,
        cam_from_world: Array,
        size_hw: tuple[int, int],
        normals: bool = False,
        lights: Lights = FIXED_LIGHT,
    ) -> Rendered:
        """See `data_prep.renderers.Renderer`."""
        h, w = size_hw
        K, pose = np.asarray(K, np.float64), np.asarray(cam_from_world, np.float64)
        x0, y0, x1, y1 = projected_window(self._vertices, K, pose, size_hw)
        depth = np.zeros((h, w), np.float32)
        color = np.zeros((h, w, 3), np.uint8)
        coverage = np.zeros((h, w), np.uint8)
        normal_map = np.zeros((h, w, 3), np.float32) if normals else None
        if x1 <= x0 or y1 <= y0:
            return Rendered(color, depth, depth > 0, normal_map, coverage)
        rows, columns = np.mgrid[y0:y1, x0:x1]
        centers = np.stack([columns, rows], axis=-1).reshape(-1, 2) + 0.5
        hits = self._cast(K, pose, centers)
        rgb, normal = self._shade(K, pose, centers, hits, 0.0, lights)
        shape = (y1 - y0, x1 - x0)
        flat_depth = np.zeros(len(centers), np.float32)
        flat_depth[hits.ray] = hits.depth
        flat_color = np.zeros((len(centers), 3), np.float32)
        flat_color[hits.ray] = rgb
        flat_coverage = np.zeros(len(centers), np.float32)
        flat_coverage[hits.ray] = 1.0
        edges = self._edges(hits, normal, flat_depth, shape)
        for offset in _EXTRA:
            points = centers[edges] + offset
            extra = self._cast(K, pose, points)
            # a fifth of the pixel's area each: one mip level sharper
            rgb, _ = self._shade(K, pose, points, extra, -1.0, lights)
            flat_color[edges[extra.ray]] += rgb
            flat_coverage[edges[extra.ray]] += 1.0
        flat_color[edges] /= len(_EXTRA) + 1
        flat_coverage[edges] /= len(_EXTRA) + 1
        depth[y0:y1, x0:x1] = flat_depth.reshape(shape)
        color[y0:y1, x0:x1] = (flat_color.clip(0, 255) + 0.5).astype(np.uint8).reshape(*shape, 3)
        coverage[y0:y1, x0:x1] = (flat_coverage * 255 + 0.5).astype(np.uint8).reshape(shape)
        if normal_map is not None:
            flat_normal = np.zeros((len(centers), 3), np.float32)
            flat_normal[hits.ray] = normal @ pose[:3, :3].T
            normal_map[y0:y1, x0:x1] = flat_normal.reshape(*shape, 3)
        return Rendered(color, depth, depth > 0, normal_map, coverage)

    def _cast(self, K: Array, pose: Array, xy: Array) -> _Hits:
        """Find the first point that is not see-through on the rays through pixels xy."""
        # unnormalised directions with z = 1 in the camera: the ray parameter is the z-depth
        local = np.concatenate(
            [(xy - K[:2, 2]) / [K[0, 0], K[1, 1]], np.ones((len(xy), 1))], axis=1
        )
        direction = local @ pose[:3, :3]
        eye = -pose[:3, :3].T @ pose[:3, 3]
        origin = np.broadcast_to(eye.astype(np.float32), direction.shape)
        found = self._first(np.ascontiguousarray(origin), direction)
        hits = self._exact(eye, direction, np.arange(len(xy)), found)
        if not self._cutoff.any():
            return hits
        kept = []
        for _ in range(_MAX_LAYERS):
            hidden = self._see_through(hits)
            kept.append(_Hits(*(values[~hidden] for values in hits)))
            ray, start = hits.ray[hidden], hits.depth[hidden]
            if not len(ray):
                break
            # step just past the surface; 4e-6 of the object is above float32 at this range
            origin = (eye + direction[ray] * (start + 4e-6)[:, None]).astype(np.float32)
            found = self._first(origin, direction[ray])
            hits = self._exact(eye, direction, ray, found)
        merged = [np.concatenate(values) for values in zip(*kept, strict=True)]
        return _Hits(*merged)

    def _first(self, origin: Array, direction: Array) -> Array:
        if not len(origin):
            return np.zeros(0, np.int32)
        found: Array = self._scene.run(origin, np.ascontiguousarray(direction, dtype=np.float32))
        return found

    def _exact(self, eye: Array, direction: Array, ray: Array, found: Array) -> _Hits:
        """Intersect rays with the planes of the triangles they hit, in float64."""
        hit = found >= 0
        ray, face = ray[hit], found[hit]
        d, normal, corners = direction[ray], self._plane[face], self._corners[face]
        slope = np.einsum("nc,nc->n", normal, d)
        depth = (self._plane_offset[face] - normal @ eye) / np.where(slope == 0, 1.0, slope)
        # edge-on triangles: barycentrics below are clipped, and depth follows from them
        point = eye + d * depth[:, None] - corners[:, 0]
        e1, e2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
        area = np.maximum(np.einsum("nc,nc->n", normal, normal), 1e-300)
        b1 = np.einsum("nc,nc->n", np.cross(point, e2), normal) / area
        b2 = np.einsum("nc,nc->n", np.cross(e1, point), normal) / area
        bary = np.stack([1.0 - b1 - b2, b1, b2], axis=1)
        outside = (bary.min(axis=1) < -1e-3) | (slope == 0)
        if outside.any():
            clipped = bary[outside].clip(0.0, 1.0)
            clipped /= np.maximum(clipped.sum(axis=1, keepdims=True), 1e-12)
            bary[outside] = clipped
            where = np.einsum("nk,nkc->nc", clipped, corners[outside]) - eye
            d_out = d[outside]
            along = np.einsum("nc,nc->n", where, d_out) / np.einsum("nc,nc->n", d_out, d_out)
            depth[outside] = along
        return _Hits(ray, face, bary.astype(np.float32), depth)

    def _see_through(self, hits: _Hits) -> Array:
        """Test the alpha policy of `data_prep.mesh.Primitive.cutoff`."""
        part = self._part[hits.face]
        hidden = np.zeros(len(part), bool)
        test = np.flatnonzero(self._cutoff[part] > 0)
        face, bary = hits.face[test], hits.bary[test]
        alpha = self._textures.bilinear(part[test], _mix(self._uv, face, bary), 0)[:, 3] / 255.0
        alpha *= self._factor[part[test], 3]
        if self._colors is not None:
            alpha *= _mix(self._colors, face, bary)[:, 3]
        hidden[test] = alpha < self._cutoff[part[test]]
        return hidden

    def _shade(
        self, K: Array, pose: Array, xy: Array, hits: _Hits, bias: float, lights: Lights
    ) -> tuple[Array, Array]:
        """Return (N, 3) colours in [0, 255] and (N, 3) world normals that face the camera."""
        face, bary, part = hits.face, hits.bary, self._part[hits.face]
        pixels = xy[hits.ray]
        local = (pixels - K[:2, 2]) / [K[0, 0], K[1, 1]]
        ray = np.concatenate([local, np.ones((len(local), 1))], axis=1).astype(np.float32)
        ray = ray @ pose[:3, :3].astype(np.float32)
        to_camera = -ray / np.linalg.norm(ray, axis=1, keepdims=True)
        normal = _mix(self._normals, face, bary)
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
        plane = self._plane[face].astype(np.float32)
        cosine = np.einsum("nc,nc->n", plane, to_camera)
        size = np.maximum(np.linalg.norm(plane, axis=1), 1e-30)
        # a smooth normal may point to the wrong side only with its triangle
        agree = np.einsum("nc,nc->n", plane, normal) * cosine
        normal[agree < 0] *= -1.0
        incline = np.maximum(np.abs(cosine) / size, 0.05)
        pixel = hits.depth / K[0, 0] / np.sqrt(incline)
        lod = np.log2(np.maximum(self._density[face] * pixel, 1e-6)) + bias
        texel = self._textures.sample(part, _mix(self._uv, face, bary), lod)
        albedo = texel[:, :3] * self._factor[part, :3]
        if self._colors is not None:
            albedo *= _mix(self._colors, face, bary)[:, :3]
        eye = (-pose[:3, :3].T @ pose[:3, 3]).astype(np.float32)
        points = eye + ray * hits.depth[:, None].astype(np.float32)
        return shade(albedo, normal, to_camera, points, lights), normal

    def _edges(self, hits: _Hits, normal: Array, depth: Array, shape: tuple[int, int]) -> Array:
        """Return the pixels whose neighbourhood is not one smooth surface of one material."""
        part = np.full(len(depth), -1)
        part[hits.ray] = self._part[hits.face]
        normals = np.zeros((len(depth), 3), np.float32)
        normals[hits.ray] = normal
        part, depth = part.reshape(shape), depth.reshape(shape)
        grid = normals.reshape(*shape, 3)
        edge = np.zeros(shape, bool)
        for axis in (0, 1):
            a = (slice(None),) * axis + (slice(1, None),)
            b = (slice(None),) * axis + (slice(None, -1),)
            turn = np.einsum("hwc,hwc->hw", grid[a], grid[b])
            step = (part[a] != part[b]) | (np.abs(depth[a] - depth[b]) > 0.02)
            step |= (turn < 0.9) & (part[a] >= 0)
            edge[a] |= step
            edge[b] |= step
        return np.flatnonzero(edge)

    def _texel_density(self) -> Array:
        """Return texels per object unit of each triangle: root of the ratio of areas."""
        uv = self._uv.astype(np.float64) * self._textures.texels_per_uv(self._part)[:, None]
        e1, e2 = uv[:, 1] - uv[:, 0], uv[:, 2] - uv[:, 0]
        texels = np.abs(e1[:, 0] * e2[:, 1] - e1[:, 1] * e2[:, 0])
        area = np.linalg.norm(self._plane, axis=1)
        out: Array = np.sqrt(texels / np.maximum(area, 1e-30)).astype(np.float32)
        return out


def _per_corner(mesh: Mesh, name: str, width: int) -> Array:
    """Return (F, 3, width) float32 corner values of a vertex attribute; ones where it is absent."""
    values = [(getattr(p, name), p.faces) for p in mesh.primitives]
    return np.concatenate(
        [
            np.ones((len(f), 3, width), np.float32) if v is None else v[f].astype(np.float32)
            for v, f in values
        ]
    )


def _mix(corner_values: Array, face: Array, bary: Array) -> Array:
    """Interpolate corner values at barycentrics."""
    at = corner_values[face]
    out: Array = at[:, 0] * bary[:, :1] + at[:, 1] * bary[:, 1:2] + at[:, 2] * bary[:, 2:]
    return out
