"""How one view is kept in a packed set: cropped to what is not empty, without any loss.

Outside the window (x0, y0, x1, y1) colour, depth and mask are 0, so cutting them off loses nothing
and leaves a fifth of the pixels to decode.
"""

from __future__ import annotations

import io
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from equifeat.errors import ImageError, PackError, import_extra

Color = Literal["webp", "png"]
_WEBP_MAX_SIDE = 16383
# 9 costs 1 ms a view and is decoded as fast as 1.
_ZSTD_LEVEL = 9


class Pictures(NamedTuple):
    """The pixels of a view, whole or within its window.

    Attributes:
        color: (h, w, 3) uint8.
        depth: (h, w) uint16, in steps.
        mask: (h, w) bool.
    """

    color: NDArray[np.uint8]
    depth: NDArray[np.uint16]
    mask: NDArray[np.bool_]


class Encoded(NamedTuple):
    """A view as bytes.

    Attributes:
        window: x0, y0, x1, y1 in pixels; x1 and y1 are outside.
        color: A PNG or WebP file of the window.
        depth: The window's uint16, little-endian, row by row, compressed with zstd.
        mask: Bits of the window, row by row, compressed with zstd; None where it is depth > 0.
    """

    window: tuple[int, int, int, int]
    color: bytes
    depth: bytes
    mask: bytes | None


def window_of(pictures: Pictures) -> tuple[int, int, int, int]:
    """Return the smallest window outside which nothing is.

    Args:
        pictures: A whole view.

    Returns:
        x0, y0, x1, y1; one pixel when the view is empty.
    """
    there = (pictures.depth > 0) | pictures.mask | pictures.color.any(-1)
    rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
    if len(rows) == 0:
        return 0, 0, 1, 1
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def encode(pictures: Pictures, color: Color) -> Encoded:
    """Encode a whole view.

    Args:
        pictures: The view.
        color: Format of the colour picture.

    Returns:
        Its bytes.

    Raises:
        PackError: The format is unknown, or the picture too large for it.
    """
    pa = import_extra("pyarrow", "pack", "packing views")
    if color not in get_args(Color):
        raise PackError(f"color {color!r} is unknown: use webp or png")
    x0, y0, x1, y1 = window = window_of(pictures)
    if color == "webp" and max(x1 - x0, y1 - y0) > _WEBP_MAX_SIDE:
        raise PackError(f"a view of {y1 - y0}x{x1 - x0} pixels is too large for WebP: --color png")
    cut = np.s_[y0:y1, x0:x1]
    part = Pictures(
        np.ascontiguousarray(pictures.color[cut]), pictures.depth[cut], pictures.mask[cut]
    )
    file = io.BytesIO()
    if color == "webp":
        # Method 0 is 20 times faster than the default and 14 % larger on renders.
        Image.fromarray(part.color).save(file, "webp", lossless=True, method=0, quality=0)
    else:
        Image.fromarray(part.color).save(file, "png", compress_level=6)
    codec = pa.Codec("zstd", compression_level=_ZSTD_LEVEL)
    depth = codec.compress(part.depth.astype("<u2").tobytes(), asbytes=True)
    mask = None
    if not np.array_equal(part.mask, part.depth > 0):
        mask = codec.compress(np.packbits(part.mask).tobytes(), asbytes=True)
    return Encoded(window, file.getvalue(), depth, mask)


def decode(encoded: Encoded, where: str) -> Pictures:
    """Decode the window of a view.

    Args:
        encoded: What `encode` gave.
        where: What messages call it.

    Returns:
        The window's pixels; read-only.

    Raises:
        ImageError: The bytes are no such view.
    """
    pa = import_extra("pyarrow", "pack", "reading packed views")
    x0, y0, x1, y1 = encoded.window
    h, w = y1 - y0, x1 - x0
    try:
        with Image.open(io.BytesIO(encoded.color), formats=("WEBP", "PNG")) as image:
            if image.mode != "RGB" or image.size != (w, h):
                raise ImageError(
                    f"{where}: colour of {image.mode} {image.height}x{image.width} in a window of "
                    f"{h}x{w}; pack the views again"
                )
            color = np.asarray(image)
        raw = pa.decompress(encoded.depth, 2 * h * w, "zstd")
        depth = np.frombuffer(raw, "<u2", h * w).reshape(h, w)
        if encoded.mask is None:
            mask = depth > 0
        else:
            bits = np.frombuffer(pa.decompress(encoded.mask, -(-h * w // 8), "zstd"), np.uint8)
            mask = np.unpackbits(bits, count=h * w).reshape(h, w).astype(bool)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{where}: not a readable view ({error}); pack the views again") from error
    return Pictures(color, depth, mask)
