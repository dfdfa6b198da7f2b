"""Read the triangles of a PLY file; equifeat.data needs no mesh library for that."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from equifeat.errors import EvalDataError

_MAX_BYTES = 2**30
_MAX_HEADER = 64 * 1024
_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}
_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}
_INDICES = ("vertex_indices", "vertex_index")


class Triangles(NamedTuple):
    """A surface.

    Attributes:
        vertices: (V, 3) float64, in the file's unit.
        faces: (F, 3) int64 rows of vertices.
    """

    vertices: Float[Tensor, "v 3"]
    faces: Int[Tensor, "f 3"]


class _Element(NamedTuple):
    name: str
    rows: int
    # name of a property, type of its length ("" for a single value), type of its values
    properties: list[tuple[str, str, str]]


def read_triangles(file: Path) -> Triangles:
    """Read a PLY file of triangles, ASCII or binary, as BOP and most scanners write it.

    Args:
        file: The file: an element "vertex", then an element "face" whose lists all have one
            length: 3 corners, and perhaps 6 texture coordinates.

    Returns:
        Vertices and faces; what else there is, colours and texture, is skipped.

    Raises:
        EvalDataError: There is no such file, or it is no such PLY file.
    """
    if not file.is_file():
        raise EvalDataError(f"{file}: no such model; get the models of the data set again.")
    if (size := file.stat().st_size) > _MAX_BYTES:
        raise EvalDataError(f"{file}: {size} bytes are more than {_MAX_BYTES}; simplify the model.")
    data = file.read_bytes()
    header, mark, body = data[:_MAX_HEADER].partition(b"end_header")
    if not data.startswith(b"ply") or not mark:
        _refuse(file, "it has no PLY header")
    start = len(header) + len(mark) + (2 if body[:2] == b"\r\n" else 1)
    order, elements = _elements(header.decode("ascii", "replace").splitlines(), file)
    if [e.name for e in elements[:2]] != ["vertex", "face"]:
        _refuse(file, "its first two elements are not vertex and face")
    vertex, face = elements[:2]
    names = [name for name, _, _ in vertex.properties]
    if not {"x", "y", "z"} <= set(names) or any(length for _, length, _ in vertex.properties):
        _refuse(file, "x, y or z are missing, or a vertex has lists")
    lists = [
        i for i, (name, length, _) in enumerate(face.properties) if length and name in _INDICES
    ]
    if not lists:
        _refuse(file, "its faces have no vertex_indices")
    rows = data[start:]
    if order:
        table, rest = _binary(rows, vertex, order, {}, file)
        xyz = np.stack([table[f"p{names.index(axis)}"] for axis in "xyz"], axis=1)
        sizes = {i: 3 if i in lists else 6 for i, p in enumerate(face.properties) if p[1]}
        table, _ = _binary(rest, face, order, sizes, file)
        for i, expected in sizes.items():
            if (table[f"n{i}"] != expected).any():
                _refuse(file, f"a face's {face.properties[i][0]} has not {expected} values")
        corners = table[f"p{lists[0]}"]
    else:
        xyz, rest = _ascii(rows, vertex.rows, [names.index(a) for a in "xyz"], file)
        # what stands before the list is of one value each; the list starts with its length
        at = lists[0]
        if any(length for _, length, _ in face.properties[:at]):
            _refuse(file, "vertex_indices is not the first list of a face")
        table, _ = _ascii(rest, face.rows, list(range(at, at + 4)), file)
        if (table[:, 0] != 3).any():
            _refuse(file, "a face has not 3 corners; triangulate the model")
        corners = table[:, 1:]
    faces = np.asarray(corners, np.float64).astype(np.int64)
    xyz = np.asarray(xyz, np.float64)
    if not np.isfinite(xyz).all():
        _refuse(file, "a vertex is not a number")
    if faces.size and (faces.min() < 0 or faces.max() >= len(xyz)):
        _refuse(file, f"a face names a vertex beyond its {len(xyz)}")
    if not len(xyz) or not faces.size:
        _refuse(file, "it has no triangles")
    return Triangles(torch.from_numpy(xyz.copy()), torch.from_numpy(faces.reshape(-1, 3)))


def _elements(lines: list[str], file: Path) -> tuple[str, list[_Element]]:
    order, elements = None, []
    for words in (line.split() for line in lines[1:]):
        if words[:1] == ["format"] and len(words) == 3:
            order = _ORDERS.get(words[1])
        elif words[:1] == ["element"]:
            if len(words) != 3 or not words[2].isdecimal() or len(words[2]) > 9:
                _refuse(file, f"the header's line {' '.join(words)[:80]!r} counts nothing")
            elements.append(_Element(words[1], int(words[2]), []))
        elif words[:1] == ["property"] and elements:
            many = words[1:2] == ["list"]
            kinds = words[2:4] if many else words[1:2]
            if len(words) != (5 if many else 3) or not set(kinds) <= set(_TYPES):
                _refuse(file, f"the header's line {' '.join(words)[:80]!r} is no property")
            length = _TYPES[kinds[0]] if many else ""
            elements[-1].properties.append((words[-1], length, _TYPES[kinds[-1]]))
    if order is None:
        _refuse(file, "its format is unknown")
    return order, elements


def _binary(
    data: bytes, element: _Element, order: str, sizes: dict[int, int], file: Path
) -> tuple[Any, bytes]:
    """Rows of one element, and what follows them."""
    fields: list[Any] = []
    for i, (_, length, kind) in enumerate(element.properties):
        if length:
            fields += [(f"n{i}", order + length), (f"p{i}", order + kind, (sizes[i],))]
        else:
            fields.append((f"p{i}", order + kind))
    dtype = np.dtype(fields)
    if len(data) < element.rows * dtype.itemsize:
        _refuse(file, f"it ends before its {element.rows} of {element.name}")
    rows = np.frombuffer(data, dtype, element.rows)
    return rows, data[element.rows * dtype.itemsize :]


def _ascii(body: bytes, count: int, columns: list[int], file: Path) -> tuple[Any, bytes]:
    # Every line has at least two bytes, so a count that lies is known before memory is asked for.
    if count * 2 > len(body) + 1:
        _refuse(file, f"it ends before its {count} rows")
    stream = io.BytesIO(body)
    if count == 0:
        return np.zeros((0, len(columns))), body
    lines = [line for line, _ in zip(stream, range(count), strict=False)]
    try:
        rows = np.loadtxt(lines, usecols=columns, ndmin=2)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        _refuse(file, " ".join(str(error).split())[:200], error)
    if len(rows) != count:
        _refuse(file, f"it ends before its {count} rows")
    return rows, body[sum(map(len, lines)) :]


def _refuse(file: Path, why: str, error: Exception | None = None) -> NoReturn:
    raise EvalDataError(
        f"{file}: not a PLY file of triangles ({why}); get the model again, or export it anew."
    ) from error
