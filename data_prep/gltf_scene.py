"""The scene graph of a glTF file: which mesh is drawn where, and in which pose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.gltf_accessors import AccessorReader
from data_prep.gltf_guard import Json
from equifeat.errors import MeshError

Array = NDArray[Any]
# (primitive, its attributes) -> posed positions and normals
Pose = Callable[[Json, dict[str, Array]], tuple[Array, Array | None]]

_MAX_INSTANCES = 20_000


class Scene:
    """World transforms of the default scene, in float64.

    Args:
        path: For messages.
        header: The glTF header.
        reader: Its accessors.
    """

    def __init__(self, path: Path, header: Json, reader: AccessorReader) -> None:
        self._path = path
        self._reader = reader
        self._header = header
        self._nodes = header.get("nodes", [])
        children = {c for n in self._nodes for c in n.get("children", [])}
        self._tops = [i for i in range(len(self._nodes)) if i not in children]
        self._world = self._walk(self._tops)
        self._shown = set(self._world)
        scenes = header.get("scenes")
        if scenes:
            self._shown = set(self._walk(scenes[header.get("scene", 0)].get("nodes", [])))

    def drawn(self) -> Iterator[tuple[Array, int, Pose | None]]:
        """Yield what is drawn.

        Yields:
            World matrix (4, 4), mesh number, and the pose of skins and morph targets or None.

        Raises:
            MeshError: Instances or joints that cannot be.
        """
        for index in sorted(self._shown):
            node = self._nodes[index]
            if "mesh" not in node:
                continue
            mesh = int(node["mesh"])
            weights = node.get("weights", self._header["meshes"][mesh].get("weights", []))
            joints = self._joints(int(node["skin"])) if "skin" in node else None
            pose: Pose | None = None
            if joints is not None or any(weights):
                pose = partial(self._posed, joints, [float(w) for w in weights])
            # the joints, not the node, place a skinned mesh (glTF 2.0, 3.7.3.3)
            world = np.eye(4) if joints is not None else self._world[index]
            for local in self._instances(node):
                yield world @ local, mesh, pose

    def _walk(self, tops: list[int]) -> dict[int, Array]:
        world: dict[int, Array] = {}
        stack = [(int(i), np.eye(4)) for i in tops]
        while stack:
            index, parent = stack.pop()
            if index in world or index < 0:
                raise MeshError(
                    f"{self._path}: node {index} has two parents or is its own; it is damaged"
                )
            world[index] = parent @ _matrix(self._nodes[index])
            stack += [(int(c), world[index]) for c in self._nodes[index].get("children", [])]
        return world

    def _instances(self, node: Json) -> list[Array]:
        """Return the transforms of EXT_mesh_gpu_instancing, or one identity."""
        extension = node.get("extensions", {}).get("EXT_mesh_gpu_instancing")
        if extension is None:
            return [np.eye(4)]
        found = {k: self._reader.read(int(i)) for k, i in extension["attributes"].items()}
        names = {"TRANSLATION": "translation", "ROTATION": "rotation", "SCALE": "scale"}
        used = {names[k]: v for k, v in found.items() if k in names}
        count = max((len(v) for v in used.values()), default=1)
        if count > _MAX_INSTANCES:
            raise MeshError(
                f"{self._path}: a mesh is instanced {count} times, more than {_MAX_INSTANCES}"
            )
        if any(len(v) != count for v in used.values()):
            raise MeshError(f"{self._path}: instance attributes differ in length; it is damaged")
        return [_matrix({k: v[i] for k, v in used.items()}) for i in range(count)]

    def _joints(self, skin: int) -> Array:
        """Return (J, 4, 4) world-from-mesh matrices of a skin in the file's own pose."""
        source = self._header["skins"][skin]
        joints = np.stack([self._world[int(j)] for j in source["joints"]])
        if "inverseBindMatrices" not in source:
            return joints
        inverse = self._reader.read(int(source["inverseBindMatrices"]))
        if len(inverse) < len(joints):
            raise MeshError(
                f"{self._path}: skin {skin} has {len(inverse)} bind matrices for {len(joints)} "
                "joints; the file is damaged"
            )
        # stored by columns
        bind = inverse[: len(joints)].reshape(-1, 4, 4).transpose(0, 2, 1)
        out: Array = joints @ bind
        return out

    def _posed(
        self,
        joints: Array | None,
        weights: list[float],
        primitive: Json,
        attributes: dict[str, Array],
    ) -> tuple[Array, Array | None]:
        """Apply morph weights, then the skin."""
        position = attributes["POSITION"].astype(np.float64)
        normal = attributes.get("NORMAL")
        for weight, target in zip(weights, primitive.get("targets", []), strict=False):
            if weight and "POSITION" in target:
                position = position + weight * self._reader.read(int(target["POSITION"]))
                normal = None  # computed from the morphed surface instead
        if joints is None or "JOINTS_0" not in attributes:
            return position, normal
        blend = np.zeros((len(position), 4, 4))
        total = np.zeros(len(position))
        for name, values in attributes.items():
            if not name.startswith("JOINTS_"):
                continue
            which = values.astype(np.int64)
            share = attributes[name.replace("JOINTS", "WEIGHTS")]
            if which.max(initial=0) >= len(joints):
                raise MeshError(f"{self._path}: joint {which.max()} of {len(joints)} is used")
            for k in range(which.shape[1]):
                blend += share[:, k, None, None] * joints[which[:, k]]
                total += share[:, k]
        blend /= np.where(total > 0, total, 1.0)[:, None, None]
        if normal is not None:
            normal = np.einsum("nij,nj->ni", blend[:, :3, :3], normal)
        return np.einsum("nij,nj->ni", blend[:, :3, :3], position) + blend[:, :3, 3], normal


def _matrix(node: Json) -> Array:
    """Return a node's local matrix: its own, or translation @ rotation @ scale."""
    if "matrix" in node:
        return np.asarray(node["matrix"], np.float64).reshape(4, 4).T
    x, y, z, w = np.asarray(node.get("rotation", [0.0, 0.0, 0.0, 1.0]), np.float64)
    length = np.sqrt(x * x + y * y + z * z + w * w)
    x, y, z, w = (q / (length or 1.0) for q in (x, y, z, w))
    out = np.eye(4)
    out[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    out[:3, :3] *= np.asarray(node.get("scale", [1.0, 1.0, 1.0]), np.float64)
    out[:3, 3] = node.get("translation", [0.0, 0.0, 0.0])
    return out
