"""What trimesh read, as primitives: world transforms in float64, textures, colours, alpha."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from data_prep.gltf import MaterialNotes
from data_prep.primitives import Primitive
from equifeat.errors import MeshError

Array = NDArray[Any]
_MAX_TEXTURE_PIXELS = 16384 * 8192


def scene_parts(
    path: Path, scene: trimesh.Scene, notes: list[MaterialNotes]
) -> list[tuple[Array, Primitive]]:
    """Walk a scene: one primitive for each node with triangles.

    Args:
        path: For messages.
        scene: What trimesh read.
        notes: Materials of a glTF file; empty for other formats.

    Returns:
        World vertices (V, 3) float64 and the rest as a primitive without vertices.

    Raises:
        MeshError: Damaged, without triangles, or of a kind that cannot be drawn.
    """
    parts: list[tuple[Array, Primitive]] = []
    textures: dict[int, Array] = {}
    points_only = False
    for node in scene.graph.nodes_geometry:
        world, name = scene.graph[node]
        geometry = scene.geometry[name]
        if not isinstance(geometry, trimesh.Trimesh) or len(geometry.faces) == 0:
            points_only = True
            continue
        faces = np.asarray(geometry.faces, dtype=np.int64)
        count = len(geometry.vertices)
        if faces.min() < 0 or faces.max() >= count:
            raise MeshError(
                f"{path}: part {name!r} uses vertex {int(faces.max())} but has {count}; "
                "the file is damaged"
            )
        vertices = np.asarray(geometry.vertices, dtype=np.float64)
        bad = int((~np.isfinite(vertices[np.unique(faces)])).any(axis=1).sum())
        if bad:
            raise MeshError(
                f"{path}: {bad} of {count} vertices of part {name!r} are NaN or infinite; "
                "repair the file in the program it came from"
            )
        vertices = np.nan_to_num(vertices) @ world[:3, :3].T + world[:3, 3]
        normals = np.zeros((0, 3))
        if "vertex_normals" in geometry._cache.cache:
            # normals transform by the cofactor matrix, which exists for flat scales as well
            normals = np.asarray(geometry.vertex_normals, np.float64) @ _cofactor(world[:3, :3]).T
        if np.linalg.det(world[:3, :3]) < 0:
            faces = faces[:, ::-1]
        part = _primitive(path, geometry.visual, faces.astype(np.int32), normals, notes, textures)
        parts.append((vertices, part))
    if not parts and points_only:
        raise MeshError(f"{path}: it holds points or lines only, and no triangles to render")
    return parts


def _cofactor(matrix: Array) -> Array:
    """Return det(M) M^-T without dividing."""
    a, b, c = matrix
    return np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)])


def _primitive(
    path: Path,
    visual: Any,
    faces: Array,
    normals: Array,
    notes: list[MaterialNotes],
    textures: dict[int, Array],
) -> Primitive:
    """Read a trimesh visual: texture, factor, vertex colours, alpha."""
    material = getattr(visual, "material", None)
    options: dict[str, Any] = {}
    image, color, is_gltf = None, None, bool(notes)
    if isinstance(material, trimesh.visual.material.PBRMaterial):
        image, color = material.baseColorTexture, material.baseColorFactor
        options["alpha_mode"] = material.alphaMode or "OPAQUE"
        options["alpha_cutoff"] = 0.5 if material.alphaCutoff is None else material.alphaCutoff
        options["double_sided"] = bool(material.doubleSided)
    elif isinstance(material, trimesh.visual.material.SimpleMaterial):
        image = material.image
        # without a statement of its own trimesh takes 40 % grey
        if "kd" in material.kwargs:
            opacity = float(material.kwargs.get("d", ["1"])[0])
            color = np.append(np.asarray(material.kwargs["kd"], np.float64)[:3], opacity)
    rgba = np.ones(4) if color is None else _unit_rgba(color)
    note = notes[int(material.name)] if is_gltf and material is not None else None
    if note is not None:
        options["wrap"] = note.wrap
        rgba = np.asarray(note.base_color)
        rgba = np.append(srgb_from_linear(rgba[:3]), rgba[3])
    uv = getattr(visual, "uv", None)
    if image is not None and uv is not None and len(uv):
        uv = np.asarray(uv, dtype=np.float64)[:, :2] * [1.0, -1.0] + [0.0, 1.0]
        if not np.isfinite(uv).all():
            raise MeshError(f"{path}: texture coordinates are NaN or infinite; repair the file")
        wrap = options.get("wrap", ("repeat", "repeat"))
        # small numbers keep float32 exact; a whole even shift changes nothing when repeating
        shift = np.where([w == "clamp" for w in wrap], 0.0, 2.0 * np.floor(uv.min(axis=0) / 2.0))
        options["uv"] = (uv - shift).astype(np.float32)
        options["texture"] = _texture(path, image, textures)
    colors = getattr(visual, "vertex_attributes", {}).get("color")
    if colors is None and visual.kind == "vertex":
        colors = visual.vertex_colors
    if colors is not None and len(colors):
        colors = np.asarray([_unit_rgba(colors)]).reshape(-1, 4)
        if is_gltf:
            colors = np.concatenate([srgb_from_linear(colors[:, :3]), colors[:, 3:]], axis=1)
        options["vertex_colors"] = np.clip(colors, 0.0, 1.0).astype(np.float32)
    elif visual.kind == "face":
        raise MeshError(f"{path}: colours are stored by face; convert them to vertex colours")
    if not is_gltf and (rgba[3] < 1.0 or _has_alpha(options.get("texture"))):
        options["alpha_mode"] = "BLEND"
    r, g, b, a = (float(x) for x in np.clip(rgba, 0.0, 1.0))
    return Primitive(np.zeros((0, 3)), faces, normals, base_color=(r, g, b, a), **options)


def _unit_rgba(color: Any) -> Array:
    """Return colours as float64 RGBA in [0, 1], whatever integer or float type they have."""
    values = np.asarray(color)
    if values.dtype.kind in "ui":
        values = values / np.iinfo(values.dtype).max
    values = values.astype(np.float64)
    if values.shape[-1] == 3:
        values = np.concatenate([values, np.ones_like(values[..., :1])], axis=-1)
    out: Array = np.nan_to_num(values)
    return out


def _has_alpha(texture: Array | None) -> bool:
    return texture is not None and bool((texture[..., 3] < 255).any())


def _texture(path: Path, image: Image.Image, cache: dict[int, Array]) -> Array:
    """Decode a Pillow image to (H, W, 4) uint8 once."""
    if id(image) not in cache:
        if image.width * image.height > _MAX_TEXTURE_PIXELS:
            raise MeshError(f"{path}: a texture of {image.width}x{image.height} is too large")
        try:
            cache[id(image)] = np.asarray(image.convert("RGBA"))
        except (OSError, ValueError, SyntaxError) as error:
            raise MeshError(f"{path}: a texture cannot be decoded ({error})") from error
    return cache[id(image)]


def srgb_from_linear(linear: Array) -> Array:
    """Encode linear light as sRGB (IEC 61966-2-1).

    Args:
        linear: Values, clipped to [0, 1].

    Returns:
        The same shape, in [0, 1].
    """
    x = np.clip(linear, 0.0, 1.0)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
