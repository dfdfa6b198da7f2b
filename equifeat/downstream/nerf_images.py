"""Which images a radiance field trainer takes from a scene, and in which order."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from equifeat.errors import ImageError, RecipeError
from equifeat.geometry.pixels import SizeHW
from equifeat.image_files import IMAGE_SUFFIXES

TRANSFORMS = "transforms.json"
# nerfstudio takes smaller copies of images that are at least this large.
_MAX_SIDE = 1600
_MAX_JSON = 256 * 2**20
_ORIENTATION = 0x0112  # EXIF


class SceneImage(NamedTuple):
    """An image of a scene.

    Attributes:
        path: The file.
        size_hw: Height and width as stored.
    """

    path: Path
    size_hw: SizeHW


def scene_images(
    scene: str | Path, downscale: int | None = None, train_fraction: float = 1.0
) -> list[SceneImage]:
    """List the images of a scene as nerfstudio's data manager numbers them.

    Args:
        scene: A folder with a transforms.json, such a file, or a folder of images (sorted by name).
        downscale: Take the copies in images_2, images_4, …; None for nerfstudio's own choice: the
            largest that is below 1600 pixels and there. Only with a transforms.json.
        train_fraction: Share of the images that are trained on, as nerfstudio picks them; a list of
            `train_filenames` in transforms.json goes first.

    Returns:
        The images in the trainer's order.

    Raises:
        RecipeError: There is no such scene, it names no images, or an option is out of range.
        ImageError: An image is missing, unreadable or stored turned.
    """
    scene = Path(scene)
    if not 0 < train_fraction <= 1:
        raise RecipeError(f"train_fraction must be above 0 and at most 1, not {train_fraction:g}")
    if downscale is not None and downscale < 1:
        raise RecipeError(f"downscale must be at least 1, not {downscale}")
    if scene.is_file() or (scene / TRANSFORMS).is_file():
        file = scene if scene.is_file() else scene / TRANSFORMS
        paths = _from_transforms(file, downscale, train_fraction)
    else:
        if not scene.is_dir():
            raise RecipeError(f"{scene} is neither a folder of images nor one with {TRANSFORMS}")
        found = [p for p in scene.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
        paths = _share(sorted(found), train_fraction)
    if not paths:
        raise RecipeError(f"{scene} holds no images: give the folder of images or of {TRANSFORMS}")
    return [SceneImage(path, _stored_size(path)) for path in paths]


def _from_transforms(file: Path, downscale: int | None, train_fraction: float) -> list[Path]:
    """Do what nerfstudio's Nerfstudio dataparser does to find its training images."""
    meta = _read(file)
    frames = meta.get("frames")
    are_dicts = isinstance(frames, list) and all(isinstance(frame, dict) for frame in frames)
    names = [frame.get("file_path") for frame in frames or []] if are_dicts else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise RecipeError(f"{file} has no list of frames with a file_path each")
    originals = [_below(file, name) for name in names]
    factor = _auto_downscale(file.parent, originals[0]) if downscale is None else downscale
    paths = sorted(_copy(file.parent, path, factor) for path in originals)
    chosen = meta.get("train_filenames")
    if not isinstance(chosen, list):
        return _share(paths, train_fraction)
    wanted = {_copy(file.parent, _below(file, str(name)), factor) for name in chosen}
    unknown = sorted(wanted - set(paths))
    if unknown:
        raise RecipeError(f"{file} lists {unknown[0].name} in train_filenames but not in frames")
    return [path for path in paths if path in wanted]


def _read(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _MAX_JSON:
        raise RecipeError(f"{file} is larger than {_MAX_JSON // 2**20} MiB")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(meta, dict):
        raise RecipeError(f"{file} is not a {TRANSFORMS} of nerfstudio")
    return meta


def _below(file: Path, name: str) -> Path:
    """Return the path of an image, which must lie below the scene's folder."""
    # links are followed later, on purpose: data often lies elsewhere
    inner = Path(os.path.normpath(name))
    if inner.is_absolute() or inner.parts[0] == "..":
        raise RecipeError(f"{file} names {name!r}, which is outside of its folder")
    return file.parent / inner


def _copy(folder: Path, path: Path, factor: int) -> Path:
    """Return where nerfstudio keeps the smaller copy of an image."""
    return folder / f"images_{factor}" / path.name if factor > 1 else path


def _auto_downscale(folder: Path, first: Path) -> int:
    """Return the factor that nerfstudio chooses."""
    longer, factor = max(_stored_size(first)), 1
    while longer / factor >= _MAX_SIDE and _copy(folder, first, 2 * factor).is_file():
        factor *= 2
    return factor


def _share(paths: list[Path], fraction: float) -> list[Path]:
    """Pick training images evenly, first and last among them, as nerfstudio does."""
    count = math.ceil(len(paths) * fraction)
    if not paths:
        return []
    return [paths[i] for i in np.linspace(0, len(paths) - 1, count, dtype=int)]


def _stored_size(path: Path) -> SizeHW:
    """Read an image's size from its header; refuse one that viewers turn."""
    if not path.is_file():
        raise ImageError(f"{path}: no such image file; check the path")
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(_ORIENTATION, 1)
            size_hw = (image.height, image.width)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path}: damaged or unreadable image ({error}); save it anew") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {error}") from error
    if turned not in (0, 1):
        raise ImageError(
            f"{path}: stored turned (EXIF orientation {turned}), which radiance field trainers do "
            "not undo: save it upright and find its camera again"
        )
    return size_hw
