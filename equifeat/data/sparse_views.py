"""Views of real captures: photographs with cameras and tracks in place of depth.

Photographs are resized and undistorted while they are read, so that everything behind sees pinhole
views in object coordinates like those of rendered objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from equifeat.data.colmap_camera import ColmapCamera
from equifeat.data.object_views import CACHED_VIEWS, MAX_SIDE, ObjectViews
from equifeat.data.tracks import Tracks
from equifeat.errors import ImageError, RecipeError, ViewsError
from equifeat.geometry.pixels import (
    SizeHW,
    inside,
    pixel_centers,
    resize,
    sample,
    scale_xy,
)

MIN_POINTS = 8
_SPREAD = (0.02, 0.98)  # quantiles of the points' coordinates that span the object


@dataclass(frozen=True)
class CaptureOptions:
    """How real captures (COLMAP, MVImgNet, CO3D) are read; rendered views ignore it.

    Args:
        max_side: Photographs are shrunk to this longer side in pixels, None keeps their size.
        pad: Fill every view with black to a square of max_side, so that objects of different
            sizes fit into one batch.
        use_masks: Blacken the background where masks are there; False keeps the photographs as
            they are and uses masks only to choose the points.
        max_reprojection_px: Points with a larger mean reprojection error are dropped, in pixels of
            the photograph as it is stored (COLMAP).
        min_track_length: Points seen in fewer views are dropped (COLMAP).
        max_points: At most so many points of a point cloud are taken (CO3D).
        depth_tolerance: A point of a point cloud is seen where the depth map agrees within this,
            in object units (CO3D).
    """

    max_side: int | None = 512
    pad: bool = False
    use_masks: bool = True
    max_reprojection_px: float = 2.0
    min_track_length: int = 3
    max_points: int = 20_000
    depth_tolerance: float = 0.02

    def __post_init__(self) -> None:
        if self.max_side is not None and not 16 <= self.max_side <= MAX_SIDE:
            raise RecipeError(f"captures.max_side is {self.max_side}: use 16 to {MAX_SIDE} or null")
        if self.pad and self.max_side is None:
            raise RecipeError("captures.pad needs captures.max_side: the side of the square")
        if not self.max_reprojection_px > 0 or not self.depth_tolerance > 0:
            raise RecipeError(
                f"captures.max_reprojection_px is {self.max_reprojection_px} and depth_tolerance "
                f"{self.depth_tolerance}: both must be greater than 0"
            )
        if self.min_track_length < 2 or self.max_points < MIN_POINTS:
            raise RecipeError(
                f"captures.min_track_length is {self.min_track_length} and max_points "
                f"{self.max_points}: use at least 2 and {MIN_POINTS}"
            )


@dataclass(frozen=True, eq=False)
class Frame:
    """Where one view is and how it was taken.

    Args:
        image: The photograph.
        size_hw: Its height and width, as the camera says.
        K: (3, 3) intrinsics in its pixels.
        mask: Picture of the silhouette, white is the object, of any resolution; or None.
        lens: What bends its lines; None for a pinhole.
    """

    image: Path
    size_hw: SizeHW
    K: Float[Tensor, "3 3"]
    mask: Path | None = None
    lens: ColmapCamera | None = None

    def shrunk_hw(self, options: CaptureOptions) -> SizeHW:
        """Return the size the photograph is read at.

        Args:
            options: How captures are read.

        Returns:
            Height and width, without padding.
        """
        h, w = self.size_hw
        if options.max_side is None or max(h, w) <= options.max_side:
            return h, w
        factor = options.max_side / max(h, w)
        return max(1, round(h * factor)), max(1, round(w * factor))

    def to_view(self, xy: Float[Tensor, "n 2"], options: CaptureOptions) -> Float[Tensor, "n 2"]:
        """Carry pixels of the photograph to pixels of the view.

        Args:
            xy: (N, 2) pixels of the photograph as it is stored.
            options: How captures are read.

        Returns:
            (N, 2) float64 pixels; NaN where the lens has no inverse.
        """
        straight = self.lens.undistort(xy) if self.lens else xy.double()
        return scale_xy(straight, self.size_hw, self.shrunk_hw(options))


class Box(NamedTuple):
    """The frame of an object in the coordinates of its capture.

    Attributes:
        center: (3,) middle of the box around its points.
        side: Longest side of the box.
    """

    center: Tensor
    side: float

    def points(self, points_world: Float[Tensor, "p 3"]) -> Float[Tensor, "p 3"]:
        """Carry points of the capture to object coordinates.

        Args:
            points_world: (P, 3) points.

        Returns:
            (P, 3) points; the box is centred and its longest side is 1.
        """
        return (points_world - self.center) / self.side

    def poses(self, cam_from_world: Float[Tensor, "v 4 4"]) -> Float[Tensor, "v 4 4"]:
        """Carry poses of the capture to object coordinates.

        Args:
            cam_from_world: (V, 4, 4) poses.

        Returns:
            (V, 4, 4) poses that see the moved points at the same pixels.
        """
        out = cam_from_world.clone()
        moved = cam_from_world[:, :3, :3] @ self.center + cam_from_world[:, :3, 3]
        out[:, :3, 3] = moved / self.side
        return out


def box_of(points: Float[Tensor, "p 3"], where: str) -> Box:
    """Return the robust box of an object's points: the middle 96 % of every coordinate.

    Args:
        points: (P, 3) points of the capture.
        where: What the message names.

    Returns:
        The box.

    Raises:
        ViewsError: There are too few points, or they lie in one place.
    """
    if len(points) < MIN_POINTS:
        raise ViewsError(
            f"{where}: {len(points)} points are left on the object, at least {MIN_POINTS} are "
            "needed; loosen captures.max_reprojection_px or min_track_length, or leave it out"
        )
    ends = torch.from_numpy(np.quantile(points.double().numpy(), _SPREAD, axis=0))
    side = float((ends[1] - ends[0]).max())
    if not 0 < side < float("inf"):
        raise ViewsError(f"{where}: all points of the object lie in one place; leave it out")
    return Box(ends.mean(0), side)


class SparseViews(ObjectViews):
    """The views of one captured object: tracks in place of depth, which is 0 everywhere.

    Args:
        name: Identity of the object.
        where: What messages call the place it is read from.
        frames: One for each view.
        cam_from_world: (V, 4, 4) poses in object coordinates.
        tracks: Which points each view sees, in pixels of the views.
        options: How captures are read.
    """

    def __init__(
        self,
        name: str,
        where: str,
        frames: Sequence[Frame],
        cam_from_world: Float[Tensor, "v 4 4"],
        tracks: Tracks,
        options: CaptureOptions,
    ) -> None:
        shrunk = [frame.shrunk_hw(options) for frame in frames]
        scale = [
            frame.K.new_tensor([[w / frame.size_hw[1]], [h / frame.size_hw[0]], [1.0]])
            for frame, (h, w) in zip(frames, shrunk, strict=True)
        ]
        K = torch.stack([frame.K * s for frame, s in zip(frames, scale, strict=True)])
        side = options.max_side
        sizes = [(side, side)] * len(frames) if options.pad and side is not None else shrunk
        super().__init__(name, where, K.float(), cam_from_world.float(), sizes, 0.0, tracks)
        self.frames = list(frames)
        self.has_masks = options.use_masks and all(frame.mask for frame in frames)
        self._shrunk = shrunk

    def _pictures(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        h, w = self.camera(i).size_hw
        small, silhouette = _decode(self.frames[i], self._shrunk[i], self.has_masks)
        image, mask = torch.zeros(3, h, w), torch.zeros(h, w, dtype=torch.bool)
        rows, columns = silhouette.shape
        image[:, :rows, :columns] = torch.from_numpy(small).permute(2, 0, 1).float() / 255.0
        mask[:rows, :columns] = torch.from_numpy(silhouette)
        return image, torch.zeros(h, w), mask


@lru_cache(maxsize=CACHED_VIEWS)
def _decode(frame: Frame, size_hw: SizeHW, masked: bool) -> tuple[Any, Any]:
    """Image (h, w, 3) uint8 and mask (h, w) bool of a photograph, resized and undistorted."""
    h, w = size_hw
    photo = resize(_read_photo(frame)[None], size_hw)
    alpha = torch.ones(1, 1, h, w)
    if masked and frame.mask:
        alpha = resize(read_mask(frame.mask)[None, None], size_hw)
    shown = torch.ones(h, w, dtype=torch.bool)
    if frame.lens:
        at, shown = _bent_grid(frame.lens, size_hw)
        both = sample(torch.cat([photo, alpha], 1), at[None], size_hw)
        both = both.mT.reshape(1, 4, h, w)
        photo, alpha = both[:, :3], both[:, 3:]
    mask = shown & (alpha[0, 0] > 0.5)
    out = (photo[0] * mask * 255.0).round().clamp(0, 255).to(torch.uint8)
    return out.permute(1, 2, 0).contiguous().numpy(), mask.numpy()


@lru_cache(maxsize=8)
def _bent_grid(lens: ColmapCamera, size_hw: SizeHW) -> tuple[Tensor, Tensor]:
    """Where the shrunk photograph shows each pixel of the view (N, 2), and whether it does."""
    at = scale_xy(pixel_centers(size_hw, dtype=torch.float64), size_hw, lens.size_hw)
    at = scale_xy(lens.distort(at.reshape(-1, 2)), lens.size_hw, size_hw)
    return at.nan_to_num(0.0).float(), inside(at, size_hw).reshape(size_hw)


def _read_photo(frame: Frame) -> Tensor:
    """(3, H, W) as it is stored: COLMAP does not turn photographs by their EXIF orientation."""
    with _opened(frame.image) as image:
        if (image.height, image.width) != frame.size_hw:
            raise ImageError(
                f"{frame.image}: {image.height}x{image.width} pixels (height x width), but its "
                f"camera was fitted to {frame.size_hw[0]}x{frame.size_hw[1]}; give the pictures "
                "the reconstruction was made of"
            )
        pixels = _pixels(image.convert, "RGB", frame.image)
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255.0)


def read_mask(file: Path) -> Float[Tensor, "h w"]:
    """Read a picture of a silhouette.

    Args:
        file: Picture, white is the object.

    Returns:
        (H, W) share of object, 0 to 1.

    Raises:
        ImageError: Not a picture.
    """
    with _opened(file) as image:
        if max(image.size) > MAX_SIDE:
            raise ImageError(f"{file}: {image.size} pixels are too many for a mask; shrink it")
        pixels = _pixels(image.convert, "L", file)
    return torch.from_numpy(pixels).float().div_(255.0)


def at_pixels(picture: Float[Tensor, "h w"], xy: Float[Tensor, "n 2"], size_hw: SizeHW) -> Tensor:
    """Look up the pixels of a picture of any resolution.

    Args:
        picture: (H, W) picture.
        xy: (N, 2) pixels of a picture of size_hw that shows the same.
        size_hw: Height and width that xy counts in.

    Returns:
        (N,) values of the nearest pixels.
    """
    return sample(picture[None, None], xy[None], size_hw, "nearest")[0, :, 0]


def _opened(file: Path) -> Image.Image:
    try:
        return Image.open(file)
    except FileNotFoundError as error:
        raise ImageError(f"{file}: no such picture; get the capture again") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{file}: not a readable picture ({error}); get it again") from error


def _pixels(convert: Any, mode: str, file: Path) -> Any:
    try:
        return np.array(convert(mode))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{file}: damaged picture ({error}); get it again") from error
