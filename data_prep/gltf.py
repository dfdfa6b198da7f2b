"""glTF and GLB files to parts of a mesh, read here alone: no library decides what is dropped.

Carried out: Draco, meshopt, quantisation, sparse accessors, texture transforms and texture sets,
wrap modes, WebP and KTX2 textures, specular-glossiness, vertex colours, instancing, skins and
morph targets in the file's own pose, strips and fans. Left out on purpose: cameras, lights,
animations, and every texture but the base colour.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.gltf_accessors import AccessorReader, as_float
from data_prep.gltf_guard import Json, check_extensions, entry, read_container
from data_prep.gltf_materials import Material, MaterialReader, texture_coordinates
from data_prep.gltf_scene import Pose, Scene
from data_prep.limits import Budget
from data_prep.primitives import Primitive, srgb_from_linear
from equifeat.errors import MeshError

Array = NDArray[Any]
_TRIANGLE_MODES = (4, 5, 6)
_ATTRIBUTES: dict[str, tuple[int, ...]] = {
    "POSITION": (3,),
    "NORMAL": (3,),
    "COLOR_0": (3, 4),
    "TEXCOORD_": (2,),
}
_SKIN: dict[str, tuple[int, ...]] = {"JOINTS_": (4,), "WEIGHTS_": (4,)}


def read_gltf(path: Path, data: bytes, budget: Budget) -> list[tuple[Array, Primitive]]:
    """Read a glTF or GLB file.

    Args:
        path: The file, for its format, its folder and the messages.
        data: Its content.
        budget: Accounts for what it asks for.

    Returns:
        World vertices (V, 3) float64 of each part, and the rest as a primitive without vertices.

    Raises:
        MeshError: The file is damaged, unsafe, too large, empty, or needs what is not supported.
    """
    try:
        header, buffers = read_container(path, data, budget)
        check_extensions(path, header)
        return _Builder(path, header, buffers, budget).run()
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise MeshError(
            f"{path}: its glTF structure is damaged ({type(error).__name__}: {error}); "
            "export it again"
        ) from error


@dataclass(frozen=True)
class _Local:
    """A part in the coordinates of its mesh; all vertices are used and finite."""

    vertices: Array
    part: Primitive


class _Builder:
    def __init__(self, path: Path, header: Json, buffers: list[bytes], budget: Budget) -> None:
        self._path = path
        self._header = header
        self._budget = budget
        self._reader = AccessorReader(path, header, buffers, budget)
        self._materials = MaterialReader(path, header, self._reader, budget)
        self._meshes: dict[int, list[_Local]] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._other_modes = False

    def run(self) -> list[tuple[Array, Primitive]]:
        drawn = []
        for worlds, mesh, pose in Scene(
            self._path, self._header, self._reader, self._budget
        ).drawn():
            # what the header claims is refused before any of it is decoded
            parts, triangles = self._size(mesh)
            self._budget.nodes(len(worlds) * parts, "parts")
            self._budget.triangles(len(worlds) * triangles)
            drawn.append((worlds, mesh, pose))
        if not drawn:
            raise MeshError(f"{self._path}: its scene is empty, no node holds a mesh")
        out = []
        for worlds, mesh, pose in drawn:
            if pose is not None:
                local = self._mesh(mesh, pose)
            else:
                if mesh not in self._meshes:
                    self._meshes[mesh] = self._mesh(mesh, None)
                local = self._meshes[mesh]
            out += [_placed(item, world) for world in worlds for item in local]
        if not out and self._other_modes:
            raise MeshError(
                f"{self._path}: it holds points or lines only, and no triangles to render"
            )
        return out

    def _size(self, mesh: int) -> tuple[int, int]:
        """Return how many parts and triangles the header claims for a mesh."""
        if mesh not in self._sizes:
            parts = triangles = 0
            for source in entry(self._path, self._header, "meshes", mesh)["primitives"]:
                found = self._triangle_count(source)
                parts += found > 0
                triangles += found
            self._sizes[mesh] = (parts, triangles)
        return self._sizes[mesh]

    def _triangle_count(self, source: Json) -> int:
        mode, names = source.get("mode", 4), source["attributes"]
        if mode not in _TRIANGLE_MODES or "POSITION" not in names:
            return 0
        corners = self._reader.count(source.get("indices", names["POSITION"]))
        return corners // 3 if mode == 4 else max(corners - 2, 0)

    def _mesh(self, index: int, pose: Pose | None) -> list[_Local]:
        """Read a mesh, in the pose of a skin or of morph weights."""
        found = []
        for source in entry(self._path, self._header, "meshes", index)["primitives"]:
            if source.get("mode", 4) not in _TRIANGLE_MODES:
                self._other_modes = True
            elif self._triangle_count(source):
                found.append(self._primitive(f"m{index}", source, pose))
        return found

    def _primitive(self, name: str, source: Json, pose: Pose | None) -> _Local:
        material = self._materials.read(source.get("material"))
        attributes = self._attributes(source, material, pose is not None)
        faces, position = attributes.pop("_faces"), attributes["POSITION"]
        if int(faces.min()) < 0 or int(faces.max()) >= len(position):
            raise MeshError(
                f"{self._path}: a triangle uses vertex {int(faces.max())} of {len(position)}; "
                "the file is damaged"
            )
        if pose is not None:
            self._budget.values(16 * len(position))
            posed, turned = pose(source, attributes)
            attributes["POSITION"] = posed.astype(np.float32)
            attributes["NORMAL"] = np.zeros((0, 3)) if turned is None else turned
        faces, attributes = _compact(faces.astype(np.int32), attributes)
        position = np.asarray(attributes["POSITION"], np.float32)
        normal = attributes.get("NORMAL")
        bad = int((~np.isfinite(position)).any(axis=1).sum())
        if bad:
            raise MeshError(
                f"{self._path}: {bad} of {len(position)} vertices of part {name!r} are NaN or "
                "infinite; repair the file in the program it came from"
            )
        if normal is None or len(normal) != len(position):
            normal = np.zeros((0, 3), np.float32)
        part = Primitive(np.zeros((0, 3)), faces, normal, **material.options)
        uv = texture_coordinates(self._path, material, attributes)
        if uv is not None:
            part = replace(part, uv=uv, texture=material.texture)
        color = attributes.get("COLOR_0")
        if color is not None and len(color) == len(position):
            part = replace(part, vertex_colors=_colors(color))
        return _Local(position, part)

    def _attributes(self, source: Json, material: Material, skinned: bool) -> dict[str, Array]:
        """Read the attributes of a primitive that are used, and its triangles as "_faces"."""
        names = source["attributes"]
        wanted = {**_ATTRIBUTES, **_SKIN} if skinned else _ATTRIBUTES
        draco = source.get("extensions", {}).get("KHR_draco_mesh_compression")
        raw: dict[str, Array] = {}
        found: dict[str, Array] = {}
        if draco is not None:
            raw, faces = self._reader.draco(draco, self._triangle_count(source))
            found["_faces"] = faces.reshape(-1, 3)
        for name, index in names.items():
            columns = next((c for k, c in wanted.items() if name.startswith(k)), None)
            if columns is None or (name.startswith("TEXCOORD_") and name != material.uv_set):
                continue
            if name in raw:
                accessor = entry(self._path, self._header, "accessors", index)
                found[name] = as_float(raw[name], accessor.get("normalized", False) is True)
                if found[name].shape[1] not in columns:
                    raise MeshError(f"{self._path}: its Draco {name} is misshapen; it is damaged")
            else:
                found[name] = self._reader.read(index, columns)
        if "_faces" not in found:
            order = np.arange(len(found["POSITION"]))
            if "indices" in source:
                indices = self._reader.read(source["indices"], (1,))
                if indices.dtype.kind != "u":
                    raise MeshError(f"{self._path}: indices are {indices.dtype}; it is damaged")
                order = indices[:, 0].astype(np.int64)
            found["_faces"] = _triangles(self._path, order, source.get("mode", 4))
        return found


def _compact(faces: Array, attributes: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Drop vertices that no triangle uses: exporters share one buffer among many parts."""
    count = len(attributes["POSITION"])
    if faces.size * 8 < count:
        used, numbers = np.unique(faces, return_inverse=True)
        faces = numbers.reshape(-1, 3).astype(np.int32)
    else:
        mask = np.zeros(count, bool)
        mask[faces] = True
        used = np.flatnonzero(mask)
        if len(used) == count:
            return faces, attributes
        faces = (np.cumsum(mask) - 1)[faces].astype(np.int32)
    return faces, {k: v[used] for k, v in attributes.items() if len(v) == count}


def _placed(local: _Local, world: Array) -> tuple[Array, Primitive]:
    """Apply a world matrix to a part."""
    linear = world[:3, :3]
    vertices = local.vertices.astype(np.float64) @ linear.T + world[:3, 3]
    normals, faces = local.part.normals, local.part.faces
    if len(normals):
        # normals transform by the cofactor matrix, which exists for flat scales as well
        a, b, c = linear
        cofactor = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)])
        normals = normals.astype(np.float64) @ cofactor.T
    if np.linalg.det(linear) < 0:
        faces = np.ascontiguousarray(faces[:, ::-1])
    return vertices, replace(local.part, normals=normals, faces=faces)


def _colors(color: Array) -> Array:
    """Return linear vertex colours, three or four columns of any type, as sRGB RGBA."""
    values = np.clip(np.nan_to_num(as_float(color, True).astype(np.float64)), 0.0, 1.0)
    alpha = values[:, 3:] if values.shape[1] == 4 else np.ones((len(values), 1))
    return np.concatenate([srgb_from_linear(values[:, :3]), alpha], axis=1).astype(np.float32)


def _triangles(path: Path, order: Array, mode: int) -> Array:
    """Turn a list, strip or fan of vertex indices into (F, 3)."""
    if mode == 4:
        if len(order) % 3:
            raise MeshError(f"{path}: {len(order)} indices do not make triangles; it is damaged")
        return order.reshape(-1, 3)
    if mode == 6:
        return np.stack([np.full(len(order) - 2, order[0]), order[1:-1], order[2:]], axis=1)
    faces = np.stack([order[:-2], order[1:-1], order[2:]], axis=1)
    faces[1::2] = faces[1::2, ::-1]
    return faces
