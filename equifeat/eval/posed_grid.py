"""A view with depth, resampled as Probe3D does: an image, and a grid of points seen in it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.data.image_pairs import read_picture
from equifeat.data.navi import NaviView, read_16_bits, read_navi_depth
from equifeat.errors import EvalDataError
from equifeat.geometry.camera import Camera
from equifeat.geometry.pixels import SizeHW, crop, patch_centers, pixel_centers, resize

_METRES = 1e-3


class PosedGrid(NamedTuple):
    """A view as it is matched.

    Attributes:
        image: (3, H, W) RGB in [0, 1].
        points: (h, w, 3) float64 points in camera coordinates, metres; 0 where depth is unknown.
        K: (3, 3) float64 intrinsics of the image, corner convention.
    """

    image: Tensor
    points: Tensor
    K: Tensor

    @property
    def seen(self) -> Tensor:
        """(h, w) bool: depth is known."""
        return self.points[..., 2] > 0

    def centers(self) -> Tensor:
        """Return where the grid's points lie in the image.

        Returns:
            (h, w, 2) float64 pixels.
        """
        size_hw = (int(self.image.shape[-2]), int(self.image.shape[-1]))
        return patch_centers((self.points.shape[0], self.points.shape[1]), size_hw).double()


def navi_grid(view: NaviView, side: int, box: bool, shrink: int) -> PosedGrid:
    """Read a photograph of NAVI, cut to a square.

    The shorter side becomes ``side``, the middle is kept, then a square around the object is cut
    and resized to ``side`` again, all by the nearest pixel; points move along with their pixels.

    Args:
        view: The photograph.
        side: Height and width of the image.
        box: Whether the square around the object is cut.
        shrink: Pixels of the image on a side of a cell of the grid.

    Returns:
        The view; K belongs to the image.

    Raises:
        EvalDataError: A file is missing or damaged, or the depth image is empty.
    """
    image, depth = read_picture(view.image), read_navi_depth(view.depth)
    _same_shape(view.image, image, view.depth, depth)
    size = (int(depth.shape[0]), int(depth.shape[1]))
    camera = Camera.from_focal(view.focal, view.size_hw).resized(size)
    K = camera.K.double()
    points = _points(K, depth)
    stack = torch.cat([image.double(), points.permute(2, 0, 1)])
    h, w = (max(1, round(side * one / min(size))) for one in size)
    stack = _nearest(stack, (h, w))
    K = Camera(K, size).resized((h, w)).K
    x, y = (w - side) // 2, (h - side) // 2
    stack, K = _cut(stack, K, x, y, side)
    if not bool((stack[5] > 0).any()):
        raise EvalDataError(f"{view.depth}: has no depth in the image's middle; unpack it again.")
    if box:
        x, y, length = _square(stack[5] > 0)
        stack, K = _cut(stack, K, x, y, length)
        stack = _nearest(stack, (side, side))
        K = Camera(K, (length, length)).resized((side, side)).K
    grid = max(1, side // shrink)
    cells = _nearest(stack[3:], (grid, grid))
    return PosedGrid(stack[:3].float(), cells.permute(1, 2, 0), K)


def scannet_grid(
    image_file: Path,
    depth_file: Path,
    K: Float[Tensor, "3 3"],
    K_hw: SizeHW | None,
    size_hw: SizeHW,
    shrink: int,
) -> PosedGrid:
    """Read a frame of ScanNet.

    Args:
        image_file: The picture.
        depth_file: 16 bits, mm, of the same view, perhaps of another size.
        K: (3, 3) intrinsics, corner convention.
        K_hw: Height and width that K is for; the picture's own when None.
        size_hw: Height and width that the picture is resized to.
        shrink: Pixels of the image on a side of a cell of the grid.

    Returns:
        The view; the depth of a cell is that of the pixel at its centre.

    Raises:
        EvalDataError: A file is missing or damaged, there is no depth, or K does not fit.
    """
    image = read_picture(image_file)
    own = K_hw or (int(image.shape[-2]), int(image.shape[-1]))
    middle = K[:2, 2] / K.new_tensor([own[1], own[0]])
    if not bool(((middle > 0.25) & (middle < 0.75)).all()):
        raise EvalDataError(
            f"{image_file}: K has its principal point at {K[0, 2]:.0f}, {K[1, 2]:.0f}, which is "
            f"no middle of {own[1]}x{own[0]} px: K is of another size; use test.npz and "
            "intrinsics.npz."
        )
    depth = torch.from_numpy(read_16_bits(depth_file)) * _METRES
    h, w = max(1, size_hw[0] // shrink), max(1, size_hw[1] // shrink)
    cells = _nearest(depth[None], (h, w))[0]
    if not bool((cells > 0).any()):
        raise EvalDataError(f"{depth_file}: has no depth; unpack it again.")
    camera = Camera(K, own)
    points = _points(camera.resized((h, w)).K, cells)
    return PosedGrid(resize(image[None], size_hw)[0], points, camera.resized(size_hw).K)


def _points(K: Tensor, depth: Tensor) -> Tensor:
    """(h, w, 3) points of all pixels, 0 where depth is 0."""
    size = (int(depth.shape[0]), int(depth.shape[1]))
    xy = pixel_centers(size, dtype=torch.float64).reshape(-1, 2)
    return Camera(K, size).unproject(xy, depth.reshape(-1)).reshape(*size, 3)


def _nearest(stack: Tensor, size_hw: SizeHW) -> Tensor:
    return resize(stack[None], size_hw, "nearest")[0]


def _cut(stack: Tensor, K: Tensor, x: int, y: int, side: int) -> tuple[Tensor, Tensor]:
    K = K.clone()
    K[:2, 2] -= K.new_tensor([x, y])
    return crop(stack[None], (x, y), (side, side))[0], K


def _square(mask: Tensor) -> tuple[int, int, int]:
    """Left, top and side of the square around a mask, moved into its image."""
    y, x = mask.nonzero().unbind(1)
    left, top, right, bottom = int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1
    side = max(right - left, bottom - top)
    h, w = mask.shape
    left = min(max((left + right - side) // 2, 0), w - side)
    top = min(max((top + bottom - side) // 2, 0), h - side)
    return left, top, side


def _same_shape(image_file: Path, image: Tensor, depth_file: Path, depth: Tensor) -> None:
    if tuple(image.shape[-2:]) != tuple(depth.shape):
        raise EvalDataError(
            f"{depth_file} is {depth.shape[1]}x{depth.shape[0]} px, but {image_file} is "
            f"{image.shape[2]}x{image.shape[1]}: make both smaller, or neither."
        )
