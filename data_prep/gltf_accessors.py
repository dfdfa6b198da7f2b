"""glTF accessors as arrays: strides, sparse values, normalised integers, meshopt and Draco."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.gltf_guard import Json
from equifeat.errors import MeshError

Array = NDArray[Any]

_TYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_COLUMNS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
_MAX_COUNT = 200_000_000


class AccessorReader:
    """Reads accessors of one file.

    Args:
        path: For messages.
        header: The glTF header.
        buffers: From :func:`data_prep.gltf_guard.read_container`.
    """

    def __init__(self, path: Path, header: Json, buffers: list[bytes]) -> None:
        self._path = path
        self._header = header
        self._buffers = buffers
        self._decoded: dict[int, bytes] = {}

    def read(self, index: int) -> Array:
        """Return an accessor as (count, columns).

        Args:
            index: Its number.

        Returns:
            Integers for plain integer accessors, float64 for floats and normalised integers.

        Raises:
            MeshError: Its count or its views do not fit the bytes that are there.
        """
        accessor = self._header["accessors"][index]
        count, columns = int(accessor["count"]), _COLUMNS[accessor["type"]]
        dtype = np.dtype(_TYPES[accessor["componentType"]])
        if not 0 <= count <= _MAX_COUNT:
            raise MeshError(f"{self._path}: accessor {index} claims {count} elements")
        if "bufferView" in accessor:
            start = int(accessor.get("byteOffset", 0))
            values = self._strided(index, accessor["bufferView"], start, dtype, count, columns)
        elif "sparse" in accessor:
            values = np.zeros((count, columns), dtype)
        else:
            raise MeshError(
                f"{self._path}: accessor {index} has no data; the decoder it needs did not run"
            )
        if "sparse" in accessor:
            values = self._with_sparse(index, accessor["sparse"], values, dtype, columns)
        return as_float(values, bool(accessor.get("normalized", False)))

    def view(self, index: int) -> bytes:
        """Return the bytes of a buffer view, decompressed.

        Args:
            index: Its number.

        Returns:
            The bytes.

        Raises:
            MeshError: The view leaves its buffer.
        """
        view = self._header["bufferViews"][index]
        packed = view.get("extensions", {}).get("EXT_meshopt_compression")
        if packed is None:
            return self._slice(index, view)
        if index not in self._decoded:
            self._decoded[index] = self._meshopt(index, packed)
        return self._decoded[index]

    def draco(self, extension: Json) -> tuple[dict[str, Array], Array]:
        """Decode a Draco primitive.

        Args:
            extension: The primitive's KHR_draco_mesh_compression object.

        Returns:
            Attributes by glTF name as stored, and (F, 3) faces.

        Raises:
            MeshError: The data is damaged.
        """
        import DracoPy

        try:
            decoded = DracoPy.decode(self.view(int(extension["bufferView"])))
        except Exception as error:  # DracoPy has no common base class
            raise MeshError(f"{self._path}: its Draco data is damaged ({error})") from error
        stored = {a["unique_id"]: np.asarray(a["data"]) for a in decoded.attributes}
        missing = [n for n, i in extension["attributes"].items() if i not in stored]
        if missing or not len(getattr(decoded, "faces", ())):
            what = ", ".join(missing) or "triangles"
            raise MeshError(f"{self._path}: its Draco data lacks {what}; the file is damaged")
        return {n: stored[i] for n, i in extension["attributes"].items()}, np.asarray(decoded.faces)

    def _slice(self, index: int, view: Json) -> bytes:
        start, length = int(view.get("byteOffset", 0)), int(view["byteLength"])
        buffer = self._buffers[int(view["buffer"])]
        if start < 0 or length < 0 or start + length > len(buffer):
            raise MeshError(
                f"{self._path}: buffer view {index} ends at byte {start + length} of "
                f"{len(buffer)}; the file is truncated or damaged"
            )
        return buffer[start : start + length]

    def _strided(
        self, index: int, view: int, start: int, dtype: np.dtype[Any], count: int, columns: int
    ) -> Array:
        data = self.view(view)
        packed = dtype.itemsize * columns
        stride = int(self._header["bufferViews"][view].get("byteStride", 0)) or packed
        end = start + (count - 1) * stride + packed if count else start
        if start < 0 or stride < packed or end > len(data):
            raise MeshError(
                f"{self._path}: accessor {index} claims {count} elements up to byte {end}, but "
                f"there are {len(data)}; the file is damaged"
            )
        return np.ndarray(
            (count, columns), dtype, data, offset=start, strides=(stride, dtype.itemsize)
        ).copy()

    def _with_sparse(
        self, index: int, sparse: Json, values: Array, dtype: np.dtype[Any], columns: int
    ) -> Array:
        count, where, what = int(sparse["count"]), sparse["indices"], sparse["values"]
        rows = self._strided(
            index,
            where["bufferView"],
            int(where.get("byteOffset", 0)),
            np.dtype(_TYPES[where["componentType"]]),
            count,
            1,
        )[:, 0]
        if count and int(rows.max()) >= len(values):
            raise MeshError(f"{self._path}: accessor {index} has sparse indices beyond its count")
        start = int(what.get("byteOffset", 0))
        values[rows] = self._strided(index, what["bufferView"], start, dtype, count, columns)
        return values

    def _meshopt(self, index: int, packed: Json) -> bytes:
        """Decode an EXT_meshopt_compression view."""
        import meshoptimizer

        data = self._slice(index, packed)
        count, stride = int(packed["count"]), int(packed["byteStride"])
        if not 0 < count <= _MAX_COUNT:
            raise MeshError(f"{self._path}: buffer view {index} claims {count} elements")
        mode, filtered = packed["mode"], packed.get("filter", "NONE")
        # the C library trusts these numbers, so they are checked here
        sizes = {"NONE": (), "OCTAHEDRAL": (4, 8), "QUATERNION": (8,), "EXPONENTIAL": ()}[filtered]
        wrong_filter = bool(sizes) and stride not in sizes
        if mode == "ATTRIBUTES":
            wrong = stride % 4 != 0 or not 4 <= stride <= 256 or wrong_filter
        else:
            wrong = stride not in (2, 4) or (mode == "TRIANGLES" and count % 3 != 0)
        if wrong:
            raise MeshError(
                f"{self._path}: meshopt view {index} ({mode}, {filtered}) cannot have stride "
                f"{stride} and count {count}; the file is damaged"
            )
        try:
            if mode == "ATTRIBUTES":
                # no dtype argument: with one, the package allocates one item a vertex
                raw = meshoptimizer.decode_vertex_buffer(count, stride, data)
            elif mode == "TRIANGLES":
                raw = meshoptimizer.decode_index_buffer(count, 4, data).astype(f"<u{stride}")
            else:
                raw = meshoptimizer.decode_index_sequence(count, 4, data).astype(f"<u{stride}")
            filters = {
                "OCTAHEDRAL": meshoptimizer.decode_filter_oct,
                "QUATERNION": meshoptimizer.decode_filter_quat,
                "EXPONENTIAL": meshoptimizer.decode_filter_exp,
            }
            if filtered in filters:
                raw = filters[filtered](np.ascontiguousarray(raw), count, stride)
        except (RuntimeError, ValueError) as error:
            raise MeshError(f"{self._path}: its meshopt data is damaged ({error})") from error
        out = np.ascontiguousarray(raw).tobytes()
        if len(out) != count * stride:
            raise MeshError(
                f"{self._path}: its meshopt data decodes to {len(out)} bytes, "
                f"not {count * stride}; the file is damaged"
            )
        return out


def as_float(values: Array, normalized: bool) -> Array:
    """Turn normalised integers to [-1, 1] or [0, 1] and floats to float64.

    Args:
        values: As stored.
        normalized: The accessor's flag.

    Returns:
        Integers unchanged unless normalised.
    """
    if values.dtype.kind == "f":
        return values.astype(np.float64)
    if not normalized:
        return values
    return np.maximum(values / np.iinfo(values.dtype).max, -1.0)
