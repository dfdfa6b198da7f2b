"""Read the points of a PLY file; equifeat.data needs no mesh library for that."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import ViewsError

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


def read_points(file: Path) -> Float[Tensor, "p 3"]:
    """Read x, y, z of the vertices of a PLY file, ASCII or binary.

    Args:
        file: The file; its first element is "vertex", without lists.

    Returns:
        (P, 3) float64 points; what else a vertex has is skipped.

    Raises:
        ViewsError: There is no such file, or it is no such PLY file.
    """
    if not file.is_file():
        raise ViewsError(f"{file}: no such point cloud; get the sequence again")
    if (size := file.stat().st_size) > _MAX_BYTES:
        raise ViewsError(f"{file}: {size} bytes are more than {_MAX_BYTES}; thin the points out")
    data = file.read_bytes()
    header, mark, body = data[:_MAX_HEADER].partition(b"end_header")
    if not data.startswith(b"ply") or not mark:
        _refuse(file, "it has no PLY header")
    start = len(header) + len(mark) + (2 if body[:2] == b"\r\n" else 1)
    order, count, fields = _layout(header.decode("ascii", "replace").splitlines(), file)
    dtype = np.dtype([(name, order + kind) for name, kind in fields])
    if order:
        if len(data) - start < count * dtype.itemsize:
            _refuse(file, f"it ends before its {count} points")
        rows = np.frombuffer(data, dtype, count, start)
        xyz = np.stack([rows[axis].astype(np.float64) for axis in "xyz"], axis=1)
    else:
        columns = [[name for name, _ in fields].index(axis) for axis in "xyz"]
        xyz = _ascii(data[start:], count, columns, file)
    if not np.isfinite(xyz).all():
        _refuse(file, "a point is not a number")
    return torch.from_numpy(xyz)


def _layout(lines: list[str], file: Path) -> tuple[str, int, list[tuple[str, str]]]:
    """Byte order, number of vertices, and names and types of their properties."""
    order, count, fields, element = None, -1, [], ""
    for words in (line.split() for line in lines[1:]):
        if words[:1] == ["format"] and len(words) == 3:
            order = _ORDERS.get(words[1])
        elif words[:1] == ["element"] and len(words) == 3:
            if not element and words[1] != "vertex":
                _refuse(file, f"its first element is {words[1]!r}, not vertex")
            element = words[1]
            if element == "vertex" and words[2].isdecimal() and len(words[2]) < 12:
                count = int(words[2])
        elif words[:1] == ["property"] and element == "vertex":
            if len(words) != 3 or words[1] not in _TYPES:
                _refuse(file, f"a vertex has the property {' '.join(words[1:])!r}")
            fields.append((words[2], _TYPES[words[1]]))
    names = [name for name, _ in fields]
    if order is None or count < 0 or not {"x", "y", "z"} <= set(names):
        _refuse(file, "format, number of vertices or x, y, z are missing")
    if len(set(names)) != len(names):
        _refuse(file, "two properties have one name")
    return order, count, fields


def _ascii(body: bytes, count: int, columns: list[int], file: Path) -> Any:
    # Every line has at least two bytes, so a count that lies is known before memory is asked for.
    if count * 2 > len(body) + 1:
        _refuse(file, f"it ends before its {count} points")
    if count == 0:
        return np.zeros((0, 3))
    try:
        rows = np.loadtxt(io.BytesIO(body), usecols=columns, max_rows=count, ndmin=2)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        _refuse(file, str(error), error)
    if len(rows) != count:
        _refuse(file, f"it ends before its {count} points")
    return rows


def _refuse(file: Path, why: str, error: Exception | None = None) -> NoReturn:
    raise ViewsError(
        f"{file}: not a PLY file of points ({why}); get the point cloud again"
    ) from error
