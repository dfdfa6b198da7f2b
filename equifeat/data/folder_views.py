"""The project's own layout: views.json and one triple of PNG files a view.

A view folder holds color_%06d.png, depth_%06d.png (16 bit) and mask_%06d.png. File names are made
from the view's number only, so nothing in views.json can point elsewhere.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from equifeat.data.object_views import (
    CACHED_VIEWS,
    MAX_SIDE,
    ObjectViews,
    check_intrinsics,
    check_poses,
)
from equifeat.errors import ImageError, ViewsError
from equifeat.geometry.pixels import SizeHW

FORMAT, VERSION = "equifeat-views", 1
_PREFIXES = ("color", "depth", "mask")


class FolderViews(ObjectViews):
    """The views of one object as PNG files in a folder.

    Args:
        name: Identity of the object.
        folder: Where the pictures are.
        K: (V, 3, 3) intrinsics, corner pixel convention.
        cam_from_world: (V, 4, 4) poses.
        size_hw: Height and width of every view.
        depth_step: Object units of one step of the depth pictures.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        K: Float[Tensor, "v 3 3"],
        cam_from_world: Float[Tensor, "v 4 4"],
        size_hw: SizeHW,
        depth_step: float,
    ) -> None:
        super().__init__(name, str(folder), K, cam_from_world, size_hw, depth_step)
        self.folder = Path(folder)
        self.size_hw = size_hw
        # A folder that was rendered anew must not be answered from the cache of decoded pictures.
        self._stamp = self.folder.stat().st_mtime_ns

    def _pictures(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        color, depth, mask = self.raw(i)
        return (
            torch.from_numpy(color.astype(np.float32) / 255.0).permute(2, 0, 1).contiguous(),
            torch.from_numpy(depth.astype(np.float32) * np.float32(self.depth_step)),
            torch.from_numpy(mask > 127),
        )

    def raw(self, i: int) -> tuple[Any, Any, Any]:
        """Read the pictures of view i as they are stored.

        Args:
            i: Index of the view.

        Returns:
            Colour (H, W, 3) uint8, depth (H, W) in steps and mask (H, W) uint8, above 127 where
            the object is; shared with a cache, so not to be written to.

        Raises:
            ImageError: A picture is not a picture or has another size.
        """
        return _decode(self.folder, i, self.size_hw, self._stamp)


def is_equifeat(folder: Path) -> bool:
    """Whether this is a view folder of the project.

    Args:
        folder: Any folder.

    Returns:
        True where views.json is.
    """
    return (folder / "views.json").is_file()


def open_equifeat(folder: Path) -> FolderViews:
    """Open a view folder.

    Args:
        folder: The folder with views.json.

    Returns:
        Its object.

    Raises:
        ViewsError: A file is missing, or views.json is of another format.
    """
    file = folder / "views.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ViewsError(f"{file}: not readable JSON ({error}); render again") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ViewsError(f"{file}: not an {FORMAT} file; render the object again")
    if meta.get("version") != VERSION:
        raise ViewsError(
            f"{file}: format version {meta.get('version')!r}, this release reads {VERSION}; "
            "install the equifeat that wrote it or render the object again"
        )
    try:
        name, step, views = meta["object"], float(meta["depth_step"]), meta["views"]
        h, w = (int(side) for side in meta["size_hw"])
        K = torch.tensor([view["K"] for view in views], dtype=torch.float64)
        poses = torch.tensor([view["cam_from_world"] for view in views], dtype=torch.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise ViewsError(f"{file}: a field is missing or wrong ({error!r})") from error
    if not isinstance(name, str) or not name:
        raise ViewsError(f"{file}: object is {name!r}, not a name; render the object again")
    if not (0 < h <= MAX_SIDE and 0 < w <= MAX_SIDE):
        raise ViewsError(f"{file}: size_hw is {[h, w]}, not a picture's size; render again")
    if not (0 < step < 1):
        raise ViewsError(f"{file}: depth_step is {step}, not between 0 and 1; render again")
    check_intrinsics(K, file)
    check_poses(poses, file)
    require_files(folder, len(views))
    return FolderViews(name, folder, K.float(), poses.float(), (h, w), step)


def require_files(folder: Path, views: int) -> None:
    """Refuse a folder in which a picture is missing.

    Args:
        folder: A view folder.
        views: Number of views it should hold.

    Raises:
        ViewsError: A file is missing.
    """
    there = {file.name for file in folder.iterdir()}
    wanted = [f"{prefix}_{i:06d}.png" for i in range(views) for prefix in _PREFIXES]
    missing = [name for name in wanted if name not in there]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ViewsError(
            f"{folder}: {', '.join(missing[:3])}{more} missing; render the object again"
        )


@lru_cache(maxsize=CACHED_VIEWS)
def _decode(folder: Path, i: int, size_hw: SizeHW, stamp: int) -> tuple[Any, Any, Any]:
    color = _read_image(folder / f"color_{i:06d}.png", size_hw, ("RGB", "RGBA"))
    depth = _read_image(folder / f"depth_{i:06d}.png", size_hw, ("I;16", "I;16B", "I"))
    mask = _read_image(folder / f"mask_{i:06d}.png", size_hw, ("L", "1"))
    return color[..., :3], depth, mask


def _read_image(file: Path, size_hw: SizeHW, modes: tuple[str, ...]) -> Any:
    try:
        with Image.open(file) as image:
            if image.mode not in modes:
                raise ImageError(f"{file}: mode {image.mode}, expected {' or '.join(modes)}")
            if (image.height, image.width) != size_hw:
                raise ImageError(
                    f"{file}: {image.height}x{image.width} pixels (height x width), the views are "
                    f"{size_hw[0]}x{size_hw[1]}; render the object again"
                )
            array = np.asarray(image)
    except FileNotFoundError as error:
        raise ImageError(f"{file}: no such image; render the object again") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{file}: not a readable image ({error}); render again") from error
    return array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array
