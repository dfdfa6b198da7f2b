"""PLY files as tables: the header, and elements in text or binary, checked against the bytes."""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.limits import Budget
from equifeat.errors import MeshError

Array = NDArray[Any]
_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"},
    **{"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"},
}


@dataclass
class Element:
    """A table of the file: scalar columns (N,), lists as (values, lengths (N,))."""

    name: str
    count: int
    properties: list[tuple[str, str, str | None]] = field(default_factory=list)
    columns: dict[str, Array] = field(default_factory=dict)
    lists: dict[str, tuple[Array, Array]] = field(default_factory=dict)


def parse_header(path: Path, lines: list[str]) -> tuple[str, list[Element], list[str]]:
    """Read a header.

    Args:
        path: For the message.
        lines: From "ply" to "end_header".

    Returns:
        The format, the elements without their data, and names of textures.

    Raises:
        MeshError: A line cannot be read.
    """
    kind, elements, images = "", list[Element](), list[str]()
    try:
        for line in lines[1:-1]:
            words = line.split()
            if line.lower().startswith("comment") and len(words) > 2:
                if words[1].lower() == "texturefile":
                    images.append(line.split(None, 2)[2].strip())
            elif words[:1] == ["format"]:
                kind = words[1]
            elif words[:1] == ["element"]:
                elements.append(Element(words[1], int(words[2])))
            elif words[:2] == ["property", "list"]:
                elements[-1].properties.append((words[4], _TYPES[words[3]], _TYPES[words[2]]))
            elif words[:1] == ["property"]:
                elements[-1].properties.append((words[2], _TYPES[words[1]], None))
    except (LookupError, ValueError) as error:
        raise MeshError(f"{path}: the header line {line!r:.80} cannot be read") from error
    names = [element.name for element in elements]
    if kind not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise MeshError(f"{path}: the PLY format {kind!r:.40} does not exist; the file is damaged")
    if len(set(names)) < len(names) or any(e.count < 0 for e in elements):
        raise MeshError(f"{path}: its elements {', '.join(names):.80} cannot be; it is damaged")
    return kind, elements, images


def _lost(path: Path, element: Element, found: int) -> MeshError:
    return MeshError(
        f"{path}: declares {element.count} elements of kind {element.name} and holds {found}; it "
        "is truncated or damaged"
    )


def read_text(path: Path, body: memoryview, elements: list[Element], budget: Budget) -> None:
    """Fill the elements from text.

    Args:
        path: For the message.
        body: What follows the header.
        elements: From the header; their columns and lists are set.
        budget: Accounts for the numbers of the text.

    Raises:
        MeshError: The data ends too early or makes no sense.
    """
    budget.values(len(body) // 2)
    try:
        with warnings.catch_warnings():
            # NumPy says so when it stops before the end of the text
            warnings.simplefilter("error", DeprecationWarning)
            values = np.fromstring(bytes(body).decode("ascii"), dtype=np.float64, sep=" ")
    except (ValueError, DeprecationWarning) as error:
        raise MeshError(f"{path}: holds something that is no number; it is damaged") from error
    at = 0
    for element in elements:
        rows, width = element.count, len(element.properties)
        if not any(kind for *_, kind in element.properties):
            if at + rows * width > len(values):
                raise _lost(path, element, (len(values) - at) // max(width, 1))
            table = values[at : at + rows * width].reshape(rows, width)
            for column, (name, dtype, _) in enumerate(element.properties):
                element.columns[name] = _cast(path, table[:, column], dtype)
            at += rows * width
            continue
        starts: dict[str, list[int]] = {name: [] for name, *_ in element.properties}
        for number in range(rows):
            for name, _, kind in element.properties:
                if at >= len(values):
                    raise _lost(path, element, number)
                length = 1
                if kind is not None:
                    length = int(values[at]) if 0 <= values[at] <= len(values) else len(values)
                    at += 1
                if at + length > len(values):
                    raise _lost(path, element, number)
                starts[name] += (at, length)
                at += length
        for name, dtype, kind in element.properties:
            spans = np.array(starts[name], np.int64).reshape(-1, 2)
            joined = _cast(path, values[_ranges(spans)], dtype)
            if kind is None:
                element.columns[name] = joined
            else:
                element.lists[name] = (joined, spans[:, 1])


def _ranges(spans: Array) -> Array:
    """Return the indices of all spans (start, length), one after another."""
    lengths = spans[:, 1]
    ends = np.cumsum(lengths)
    shift = np.repeat(spans[:, 0] - ends + lengths, lengths)
    out: Array = np.arange(len(shift)) + shift
    return out


def _cast(path: Path, values: Array, dtype: str) -> Array:
    """Give numbers read from text their declared type, which they must fit."""
    if dtype[0] == "f":
        return values
    info = np.iinfo(dtype)
    if not ((values >= info.min) & (values <= info.max)).all():
        raise MeshError(f"{path}: a number does not fit its type {info.dtype}; it is damaged")
    return values.astype(dtype)


def read_binary(path: Path, body: memoryview, elements: list[Element], order: str) -> None:
    """Fill the elements from binary.

    Args:
        path: For the message.
        body: What follows the header.
        elements: From the header; their columns and lists are set.
        order: "<" or ">", the byte order.

    Raises:
        MeshError: The data ends too early or makes no sense.
    """
    at = 0
    for element in elements:
        if not element.properties:
            continue
        fields = [(f"{n}#{i}", k, t) for i, (n, t, k) in enumerate(element.properties)]
        # as if every list were as long as the first: nearly always true, and read at once
        lengths = _first_lengths(path, body, at, element, order)
        kinds = []
        for (name, kind, dtype), length in zip(fields, lengths, strict=True):
            if kind is not None:
                kinds.append((f"{name}#n", f"{order}{kind}"))
            kinds.append((name, f"{order}{dtype}", (length,)) if kind else (name, order + dtype))  # type: ignore[arg-type]
        table_type = np.dtype(kinds)
        size = element.count * table_type.itemsize
        if at + size <= len(body):
            table = np.frombuffer(body, table_type, element.count, at)
            if all(
                (table[f"{n}#n"] == length).all()
                for (n, kind, _), length in zip(fields, lengths, strict=True)
                if kind
            ):
                for (name, kind, _), length in zip(fields, lengths, strict=True):
                    plain = name.rpartition("#")[0]
                    if kind is None:
                        element.columns[plain] = table[name]
                    else:
                        repeated = np.full(element.count, length, np.int64)
                        element.lists[plain] = (table[name].reshape(-1), repeated)
                at += size
                continue
        elif not any(kind for _, kind, _ in fields):
            raise _lost(path, element, (len(body) - at) // table_type.itemsize)
        at = _read_rows(path, body, at, element, order)


def _first_lengths(
    path: Path, body: memoryview, at: int, element: Element, order: str
) -> list[int]:
    """Return the lengths of the lists of the first row, 1 for scalars."""
    lengths = []
    for _, dtype, kind in element.properties:
        length = 1
        if kind is not None and element.count:
            length, at = _list_length(path, body, at, element, order, kind)
        lengths.append(length)
        at += length * int(dtype[1])
    return lengths


def _list_length(
    path: Path, body: memoryview, at: int, element: Element, order: str, kind: str
) -> tuple[int, int]:
    end = at + int(kind[1])
    if end > len(body):
        raise _lost(path, element, 0)
    length = int(np.frombuffer(body, order + kind, 1, at)[0]) if kind[0] != "f" else -1
    if not 0 <= length <= len(body) - end:
        raise MeshError(f"{path}: a list of {length} numbers in {element.name}; it is damaged")
    return length, end


_CODES = {"i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "f4": "f", "f8": "d"}


def _read_rows(path: Path, body: memoryview, at: int, element: Element, order: str) -> int:
    """Read an element row by row, because its lists differ in length; return where it ends."""
    starts: list[list[tuple[int, int]]] = [[] for _ in element.properties]
    plan = [
        (struct.Struct(order + _CODES[kind]) if kind else None, int(dtype[1]), found)
        for (_, dtype, kind), found in zip(element.properties, starts, strict=True)
    ]
    for number in range(element.count):
        for counter, size, found in plan:
            length = 1
            if counter is not None:
                if at + counter.size > len(body):
                    raise _lost(path, element, number)
                length = int(counter.unpack_from(body, at)[0])
                at += counter.size
            if length < 0 or at + length * size > len(body):
                raise _lost(path, element, number)
            found.append((at, length))
            at += length * size
    for (name, dtype, kind), found in zip(element.properties, starts, strict=True):
        spans = np.array(found, np.int64).reshape(-1, 2)
        size = int(dtype[1])
        raw = np.frombuffer(body, np.uint8)
        index = _ranges(spans * [1, size])
        values = raw[index].view(order + dtype)
        if kind is None:
            element.columns[name] = values
        else:
            element.lists[name] = (values, spans[:, 1])
    return at
