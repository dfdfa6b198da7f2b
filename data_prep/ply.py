"""PLY files, text or binary, to one part of a mesh.

Read here and not by trimesh 5.2, which drops colours stored by face or under other names, strips,
and all but the last texture, and cannot read binary files that mix triangles and quads.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.gltf_guard import local_bytes
from data_prep.limits import Budget
from data_prep.ply_tables import Element, parse_header, read_binary, read_text
from data_prep.primitives import Primitive, shifted_uv
from data_prep.textures import decode_texture
from equifeat.errors import MeshError

Array = NDArray[Any]
_UV_NAMES = (("texture_u", "texture_v"), ("u", "v"), ("s", "t"))
_COLOR_NAMES = (("red", "green", "blue", "alpha"), ("r", "g", "b", "a"))
_DIFFUSE = tuple(f"diffuse_{name}" for name in _COLOR_NAMES[0])


def read_ply(path: Path, data: bytes, budget: Budget) -> list[tuple[Array, Primitive]]:
    """Read a PLY file.

    Args:
        path: The PLY file.
        data: Its content.
        budget: Accounts for what it asks for.

    Returns:
        Vertices (V, 3) float64 of its part, and the rest as a primitive without vertices.

    Raises:
        MeshError: Not a PLY file, cut off, too large, without triangles, or a texture that leaves
            the folder or is missing.
    """
    match = re.match(rb"ply\s.*?\bend_header[ \t]*(\r\n|\n|\r)", data[:1_000_000], re.DOTALL)
    if match is None:
        raise MeshError(f"{path}: has no complete PLY header; it is truncated or not a PLY file")
    lines = match.group().decode("ascii", errors="replace").splitlines()
    kind, elements, images = parse_header(path, lines)
    found = {element.name: element for element in elements}
    if "tristrips" in found:
        raise MeshError(f"{path}: its triangles are strips; export it with a list of faces")
    if "face" not in found or found["face"].count == 0 or "vertex" not in found:
        raise MeshError(f"{path}: it holds points or lines only, and no triangles to render")
    budget.triangles(found["face"].count)
    budget.values(sum(e.count * len(e.properties) for e in elements))
    body = memoryview(data)[match.end() :]
    if kind == "ascii":
        read_text(path, body, elements, budget)
    else:
        read_binary(path, body, elements, "<" if kind == "binary_little_endian" else ">")
    budget.triangles(_surplus(path, found["face"]))
    return [_part(path, found["vertex"], found["face"], images, budget)]


def _corner_lists(path: Path, face: Element) -> tuple[Array, Array]:
    for name in ("vertex_indices", "vertex_index"):
        if name in face.lists:
            return face.lists[name]
    raise MeshError(f"{path}: its faces have no list 'vertex_indices'; it is damaged")


def _surplus(path: Path, face: Element) -> int:
    """Return how many triangles polygons have beyond one a face."""
    lengths = _corner_lists(path, face)[1]
    return int(np.maximum(lengths - 3, 0).sum())


def _part(
    path: Path, vertex: Element, face: Element, images: list[str], budget: Budget
) -> tuple[Array, Primitive]:
    if any(name not in vertex.columns for name in "xyz"):
        raise MeshError(f"{path}: its vertices have no x, y and z; it is damaged")
    vertices = np.stack([vertex.columns[name].astype(np.float64) for name in "xyz"], axis=1)
    flat, lengths = _corner_lists(path, face)
    flat = flat.astype(np.int64)
    fan, of_face = _fans(lengths)  # corners of the file that make triangles
    if not len(fan):
        raise MeshError(f"{path}: there are no visible triangles, its faces have too few corners")
    faces = flat[fan]
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise MeshError(
            f"{path}: a face uses vertex {int(faces.max())} of {len(vertices)}; it is damaged"
        )
    bad = int((~np.isfinite(vertices[np.unique(faces)])).any(axis=1).sum())
    if bad:
        raise MeshError(
            f"{path}: {bad} of {len(vertices)} vertices are NaN or infinite; repair the file in "
            "the program it came from"
        )
    normals = np.zeros((0, 3))
    if all(name in vertex.columns for name in ("nx", "ny", "nz")):
        normals = np.stack([vertex.columns[n].astype(np.float64) for n in ("nx", "ny", "nz")], 1)
    colors, uv = _colors(path, vertex), _vertex_uv(vertex)
    face_colors, face_uv = _colors(path, face), face.lists.get("texcoord")
    if (colors is None and face_colors is not None) or face_uv is not None:
        # stored by face or by corner: every corner becomes a vertex
        corners = faces.reshape(-1)
        vertices, normals = vertices[corners], normals[corners] if len(normals) else normals
        colors = colors[corners] if colors is not None else colors
        if colors is None and face_colors is not None:
            colors = face_colors[np.repeat(of_face, 3)]
        uv = uv[corners] if uv is not None else None
        if face_uv is not None:
            if (face_uv[1] != 2 * lengths).any():
                raise MeshError(f"{path}: 'texcoord' lists do not fit the corners; it is damaged")
            uv = face_uv[0].astype(np.float64).reshape(-1, 2)[fan.reshape(-1)]
        faces = np.arange(len(corners)).reshape(-1, 3)
    options: dict[str, Any] = {}
    if images and uv is not None:
        if len(images) > 1:
            raise MeshError(f"{path}: has {len(images)} textures; one can be read, merge them")
        texture = decode_texture(
            f"{path}: texture {images[0]!r:.80}", local_bytes(path, images[0], budget), budget
        )
        uv = shifted_uv(path, uv * [1.0, -1.0] + [0.0, 1.0], ("repeat", "repeat"))
        options = {"uv": uv, "texture": texture}
        if (texture[..., 3] < 255).any():
            options["alpha_mode"] = "BLEND"
    elif colors is not None:
        options["vertex_colors"] = colors
        if colors[:, 3].min() < 1.0:
            options["alpha_mode"] = "BLEND"
    return vertices, Primitive(np.zeros((0, 3)), faces.astype(np.int32), normals, **options)


def _fans(lengths: Array) -> tuple[Array, Array]:
    """Return (T, 3) positions in the list of corners, and (T,) the face of each triangle."""
    count = np.maximum(lengths - 2, 0)
    of_face = np.repeat(np.arange(len(lengths)), count)
    first = (np.cumsum(lengths) - lengths)[of_face]
    step = np.arange(len(of_face)) - (np.cumsum(count) - count)[of_face]
    return np.stack([first, first + step + 1, first + step + 2], axis=1), of_face


def _colors(path: Path, element: Element) -> Array | None:
    """Return (N, 4) float32 colours in [0, 1], or None."""
    for names in (*_COLOR_NAMES, _DIFFUSE):
        if all(name in element.columns for name in names[:3]):
            columns = [_unit(element.columns[n]) for n in names if n in element.columns]
            if len(columns) == 3:
                columns.append(np.ones(element.count))
            out: Array = np.stack(columns, axis=1).astype(np.float32)
            return out
    return None


def _unit(values: Array) -> Array:
    if values.dtype.kind in "ui":
        return np.clip(values / np.iinfo(values.dtype).max, 0.0, 1.0)
    values = np.nan_to_num(values.astype(np.float64))
    return np.clip(values / (255.0 if values.max(initial=0.0) > 1.0 else 1.0), 0.0, 1.0)


def _vertex_uv(vertex: Element) -> Array | None:
    for u, v in _UV_NAMES:
        if u in vertex.columns and v in vertex.columns:
            return np.stack([vertex.columns[c].astype(np.float64) for c in (u, v)], axis=1)
    return None
