"""Pictures as files and as PIL images: every mode of Pillow becomes upright RGB here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from equifeat.errors import ImageError

IMAGE_SUFFIXES = frozenset(
    [
        ".avif",
        ".bmp",
        ".gif",
        ".jp2",
        ".jpeg",
        ".jpg",
        ".pgm",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
"""What a file must end in to be taken from a folder; a file named itself may end in anything."""

# Pillow only warns up to twice its own limit; a decompression bomb must fail instead.
_MAX_PIXELS = 200_000_000
# Modes of one wide channel. Pillow's own conversion to RGB cuts them off at 255.
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


def read_image(path: str | Path) -> Float[Tensor, "3 h w"]:
    """Read an image as RGB, turned upright by its EXIF orientation; transparency becomes black.

    Args:
        path: Image file.

    Returns:
        (3, H, W) RGB in [0, 1].

    Raises:
        ImageError: There is no such file, it is no image, it is truncated or too large.
    """
    pixels = read_pixels(path)
    return pixels if pixels.is_floating_point() else pixels.float().div_(255.0)


def read_pixels(path: str | Path) -> Tensor:
    """Read an image as `read_image` does, but leave 8-bit images in uint8.

    Args:
        path: Image file.

    Returns:
        (3, H, W) RGB: uint8, or float32 in [0, 1] for a file of one channel wider than 8 bits.

    Raises:
        ImageError: As for `read_image`.
    """
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"{path}: no such image file; check the path")
    try:
        with Image.open(path) as image:
            return rgb_pixels(image, str(path))
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{path}: not an image that Pillow can read; give a PNG or JPEG"
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: damaged or unreadable image ({error}); save it anew") from error


def rgb_pixels(image: Image.Image, name: str = "the PIL image") -> Tensor:
    """Turn an image of any of Pillow's modes upright and make it RGB; transparency becomes black.

    Args:
        image: The image. Its EXIF orientation is obeyed if it still has one.
        name: What messages call it.

    Returns:
        (3, H, W): uint8, or float32 in [0, 1] for modes of one wide channel ("I;16", "I", "F").

    Raises:
        ImageError: It is too large, or a wide channel's range cannot be told.
        OSError: Its file, read only now, is damaged.
    """
    if image.width * image.height > _MAX_PIXELS:
        raise ImageError(
            f"{name}: {image.width}x{image.height} px is more than {_MAX_PIXELS} pixels; "
            "make it smaller first"
        )
    upright = ImageOps.exif_transpose(image)
    if upright.mode in _WIDE_MODES:
        return _wide(upright, name)
    if upright.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in upright.info:
        black = Image.new("RGBA", upright.size, (0, 0, 0, 255))
        upright = Image.alpha_composite(black, upright.convert("RGBA"))
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)


def _wide(image: Image.Image, name: str) -> Tensor:
    """Return an image of one wide channel as float RGB; whole numbers count as 16 bits."""
    values = torch.from_numpy(np.array(image).astype(np.float32))
    if image.mode != "F":
        values = values / 65535.0
    low, top = float(values.min()), float(values.max())
    if not (low >= 0.0 and top <= 1.0):
        kind = "floats in [0, 1]" if image.mode == "F" else "whole numbers from 0 to 65535"
        raise ImageError(
            f"{name}: pixels of mode {image.mode!r} must be {kind}; scale them and save as 8 or "
            "16 bits"
        )
    return values.expand(3, -1, -1)


def find_images(source: str | Path, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> list[Path] | None:
    """Return the files that a path means: itself, those of a folder, or those of a glob pattern.

    Args:
        source: A file, a folder (not its subfolders) or a pattern such as `photos/**/*.jpg`.
        suffixes: Endings taken from folders and patterns, in lower case. Hidden files are not.

    Returns:
        The files, sorted by path; None when there is nothing of this name.

    Raises:
        ImageError: The folder or the pattern gives no file with such an ending.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = path.iterdir()
    elif any(character in str(source) for character in "*?["):
        found = Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))
    else:
        return None
    files = sorted(f for f in found if f.suffix.lower() in suffixes and f.name[0] != ".")
    files = [file for file in files if file.is_file()]
    if not files:
        raise ImageError(f"{source}: no files here that end in {', '.join(sorted(suffixes))}")
    return files
