"""What stands behind the object, and putting it there."""

from __future__ import annotations

import functools
import hashlib
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.renderers import Rendered
from equifeat.errors import RenderError, suggest

Array = NDArray[Any]

BACKGROUNDS = ("black", "white", "color", "noise", "gradient")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
ENVIRONMENT_SUFFIXES = (".hdr", ".exr")
_HEX = re.compile(r"#[0-9a-fA-F]{6}")


def compose(view: Rendered, background: Array | None) -> Rendered:
    """Put a view in front of a background; depth, mask and normals stay.

    Args:
        view: Colour over black, with coverage.
        background: (H, W, 3) uint8, or None for black.

    Returns:
        The view with its colour over the background.
    """
    if background is None:
        return view
    covered = view.coverage
    if covered is None:
        covered = view.mask.astype(np.uint8) * 255
    rest = (255 - covered).astype(np.uint16)[..., None]
    # colour over black is already multiplied by coverage
    total = view.color.astype(np.uint16) + (background * rest + 127) // 255
    return view._replace(color=total.clip(0, 255).astype(np.uint8))


def is_folder(background: str) -> bool:
    """Tell whether a background is a folder rather than a name or a colour."""
    return background not in BACKGROUNDS and not _HEX.fullmatch(background)


def check_background(background: str) -> None:
    """Check that a background is a known name, a colour or a folder with images.

    Args:
        background: What the user wrote.

    Raises:
        RenderError: It is none of these.
    """
    if is_folder(background):
        if not Path(background).is_dir():
            raise RenderError(
                f"background = {background!r}: give {', '.join(BACKGROUNDS)}, #rrggbb or a folder "
                f"of images.{suggest(background, BACKGROUNDS)}"
            )
        folder_files(background, IMAGE_SUFFIXES, "background")


def draw_background(
    background: str, size_hw: tuple[int, int], rng: np.random.Generator
) -> tuple[Array, dict[str, Any]]:
    """Draw a background.

    Args:
        background: "black", "white", "#rrggbb", "color" (any one), "noise" (colour noise of any
            grain), "gradient" (two colours in any direction), or a folder (a random crop of one
            of its images, scaled to cover the view).
        size_hw: Height and width.
        rng: Source of every random number.

    Returns:
        (H, W, 3) uint8, and what to record of it.

    Raises:
        RenderError: An image of the folder cannot be read.
    """
    h, w = size_hw
    record: dict[str, Any] = {"kind": background}
    if background in ("black", "white", "color") or _HEX.fullmatch(background):
        named = {"black": (0, 0, 0), "white": (255, 255, 255)}
        if background == "color":
            rgb = [int(x) for x in rng.integers(0, 256, size=3)]
        elif background.startswith("#"):
            rgb = list(bytes.fromhex(background[1:]))
        else:
            rgb = list(named[background])
        return np.broadcast_to(np.array(rgb, np.uint8), (h, w, 3)), {**record, "rgb": rgb}
    if background == "noise":
        cell = 2 ** int(rng.integers(0, 6))
        small = rng.integers(0, 256, size=(-(-h // cell), -(-w // cell), 3), dtype=np.uint8)
        whole = Image.fromarray(small).resize((w, h), Image.Resampling.BILINEAR)
        return np.asarray(whole), {**record, "cell": cell}
    if background == "gradient":
        first, second = rng.integers(0, 256, size=(2, 3))
        angle = float(rng.uniform(0.0, 2.0 * math.pi))
        y, x = (np.mgrid[0:h, 0:w] + 0.5) / np.array([h, w])[:, None, None] * 2.0 - 1.0
        share = (x * math.cos(angle) + y * math.sin(angle)) / (2.0 * math.sqrt(2.0)) + 0.5
        blend = first + (second - first) * share[..., None]
        return (blend + 0.5).astype(np.uint8), record
    return _crop_of_one(background, size_hw, rng)


def _crop_of_one(
    folder: str, size_hw: tuple[int, int], rng: np.random.Generator
) -> tuple[Array, dict[str, Any]]:
    h, w = size_hw
    files = folder_files(folder, IMAGE_SUFFIXES, "background")
    file = files[int(rng.integers(len(files)))]
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RenderError(f"{file}: cannot be read as an image ({error}); remove it") from error
    factor = max(h / image.height, w / image.width)
    size = (max(w, round(image.width * factor)), max(h, round(image.height * factor)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = int(rng.integers(size[0] - w + 1)), int(rng.integers(size[1] - h + 1))
    record = {"kind": "image", **_record_of(file, data), "left": left, "top": top}
    return np.asarray(image.crop((left, top, left + w, top + h))), record


def file_record(file: Path) -> dict[str, Any]:
    """Return name and SHA-256 of a file's bytes, for views.json."""
    try:
        return _record_of(file, file.read_bytes())
    except OSError as error:
        raise RenderError(f"{file}: cannot be read ({error.strerror})") from error


def _record_of(file: Path, data: bytes) -> dict[str, Any]:
    return {"file": file.name, "sha256": hashlib.sha256(data).hexdigest()}


@functools.lru_cache(maxsize=16)
def folder_files(folder: str, suffixes: tuple[str, ...], what: str) -> tuple[Path, ...]:
    """List the pictures of a folder by name, once a process.

    Args:
        folder: The folder.
        suffixes: Of the files to take, in lower case.
        what: The option, for the error message.

    Returns:
        At least one file.

    Raises:
        RenderError: There is none.
    """
    path = Path(folder)
    found = (
        sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes) if path.is_dir() else []
    )
    if not found:
        raise RenderError(f"{what} = {folder!r}: no folder with {', '.join(suffixes)} files")
    return tuple(found)


def folder_record(folder: str, suffixes: tuple[str, ...]) -> dict[str, Any]:
    """Return a folder's name and a hash of the names and sizes of its pictures."""
    files = folder_files(folder, suffixes, "folder")
    listing = "\n".join(f"{p.name} {p.stat().st_size}" for p in files)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    return {"folder": Path(folder).resolve().name, "files": len(files), "listing_sha256": digest}
