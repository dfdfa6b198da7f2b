"""Messages between this project and the worker of the cycles renderer.

A message is a JSON header and raw arrays, each with its length before it. The worker reads this
file under another interpreter: the standard library and NumPy only.
"""

from __future__ import annotations

import json
import math
import struct
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_MAGIC = b"EQC1"
_DTYPES = ("<f4", "<f8", "<i4", "|u1")
_MAX_HEADER = 1 << 28


def write_message(stream: IO[bytes], header: dict[str, Any], arrays: dict[str, Array]) -> None:
    """Write a header and named arrays.

    Args:
        stream: An open binary stream.
        header: JSON values.
        arrays: float32, float64, int32 or uint8.
    """
    plain = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    table = [[name, a.dtype.str, list(a.shape)] for name, a in plain.items()]
    text = json.dumps({**header, "arrays": table}).encode()
    stream.write(_MAGIC + struct.pack("<I", len(text)) + text)
    for a in plain.values():
        stream.write(a.data.cast("B") if a.size else b"")
    stream.flush()


def read_message(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read what `write_message` wrote.

    Args:
        stream: An open binary stream.

    Returns:
        The header and the arrays.

    Raises:
        EOFError: The stream ended.
        ValueError: It holds something else.
    """
    start = _read(stream, 8)
    (length,) = struct.unpack("<I", start[4:])
    if start[:4] != _MAGIC or length > _MAX_HEADER:
        raise ValueError(f"not a message: {start[:4]!r}")
    header: dict[str, Any] = json.loads(_read(stream, length))
    arrays = {}
    for name, dtype, shape in header.pop("arrays"):
        if dtype not in _DTYPES or any(side < 0 for side in shape):
            raise ValueError(f"array {name!r} of type {dtype!r} and shape {shape}")
        kind = np.dtype(dtype)
        data = _read(stream, math.prod(shape) * kind.itemsize)
        arrays[name] = np.frombuffer(data, kind).reshape(shape)
    return header, arrays


def _read(stream: IO[bytes], count: int) -> bytearray:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise EOFError("the stream ended")
        done += got
    return data
