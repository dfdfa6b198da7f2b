"""Rasterising with pyrender on EGL, on a GPU or on Mesa's software driver.

What pyrender does otherwise is corrected here: no multisampling (its depth would be that of a
sub-pixel sample) but a picture of three times the size, whose middle samples give depth and whose
mean gives colour; no node transforms, vertices
are baked; near and far planes tight around the object; one EGL context a process; and shaders that
light and cut like the ray caster. OSMesa is not used: it leaks gigabytes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import sys
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.mesh import Mesh, Primitive
from data_prep.renderers import Rendered
from data_prep.renderers.lights import FIXED_LIGHT, Lights
from data_prep.renderers.window import projected_window
from equifeat.errors import RenderError

Array = NDArray[Any]

# Odd, so that one sample of each pixel is its centre. Three also refines the 1/256 px grid that GL
# rounds vertices to: an edge along a column of pixel centres is otherwise off by a whole line.
_SAMPLES = 3
_WRAPS = {"repeat": 10497, "mirror": 33648, "clamp": 33071}
_WHITE = np.full((1, 1, 4), 255, dtype=np.uint8)


@functools.cache
def unavailable() -> str:
    """Return why pyrender cannot draw here, or an empty string."""
    if "OpenGL.GL" in sys.modules and os.environ.get("PYOPENGL_PLATFORM") != "egl":
        return "OpenGL was imported before with another platform than EGL"
    try:
        _context()
    except ImportError as error:
        if "pyrender" in str(error):
            return 'pyrender is not installed: pip install "equifeat[render]"'
        return f"no EGL library ({error})"
    except Exception as error:  # GL libraries raise anything, AssertionError and ctypes included
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        return f"no EGL device can be opened ({reason})"
    return ""


def device() -> str:
    """Return GL_RENDERER."""
    return str(_context().device)


@functools.cache
def _context() -> Any:
    """Open EGL once a process and make pyrender's renderer in it."""
    os.environ["PYOPENGL_PLATFORM"] = "egl"
    # Mesa's software driver brings an LLVM. Triton's, loaded after it when torch compiles or timm
    # is imported, would crash the process; the other way round both work.
    with contextlib.suppress(ImportError):
        importlib.import_module("triton")
    if not hasattr(np, "infty"):
        np.infty = np.inf  # type: ignore[attr-defined]  # noqa: NPY201 for pyrender 0.1.45
    with warnings.catch_warnings():
        # PyOpenGL 3.1.0 and pyrender date from before NumPy 2 and Python 3.12
        warnings.simplefilter("ignore")
        from data_prep.renderers.pyrender_gl import Context

        return Context()


class PyrenderRenderer:
    """Draws one mesh with OpenGL.

    Args:
        mesh: The mesh.
    """

    name = "pyrender"

    def __init__(self, mesh: Mesh) -> None:
        problem = unavailable()
        if problem:
            raise RenderError(f"pyrender does not work here: {problem}; use --renderer embree")
        import pyrender

        self._context = _context()
        self.device = str(self._context.device)
        self.details: dict[str, Any] = {}
        self.version = importlib.metadata.version("pyrender")
        self._vertices = mesh.vertices.astype(np.float64)
        self._scene = pyrender.Scene(bg_color=[0.0, 0.0, 0.0, 0.0])
        textures: dict[Any, Any] = {}
        primitives = [_primitive(p, textures) for p in mesh.primitives]
        self._scene.add(pyrender.Mesh(primitives))
        camera = pyrender.IntrinsicsCamera(1.0, 1.0, 0.0, 0.0)
        self._camera = self._scene.add(camera)

    def close(self) -> None:
        """Free the mesh's buffers and textures; the context stays open for the next mesh."""
        self._context.free()

    def render(
        self,
        K: Array,
        cam_from_world: Array,
        size_hw: tuple[int, int],
        normals: bool = False,
        lights: Lights = FIXED_LIGHT,
    ) -> Rendered:
        """See `data_prep.renderers.Renderer`."""
        K, pose = np.asarray(K, np.float64), np.asarray(cam_from_world, np.float64)
        color = np.zeros((*size_hw, 4), np.uint8)
        depth = np.zeros(size_hw, np.float32)
        normal_map = np.zeros((*size_hw, 3), np.float32) if normals else None
        x0, y0, x1, y1 = projected_window(self._vertices, K, pose, size_hw)
        if x1 <= x0 or y1 <= y0:
            return _rendered(color, depth, normal_map)
        near, far = self._planes(pose)
        world_from_gl = np.linalg.inv(pose) @ np.diag([1.0, -1.0, -1.0, 1.0])
        self._scene.set_pose(self._camera, world_from_gl)
        camera = self._camera.camera
        camera.fx, camera.fy = K[0, 0] * _SAMPLES, K[1, 1] * _SAMPLES
        camera.cx, camera.cy = (K[0, 2] - x0) * _SAMPLES, (K[1, 2] - y0) * _SAMPLES
        camera.znear, camera.zfar = near, far
        inside = (slice(y0, y1), slice(x0, x1))
        big_hw = ((y1 - y0) * _SAMPLES, (x1 - x0) * _SAMPLES)
        pixels, buffer = self._context.draw(self._scene, big_hw, lights)
        color[inside] = _box_filter(pixels)
        # the middle one of the samples is the pixel's centre
        buffer = buffer[_SAMPLES // 2 :: _SAMPLES, _SAMPLES // 2 :: _SAMPLES].astype(np.float64)
        solid = buffer < 1.0
        z = near * far / (far - buffer * (far - near))
        depth[inside] = np.where(solid, z, 0.0)
        if normal_map is not None:
            pixels, _ = self._context.draw(self._scene, big_hw, None)
            middle = pixels[_SAMPLES // 2 :: _SAMPLES, _SAMPLES // 2 :: _SAMPLES, :3]
            encoded = middle.astype(np.float32) / 127.5 - 1.0
            length = np.linalg.norm(encoded, axis=2, keepdims=True)
            normal_map[inside] = np.where(solid[..., None], encoded / length.clip(1e-6), 0.0)
        return _rendered(color, depth, normal_map)

    def _planes(self, pose: Array) -> tuple[float, float]:
        """Return near and far just around the object: 24 bits then resolve 1e-7 of it."""
        z = self._vertices @ pose[2, :3] + pose[2, 3]
        near = max(float(z.min()) - 1e-3, 1e-2)
        return near, max(float(z.max()) + 1e-3, near + 1e-2)


def _rendered(rgba: Array, depth: Array, normals: Array | None) -> Rendered:
    rgb, coverage = np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3])
    return Rendered(rgb, depth, depth > 0, normals, coverage)


def _box_filter(samples: Array) -> Array:
    """Average blocks of samples to pixels."""
    h, w = samples.shape[0] // _SAMPLES, samples.shape[1] // _SAMPLES
    total = np.zeros((h, w, 4), np.uint16)
    for i in range(_SAMPLES):
        for j in range(_SAMPLES):
            total += samples[i::_SAMPLES, j::_SAMPLES]
    out: Array = ((total + _SAMPLES**2 // 2) // _SAMPLES**2).astype(np.uint8)
    return out


def _primitive(part: Primitive, textures: dict[Any, Any]) -> Any:
    """Make a pyrender primitive with all four attributes, so that one shader serves all."""
    import pyrender

    count = len(part.vertices)
    has_texture = part.texture is not None and part.uv is not None
    uv = part.uv if part.uv is not None else np.zeros((count, 2), np.float32)
    colors = part.vertex_colors
    key = (id(part.texture), part.wrap) if has_texture else None
    if key not in textures:
        textures[key] = pyrender.Texture(
            source=part.texture if has_texture else _WHITE,
            source_channels="RGBA",
            sampler=pyrender.Sampler(wrapS=_WRAPS[part.wrap[0]], wrapT=_WRAPS[part.wrap[1]]),
        )
    # OPAQUE for pyrender, which would blend and sort; the shader cuts instead
    material = pyrender.MetallicRoughnessMaterial(
        baseColorTexture=textures[key], baseColorFactor=part.base_color, alphaMode="OPAQUE"
    )
    primitive = pyrender.Primitive(
        positions=part.vertices,
        normals=part.normals,
        texcoord_0=uv * [1.0, -1.0] + [0.0, 1.0],
        color_0=colors if colors is not None else np.ones((count, 4), np.float32),
        indices=part.faces,
        material=material,
        mode=4,
    )
    primitive.cutoff = part.cutoff if part.cuts else 0.0
    return primitive
