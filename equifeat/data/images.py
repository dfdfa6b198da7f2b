"""Read a user's own photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from equifeat.errors import ImageError

# Pillow only warns up to twice its own limit; a decompression bomb must fail instead.
_MAX_PIXELS = 200_000_000


def read_image(path: str | Path) -> Float[Tensor, "3 h w"]:
    """Read an image as RGB, turned upright by its EXIF orientation; transparency becomes black.

    Args:
        path: Image file.

    Returns:
        (3, H, W) RGB in [0, 1].

    Raises:
        ImageError: There is no such file, it is no image, it is truncated or too large.
    """
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"{path}: no such image file; check the path")
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ImageError(
                    f"{path}: {image.width}x{image.height} px is more than {_MAX_PIXELS} pixels; "
                    "make it smaller first"
                )
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                black = Image.new("RGBA", upright.size, (0, 0, 0, 255))
                upright = Image.alpha_composite(black, upright.convert("RGBA"))
            pixels = np.array(upright.convert("RGB"))
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{path}: not an image that Pillow can read; give a PNG or JPEG"
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: damaged or unreadable image ({error}); save it anew") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255.0)
