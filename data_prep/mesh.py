"""A mesh file to a `Mesh`: world transforms baked, longest side 1, centred at the origin.

The files are read by `data_prep.gltf`, `data_prep.obj` and `data_prep.ply`, which
trust nothing in them and drop nothing in silence.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.gltf import read_gltf
from data_prep.limits import Budget, MeshLimits
from data_prep.normals import corner_normals
from data_prep.obj import read_obj
from data_prep.ply import read_ply
from data_prep.primitives import Mesh, Primitive
from equifeat.errors import MeshError

__all__ = [
    "SUFFIXES",
    "Mesh",
    "MeshLimits",
    "Primitive",
    "load_mesh",
    "mesh_from_bytes",
    "normalized",
]

Array = NDArray[Any]

SUFFIXES = (".glb", ".gltf", ".obj", ".ply")
# A box side of fewer than this many float64 steps of its coordinates is rounding, not shape.
_RELATIVE_SIZE = 1e-12


def load_mesh(path: str | Path, limits: MeshLimits | None = None) -> Mesh:
    """Read a GLB, glTF, OBJ or PLY file.

    Args:
        path: The file. Everything it refers to must lie in its own folder or below.
        limits: What is too large; by default `MeshLimits`.

    Returns:
        The mesh: scene graph applied in float64, centred, longest bounding-box side 1.

    Raises:
        MeshError: One sentence that names the file, what is wrong with it and what to do.
    """
    path, limits = Path(path), limits or MeshLimits()
    suffix = path.suffix.lower()
    if not path.is_file():
        raise MeshError(f"{path}: no such mesh file")
    if suffix not in SUFFIXES:
        raise MeshError(f"{path}: {suffix or 'no suffix'} is not one of {', '.join(SUFFIXES)}")
    try:
        Budget(path, limits).file_bytes(path.stat().st_size)
        data = path.read_bytes()
    except OSError as error:
        raise MeshError(f"{path}: cannot be read ({error.strerror})") from error
    return mesh_from_bytes(path, data, limits)


def mesh_from_bytes(path: Path, data: bytes, limits: MeshLimits | None = None) -> Mesh:
    """Read a mesh from the bytes of a file.

    Args:
        path: Gives the name, the format, and the folder of what the bytes refer to.
        data: The file's content.
        limits: What is too large; by default `MeshLimits`.

    Returns:
        The mesh.

    Raises:
        MeshError: See `load_mesh`.
    """
    if not data:
        raise MeshError(f"{path}: the file is empty (0 bytes)")
    budget = Budget(path, limits or MeshLimits())
    try:
        budget.file_bytes(len(data))
        # damaged numbers overflow quietly here and are found as NaN or infinity afterwards
        with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
            parts = _READERS[path.suffix.lower()](path, data, budget)
            digest = hashlib.sha256(data).hexdigest()
            return normalized(path.stem, parts, where=str(path), file=path.name, sha256=digest)
    except MeshError as error:
        # names in a file may hold line breaks, terminal commands, or pages of text
        raise MeshError(_one_line(str(error), len(str(path)))) from error
    except MemoryError as error:
        raise MeshError(
            f"{path}: needs more memory than there is; simplify it or give more memory"
        ) from error


_READERS = {".glb": read_gltf, ".gltf": read_gltf, ".obj": read_obj, ".ply": read_ply}


def _one_line(message: str, longer: int) -> str:
    clean = "".join(c if c.isprintable() else " " for c in message)
    most = 600 + longer
    return clean if len(clean) <= most else f"{clean[:most]} …"


def normalized(
    name: str,
    parts: list[tuple[Array, Primitive]],
    where: str = "",
    file: str = "",
    sha256: str = "",
) -> Mesh:
    """Centre and scale parts given in file coordinates.

    Args:
        name: Name of the object.
        parts: For each primitive its (V, 3) float64 vertices; the primitive's own are replaced.
        where: What error messages call the object.
        file: File name to record.
        sha256: Hash to record.

    Returns:
        The mesh.

    Raises:
        MeshError: No visible triangles, vertices that are not finite, or an object without size.
    """
    where = where or name
    visible = [(v, p) for v, p in parts if len(p.faces) and not p.invisible]
    if not visible:
        why = "all of it is fully transparent" if parts else "its scene is empty"
        raise MeshError(f"{where}: there are no visible triangles, {why}")
    used = [v[np.unique(p.faces)] for v, p in visible]
    if not all(np.isfinite(points).all() for points in used):
        raise MeshError(f"{where}: a transform makes vertices NaN or infinite; repair the file")
    low = np.min([points.min(axis=0) for points in used], axis=0)
    high = np.max([points.max(axis=0) for points in used], axis=0)
    center, size = low + (high - low) / 2, float((high - low).max())
    if not np.isfinite(size) or size <= _RELATIVE_SIZE * float(np.abs([low, high]).max()):
        raise MeshError(f"{where}: its bounding box has no size (longest side {size:g})")
    out = []
    for vertices, part in visible:
        small = ((np.nan_to_num(vertices) - center) / size).astype(np.float32)
        out.append(_with_vertices(part, small))
    return Mesh(name, out, center, 1.0 / size, file, sha256)


def _with_vertices(part: Primitive, vertices: Array) -> Primitive:
    """Give a primitive its normalised vertices, and computed normals where the file has none."""
    length = np.linalg.norm(part.normals, axis=1) if len(part.normals) else np.zeros(1)
    if len(length) == len(vertices) and np.all(np.isfinite(length) & (length > 1e-6)):
        normals = (part.normals / length[:, None]).astype(np.float32)
        return replace(part, vertices=vertices, normals=normals)
    corners = part.faces.reshape(-1)
    return replace(
        part,
        vertices=vertices[corners],
        normals=corner_normals(vertices, part.faces),
        faces=np.arange(len(corners), dtype=np.int32).reshape(-1, 3),
        uv=None if part.uv is None else part.uv[corners],
        vertex_colors=None if part.vertex_colors is None else part.vertex_colors[corners],
    )
