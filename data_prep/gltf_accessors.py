"""glTF accessors as arrays: strides, sparse values, normalised integers, meshopt and Draco."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.gltf_guard import Json, entry, whole
from data_prep.limits import Budget
from equifeat.errors import MeshError

Array = NDArray[Any]

_TYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_INDICES = {k: _TYPES[k] for k in (5121, 5123, 5125)}
_COLUMNS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
_MAX_STRIDE = 2**16


class AccessorReader:
    """Reads accessors of one file.

    Args:
        path: For messages.
        header: The glTF header.
        buffers: From `data_prep.gltf_guard.read_container`.
        budget: Accounts for every number before it is decoded.
    """

    def __init__(self, path: Path, header: Json, buffers: list[bytes], budget: Budget) -> None:
        self._path = path
        self._header = header
        self._buffers = [memoryview(buffer) for buffer in buffers]
        self._budget = budget
        self._views: dict[int, memoryview] = {}
        self._arrays: dict[int, Array] = {}

    def count(self, index: Any) -> int:
        """Return how many elements an accessor claims to have.

        Args:
            index: What refers to it.

        Returns:
            The count.

        Raises:
            MeshError: There is no such accessor, or its count cannot be.
        """
        accessor = entry(self._path, self._header, "accessors", index)
        return whole(self._path, accessor["count"], f"the count of accessor {index}")

    def read(self, index: Any, columns: tuple[int, ...] = (1, 2, 3, 4, 16)) -> Array:
        """Return an accessor as (count, columns); read once, so never write into it.

        Args:
            index: What refers to it.
            columns: How many numbers an element may have.

        Returns:
            Integers for plain integer accessors, float32 for floats and normalised integers.

        Raises:
            MeshError: Its count or its views do not fit the bytes that are there.
        """
        accessor, count = entry(self._path, self._header, "accessors", index), self.count(index)
        index = int(index)
        if index not in self._arrays:
            self._arrays[index] = self._read(index, accessor, count)
        found = self._arrays[index]
        if found.shape[1] not in columns:
            raise MeshError(
                f"{self._path}: accessor {index} has {found.shape[1]} numbers an element, not "
                f"{' or '.join(map(str, columns))}; the file is damaged"
            )
        return found

    def _read(self, index: int, accessor: Json, count: int) -> Array:
        columns = _COLUMNS[accessor["type"]]
        dtype = np.dtype(_TYPES[accessor["componentType"]])
        if "bufferView" in accessor:
            start = self._whole(accessor, "byteOffset", 0)
            values = self._strided(index, accessor["bufferView"], start, dtype, count, columns)
        elif "sparse" in accessor:
            self._budget.values(count * columns)
            values = np.zeros((count, columns), dtype)
        else:
            raise MeshError(
                f"{self._path}: accessor {index} has no data; the decoder it needs did not run"
            )
        if "sparse" in accessor:
            values = self._with_sparse(index, accessor["sparse"], values, dtype, columns)
        return as_float(values, accessor.get("normalized", False) is True)

    def view(self, index: Any) -> memoryview:
        """Return the bytes of a buffer view, decompressed.

        Args:
            index: What refers to it.

        Returns:
            The bytes.

        Raises:
            MeshError: The view leaves its buffer.
        """
        view = entry(self._path, self._header, "bufferViews", index)
        packed = view.get("extensions", {}).get("EXT_meshopt_compression")
        if packed is None:
            return self._slice(index, view)
        if index not in self._views:
            self._views[index] = self._meshopt(index, packed)
        return self._views[index]

    def draco(self, extension: Json, triangles: int) -> tuple[dict[str, Array], Array]:
        """Decode a Draco primitive.

        Args:
            extension: The primitive's KHR_draco_mesh_compression object.
            triangles: How many the header claims, which was accounted for.

        Returns:
            Attributes by glTF name as stored, and (F, 3) faces.

        Raises:
            MeshError: The data is damaged.
        """
        import DracoPy

        try:
            decoded = DracoPy.decode(bytes(self.view(extension["bufferView"])))
        except MeshError:
            raise
        except Exception as error:  # DracoPy has no common base class
            raise MeshError(f"{self._path}: its Draco data is damaged ({error})") from error
        faces = np.asarray(getattr(decoded, "faces", np.zeros((0, 3))))
        if len(faces) > triangles:
            raise MeshError(
                f"{self._path}: its Draco data holds {len(faces)} triangles where the header "
                f"claims {triangles}; the file is damaged"
            )
        stored = {a["unique_id"]: np.asarray(a["data"]) for a in decoded.attributes}
        missing = [n for n, i in extension["attributes"].items() if i not in stored]
        if missing or not len(faces):
            what = ", ".join(missing) or "triangles"
            raise MeshError(f"{self._path}: its Draco data lacks {what}; the file is damaged")
        found = {n: stored[i] for n, i in extension["attributes"].items()}
        self._budget.values(sum(values.size for values in found.values()))
        return {n: values.reshape(len(values), -1) for n, values in found.items()}, faces

    def _whole(self, source: Json, name: str, default: int | None = None) -> int:
        value = source[name] if default is None else source.get(name, default)
        return whole(self._path, value, name)

    def _slice(self, index: int, view: Json) -> memoryview:
        start, length = self._whole(view, "byteOffset", 0), self._whole(view, "byteLength")
        number = self._whole(view, "buffer")
        if number >= len(self._buffers):
            raise MeshError(f"{self._path}: buffer view {index} is of buffer {number}, not there")
        buffer = self._buffers[number]
        if start + length > len(buffer):
            raise MeshError(
                f"{self._path}: buffer view {index} ends at byte {start + length} of "
                f"{len(buffer)}; the file is truncated or damaged"
            )
        return buffer[start : start + length]

    def _strided(
        self, index: int, view: Any, start: int, dtype: np.dtype[Any], count: int, columns: int
    ) -> Array:
        data = self.view(view)
        packed = dtype.itemsize * columns
        source = entry(self._path, self._header, "bufferViews", view)
        stride = self._whole(source, "byteStride", 0) or packed
        end = start + (count - 1) * stride + packed if count else start
        if not packed <= stride <= _MAX_STRIDE or end > len(data):
            raise MeshError(
                f"{self._path}: accessor {index} claims {count} elements up to byte {end}, but "
                f"there are {len(data)}; the file is damaged"
            )
        self._budget.values(count * columns)
        return np.ndarray(
            (count, columns), dtype, data, offset=start, strides=(stride, dtype.itemsize)
        ).copy()

    def _with_sparse(
        self, index: int, sparse: Json, values: Array, dtype: np.dtype[Any], columns: int
    ) -> Array:
        count, where, what = self._whole(sparse, "count"), sparse["indices"], sparse["values"]
        kind = np.dtype(_INDICES[where["componentType"]])
        start = self._whole(where, "byteOffset", 0)
        rows = self._strided(index, where["bufferView"], start, kind, count, 1)[:, 0]
        if count and int(rows.max()) >= len(values):
            raise MeshError(f"{self._path}: accessor {index} has sparse indices beyond its count")
        start = self._whole(what, "byteOffset", 0)
        values[rows] = self._strided(index, what["bufferView"], start, dtype, count, columns)
        return values

    def _meshopt(self, index: int, packed: Json) -> memoryview:
        """Decode an EXT_meshopt_compression view."""
        import meshoptimizer

        data = self._slice(index, packed)
        count, stride = self._whole(packed, "count"), self._whole(packed, "byteStride")
        if count == 0:
            raise MeshError(f"{self._path}: buffer view {index} claims no elements")
        mode, filtered = packed["mode"], packed.get("filter", "NONE")
        # the C library trusts these numbers, so they are checked here
        sizes = {"NONE": (), "OCTAHEDRAL": (4, 8), "QUATERNION": (8,), "EXPONENTIAL": ()}[filtered]
        wrong_filter = bool(sizes) and stride not in sizes
        if mode == "ATTRIBUTES":
            wrong = stride % 4 != 0 or not 4 <= stride <= 256 or wrong_filter
        else:
            wrong = stride not in (2, 4) or filtered != "NONE"
            wrong = wrong or mode not in ("TRIANGLES", "INDICES")
            wrong = wrong or (mode == "TRIANGLES" and count % 3 != 0)
        if wrong:
            raise MeshError(
                f"{self._path}: meshopt view {index} ({mode}, {filtered}) cannot have stride "
                f"{stride} and count {count}; the file is damaged"
            )
        # decoded as numbers of four bytes, so this is what it allocates
        self._budget.values(count * max(stride, 4) // 4)
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
        out = memoryview(np.ascontiguousarray(raw).tobytes())
        if len(out) != count * stride:
            raise MeshError(
                f"{self._path}: its meshopt data decodes to {len(out)} bytes, "
                f"not {count * stride}; the file is damaged"
            )
        return out


def as_float(values: Array, normalized: bool) -> Array:
    """Turn normalised integers to [-1, 1] or [0, 1]; floats are kept, as float32.

    Args:
        values: As stored.
        normalized: The accessor's flag.

    Returns:
        Integers unchanged unless normalised.
    """
    if values.dtype.kind == "f":
        return values.astype(np.float32, copy=False)
    if not normalized:
        return values
    return np.maximum(values / np.iinfo(values.dtype).max, -1.0).astype(np.float32)
