"""Read the files of a user's capture: pictures, depth, masks, matrices."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from equifeat.data.object_views import MAX_SIDE
from equifeat.errors import ImageError, ViewsError, import_extra

Array = NDArray[Any]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DEPTH_SUFFIXES = (".png", ".npy", ".npz", ".tif", ".tiff", ".exr", ".bin")
MATRIX_SUFFIXES = (".txt", ".npy", ".json")
_INTEGER_MODES = ("I;16", "I;16B", "I;16L", "I")
# Blender writes 1e10 where a ray hits nothing, many sensors the largest 16-bit number.
_FARTHEST, _SATURATED = 1e9, 65535


def read_depth(file: Path) -> tuple[Array, bool]:
    """Read a depth map: 16-bit PNG or TIFF, float TIFF, npy, npz, EXR or COLMAP's dense bin.

    Args:
        file: The file.

    Returns:
        (H, W) float32 with 0 where nothing was measured, and whether the file holds integers.

    Raises:
        ImageError: It is no depth map.
        MissingExtraError: An EXR without the package that reads it.
    """
    suffix = file.suffix.lower()
    try:
        if suffix in (".npy", ".npz"):
            raw = _numpy(file)
        elif suffix == ".exr":
            raw = _exr(file)
        elif suffix == ".bin":
            raw = _colmap_dense(file)
        else:
            raw = _picture(file)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(f"{file}: not a readable depth map ({error}); export it again") from error
    if raw.ndim == 3 and raw.shape[-1] == 1:
        raw = raw[..., 0]
    if raw.ndim != 2 or raw.dtype.kind not in "uif" or max(raw.shape) > MAX_SIDE:
        raise ImageError(
            f"{file}: depth of shape {raw.shape} and type {raw.dtype}, expected one number a pixel"
        )
    integer = raw.dtype.kind in "ui"
    depth = raw.astype(np.float32)
    with np.errstate(invalid="ignore"):
        absent = ~np.isfinite(depth) | (depth <= 0) | (depth >= _FARTHEST)
    if raw.dtype == np.uint16:
        absent |= raw == _SATURATED
    depth[absent] = 0.0
    return depth, integer


def depth_size_hw(file: Path) -> tuple[int, int]:
    """Read the size of a depth map, without its numbers where the format allows it.

    Args:
        file: The file.

    Returns:
        Height and width.

    Raises:
        ImageError: It is no depth map.
    """
    if file.suffix.lower() in (".png", ".tif", ".tiff"):
        (w, h), _ = image_size_wh(file)
        return h, w
    h, w = read_depth(file)[0].shape
    return h, w


def read_mask(file: Path) -> Array:
    """Read a mask: the alpha channel where there is one, else what is brighter than half.

    Args:
        file: The file.

    Returns:
        (H, W) booleans.

    Raises:
        ImageError: It is no picture.
    """
    try:
        with Image.open(file) as image:
            if image.mode in ("RGBA", "LA"):
                return np.array(image.getchannel("A")) > 127
            values = np.array(image.convert("L") if image.mode != "1" else image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{file}: not a readable mask ({error}); export it again") from error
    # Masks of 0 and 1 are as common as those of 0 and 255.
    return values > (127 if int(values.max(initial=0)) > 1 else 0)


def image_size_wh(file: Path) -> tuple[tuple[int, int], bool]:
    """Read a picture's size.

    Args:
        file: The file.

    Returns:
        Width and height, and whether it has an alpha channel.

    Raises:
        ImageError: It is no picture.
    """
    try:
        with Image.open(file) as image:
            return image.size, image.mode in ("RGBA", "LA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{file}: not an image ({error}); give a PNG or JPEG") from error


def read_matrices(file: Path) -> Array | dict[str, Array]:
    """Read numbers: .txt, .npy or .json.

    Args:
        file: The file.

    Returns:
        A float64 array of any shape, or a dictionary of them from a JSON object.

    Raises:
        ViewsError: The file holds something else.
    """
    try:
        if file.suffix.lower() == ".npy":
            return np.asarray(np.load(file, allow_pickle=False), dtype=np.float64)
        if file.suffix.lower() == ".json":
            data = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(data, dict):
                return {
                    str(key): np.asarray(value, dtype=np.float64)
                    for key, value in data.items()
                    if isinstance(value, (list, int, float))
                }
            return np.asarray(data, dtype=np.float64)
        text = file.read_text(encoding="utf-8").replace(",", " ")
        rows = [line.split("#")[0].split() for line in text.splitlines()]
        return np.asarray([[float(v) for v in row] for row in rows if row], dtype=np.float64)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ViewsError(f"{file}: not a table of numbers ({error}); write it again") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        file: The file.

    Returns:
        Its keys.

    Raises:
        ViewsError: It is something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ViewsError(f"{file}: not readable JSON ({error}); export it again") from error
    if not isinstance(data, dict):
        raise ViewsError(f"{file}: not a JSON object; export it again")
    return data


def inside_folder(folder: Path, name: str) -> Path:
    """Resolve a path written in a file; it must stay in the capture.

    Args:
        folder: The capture.
        name: The path.

    Returns:
        The file's path.

    Raises:
        ViewsError: It leads out of the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ViewsError(f"{folder}: the file {name!r} lies outside the capture; move it inside")
    return path


def key_of(file: Path) -> tuple[int, str]:
    """Return what a picture, its depth and its pose have in common: the last number of the name.

    Args:
        file: The file.

    Returns:
        The number and the name without numbered part's company; sorts by number.
    """
    stem = file.name.split(".")[0]
    numbers = re.findall(r"\d+", stem)
    return (int(numbers[-1]), "") if numbers else (-1, stem)


def _picture(file: Path) -> Array:
    with Image.open(file) as image:
        if image.mode not in (*_INTEGER_MODES, "F"):
            raise ImageError(
                f"{file}: a picture of mode {image.mode} is no metric depth; write 16-bit PNG, "
                "float TIFF or npy"
            )
        integer = image.mode != "F"
        values = np.array(image)
    return values.astype(np.uint16) if integer and int(values.max(initial=0)) < 65536 else values


def _numpy(file: Path) -> Array:
    loaded = np.load(file, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        if len(loaded.files) != 1 and "depth" not in loaded.files:
            raise ImageError(f"{file}: holds {loaded.files}; name one of them 'depth'")
        found: Array = loaded["depth" if "depth" in loaded.files else loaded.files[0]]
    return found


def _exr(file: Path) -> Array:
    exr = import_extra("OpenEXR", "captures", "reading EXR depth")
    try:
        with exr.File(str(file), separate_channels=True) as opened:
            channels = opened.channels()
            name = next((n for n in ("Z", "V", "Y", "R", "depth.Z") if n in channels), None)
            name = name or next(iter(channels))
            return np.array(channels[name].pixels)
    except (RuntimeError, TypeError, StopIteration) as error:
        raise ImageError(f"{file}: not a readable EXR ({error}); export it again") from error


def _colmap_dense(file: Path) -> Array:
    """COLMAP's stereo/depth_maps: "width&height&channels&", then float32 in column order."""
    data = file.read_bytes()
    header = re.match(rb"(\d{1,6})&(\d{1,6})&1&", data[:32])
    if not header:
        raise ImageError(f"{file}: not a depth map of COLMAP; give PNG, TIFF, npy or EXR")
    w, h = int(header[1]), int(header[2])
    values = np.frombuffer(data, "<f4", offset=header.end())
    if len(values) != w * h:
        raise ImageError(f"{file}: {len(values)} numbers for {w}x{h} pixels; export it again")
    return values.reshape(h, w)
