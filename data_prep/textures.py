"""Base-colour textures, decoded with suspicion: known formats only, size checked before memory."""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.limits import Budget
from equifeat.errors import MeshError, MissingExtraError

Array = NDArray[Any]

# Never all that Pillow knows: its EPS plug-in starts a program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TGA", "TIFF")
_KTX2 = b"\xabKTX 20\xbb\r\n\x1a\n"


def decode_texture(where: str, data: bytes, budget: Budget) -> Array:
    """Decode an image.

    Args:
        where: What messages call it: the file and the texture.
        data: Its bytes; their content, not a name or a MIME type, says which format.
        budget: Accounts for its pixels before they are decoded.

    Returns:
        (H, W, 4) uint8, sRGB with straight alpha, first row on top.

    Raises:
        MeshError: Not one of the known formats, damaged, or too large.
    """
    if data.startswith(_KTX2):
        return _decode_ktx2(where, data, budget)
    try:
        with warnings.catch_warnings():
            # of size (checked below by our own limit) and of odd metadata, which is not used
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                budget.pixels(image.width, image.height)
                return _rgba(image)
    except (MeshError, MemoryError):
        raise
    except Exception as error:  # Pillow's plug-ins raise anything at all on damaged data
        raise MeshError(
            f"{where} cannot be decoded ({type(error).__name__}: {error}); "
            "convert it to PNG or JPEG"
        ) from error


def _rgba(image: Image.Image) -> Array:
    if image.mode.startswith("I"):
        # Pillow would clip 16 bits to 8 instead of scaling them
        gray = (np.clip(np.asarray(image, dtype=np.int64), 0, 65535) // 257).astype(np.uint8)
        return np.dstack([gray, gray, gray, np.full_like(gray, 255)])
    return np.array(image.convert("RGBA"))


def _decode_ktx2(where: str, data: bytes, budget: Budget) -> Array:
    try:
        import opengl_basisu
    except ImportError as error:
        missing = MissingExtraError("opengl_basisu", "formats", "a KTX2 texture")
        raise MeshError(f"{where} is KTX2 (KHR_texture_basisu): {missing}") from error
    try:
        texture = opengl_basisu.open(data)
        budget.pixels(texture.width, texture.height)
        if texture.faces != 1 or texture.is_array or texture.is_video:
            raise MeshError(f"{where} is a cube map, an array or a video, not one picture")
        out: Array = texture.transcode("rgba8").data
    except (opengl_basisu.BasisuError, ValueError) as error:
        raise MeshError(f"{where} is damaged KTX2 ({error}); convert it to PNG") from error
    return out
