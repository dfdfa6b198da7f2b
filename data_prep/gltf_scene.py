"""The scene graph of a glTF file: which mesh is drawn where, and in which pose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.gltf_accessors import AccessorReader
from data_prep.gltf_guard import Json, entry, whole
from data_prep.limits import Budget
from equifeat.errors import MeshError

Array = NDArray[Any]
# (primitive, its attributes) -> posed positions and normals
Pose = Callable[[Json, dict[str, Array]], tuple[Array, Array | None]]

# Skinned vertices at a time: each needs a 4x4 matrix.
_CHUNK = 65_536


class Scene:
    """World transforms of the default scene, in float64.

    Args:
        path: For messages.
        header: The glTF header.
        reader: Its accessors.
        budget: Accounts for nodes and instances.
    """

    def __init__(self, path: Path, header: Json, reader: AccessorReader, budget: Budget) -> None:
        self._path = path
        self._reader = reader
        self._header = header
        self._budget = budget
        nodes = header.get("nodes", [])
        if not isinstance(nodes, list):
            raise MeshError(f"{path}: its nodes are no list; the file is damaged")
        budget.nodes(len(nodes))
        children = {c for n in nodes for c in n.get("children", [])}
        self._world = self._walk([i for i in range(len(nodes)) if i not in children])
        self._shown = set(self._world)
        self._bound: dict[int, Array] = {}
        if header.get("scenes"):
            # each node is visited once, so shared children or cycles cannot multiply
            scene = entry(path, header, "scenes", header.get("scene", 0))
            self._shown = set(self._walk(scene.get("nodes", [])))

    def drawn(self) -> Iterator[tuple[list[Array], int, Pose | None]]:
        """Yield what is drawn.

        Yields:
            World matrices (4, 4), one an instance; mesh number; the pose of skins and morph
            targets or None.

        Raises:
            MeshError: Instances or joints that cannot be.
        """
        for index in sorted(self._shown):
            node = entry(self._path, self._header, "nodes", index)
            if "mesh" not in node:
                continue
            mesh = whole(self._path, node["mesh"], "a reference to meshes")
            source = entry(self._path, self._header, "meshes", mesh)
            given = node.get("weights") or source.get("weights") or []
            self._budget.values(len(given))
            weights = [float(w) for w in given]
            joints = self._joints(node["skin"]) if "skin" in node else None
            pose: Pose | None = None
            if joints is not None or any(weights):
                pose = partial(self._posed, joints, weights)
            # the joints, not the node, place a skinned mesh (glTF 2.0, 3.7.3.3)
            world = np.eye(4) if joints is not None else self._world[index]
            yield [world @ local for local in self._instances(node)], mesh, pose

    def _walk(self, tops: list[Any]) -> dict[int, Array]:
        world: dict[int, Array] = {}
        stack = [(i, np.eye(4)) for i in tops]
        while stack:
            index, parent = stack.pop()
            node = entry(self._path, self._header, "nodes", index)
            if index in world:
                raise MeshError(
                    f"{self._path}: node {index} has two parents or is its own; it is damaged"
                )
            world[int(index)] = parent @ _matrix(node)
            stack += [(c, world[index]) for c in node.get("children", [])]
        return world

    def _instances(self, node: Json) -> list[Array]:
        """Return the transforms of EXT_mesh_gpu_instancing, or one identity."""
        extension = node.get("extensions", {}).get("EXT_mesh_gpu_instancing")
        if extension is None:
            return [np.eye(4)]
        names = {"TRANSLATION": ("translation", 3), "ROTATION": ("rotation", 4)}
        names["SCALE"] = ("scale", 3)
        given = {k: i for k, i in extension["attributes"].items() if k in names}
        count = max((self._reader.count(i) for i in given.values()), default=1)
        self._budget.nodes(count, "instances")
        used = {names[k][0]: self._reader.read(i, (names[k][1],)) for k, i in given.items()}
        if any(len(v) != count for v in used.values()):
            raise MeshError(f"{self._path}: instance attributes differ in length; it is damaged")
        return [_matrix({k: v[i] for k, v in used.items()}) for i in range(count)]

    def _joints(self, skin: Any) -> Array:
        """Return (J, 4, 4) world-from-mesh matrices of a skin in the file's own pose."""
        source = entry(self._path, self._header, "skins", skin)
        if skin in self._bound:
            return self._bound[skin]
        numbers = [whole(self._path, j, "a joint") for j in source["joints"]]
        lost = [j for j in numbers if j not in self._world]
        if lost or not numbers:
            raise MeshError(f"{self._path}: skin {skin} lacks its joints {lost}; it is damaged")
        joints = np.stack([self._world[j] for j in numbers])
        self._bound[skin] = joints
        if "inverseBindMatrices" not in source:
            return joints
        inverse = self._reader.read(source["inverseBindMatrices"], (16,))
        if len(inverse) < len(joints):
            raise MeshError(
                f"{self._path}: skin {skin} has {len(inverse)} bind matrices for {len(joints)} "
                "joints; the file is damaged"
            )
        # stored by columns
        bind = inverse[: len(joints)].reshape(-1, 4, 4).transpose(0, 2, 1)
        self._bound[skin] = joints @ bind
        return self._bound[skin]

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
        if normal is not None and len(normal) != len(position):
            normal = None
        for weight, target in zip(weights, primitive.get("targets", []), strict=False):
            if weight and "POSITION" in target:
                moved = self._reader.read(target["POSITION"], (3,))
                self._check_length(moved, position, "morph target")
                position = position + weight * moved
                normal = None  # computed from the morphed surface instead
        if joints is None or "JOINTS_0" not in attributes:
            return position, normal
        which, share = self._influences(joints, position, attributes)
        moved, turned = np.empty_like(position), np.empty((len(position), 3))
        for start in range(0, len(position), _CHUNK):
            rows = slice(start, start + _CHUNK)
            blend = np.zeros((len(position[rows]), 4, 4))
            for k in range(which.shape[1]):
                blend += share[rows, k, None, None] * joints[which[rows, k]]
            moved[rows] = np.einsum("nij,nj->ni", blend[:, :3, :3], position[rows])
            moved[rows] += blend[:, :3, 3]
            if normal is not None:
                turned[rows] = np.einsum("nij,nj->ni", blend[:, :3, :3], normal[rows])
        return moved, turned if normal is not None else None

    def _influences(
        self, joints: Array, position: Array, attributes: dict[str, Array]
    ) -> tuple[Array, Array]:
        """Return joint numbers and weights that add to 1, (V, K) each."""
        numbers, weights = [], []
        for name, values in attributes.items():
            if name.startswith("JOINTS_"):
                share = attributes[name.replace("JOINTS", "WEIGHTS")]
                self._check_length(values, position, name)
                self._check_length(share, values, name)
                numbers.append(values.astype(np.int64))
                weights.append(share.astype(np.float64))
        which, share = np.concatenate(numbers, axis=1), np.concatenate(weights, axis=1)
        if which.min(initial=0) < 0 or which.max(initial=0) >= len(joints):
            raise MeshError(f"{self._path}: joint {which.max()} of {len(joints)} is used")
        total = share.sum(axis=1, keepdims=True)
        return which, share / np.where(total > 0, total, 1.0)

    def _check_length(self, values: Array, like: Array, what: str) -> None:
        if len(values) != len(like) or values.shape[1] not in (like.shape[1], 4):
            raise MeshError(
                f"{self._path}: {what} has {len(values)} elements for {len(like)} vertices; "
                "the file is damaged"
            )


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
