"""A square window around an object, resized to the model's input; black outside the image."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.geometry.camera import Camera
from equifeat.geometry.pixels import pixel_centers, resize, scale_xy


class ObjectCrop(NamedTuple):
    """A window of an image.

    Attributes:
        image: (1, 3, S, S) RGB in [0, 1].
        corner_xy: Column and row of the window's first pixel in the image; may be negative.
        side: Side of the window in pixels of the image.
    """

    image: Tensor
    corner_xy: tuple[int, int]
    side: int

    @property
    def size(self) -> int:
        """Side S of the crop in its own pixels."""
        return int(self.image.shape[-1])

    def to_image(self, xy: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Carry points of the crop to the image.

        Args:
            xy: (N, 2) pixels of the crop.

        Returns:
            (N, 2) pixels of the image.
        """
        whole = scale_xy(xy, (self.size, self.size), (self.side, self.side))
        return whole + xy.new_tensor(self.corner_xy)

    def from_image(self, xy: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Carry points of the image to the crop.

        Args:
            xy: (N, 2) pixels of the image.

        Returns:
            (N, 2) pixels of the crop.
        """
        inside = xy - xy.new_tensor(self.corner_xy)
        return scale_xy(inside, (self.side, self.side), (self.size, self.size))

    def camera(self, K: Float[Tensor, "3 3"]) -> Camera:
        """Return the camera of the crop.

        Args:
            K: (3, 3) intrinsics of the image, corner convention.

        Returns:
            The camera whose image is the crop.
        """
        moved = K.clone()
        moved[:2, 2] -= K.new_tensor(self.corner_xy)
        return Camera(moved, (self.side, self.side)).resized((self.size, self.size))

    def grid(self, stride: int) -> Float[Tensor, "n 2"]:
        """Return points every so many pixels, centred in the crop.

        Args:
            stride: Pixels of the crop from one point to the next.

        Returns:
            (N, 2) pixels of the crop.
        """
        count = max(1, self.size // stride)
        return (pixel_centers((count, count)) * (self.size / count)).reshape(-1, 2)


def crop_object(
    image: Float[Tensor, "3 h w"],
    box: tuple[float, float, float, float],
    margin: float,
    size: int,
) -> ObjectCrop:
    """Cut a square around a box and resize it.

    Args:
        image: RGB in [0, 1].
        box: Left, top, right, bottom in pixels.
        margin: Side of the square over the longer side of the box.
        size: Side S of the result in pixels.

    Returns:
        The crop.
    """
    left, top, right, bottom = box
    side = max(2, math.ceil(max(right - left, bottom - top) * margin))
    x = math.floor((left + right - side) / 2 + 0.5)
    y = math.floor((top + bottom - side) / 2 + 0.5)
    h, w = image.shape[-2:]
    window = image.new_zeros(3, side, side)
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + side, w), min(y + side, h)
    if x1 > x0 and y1 > y0:
        window[:, y0 - y : y1 - y, x0 - x : x1 - x] = image[:, y0:y1, x0:x1]
    resized = resize(window[None], (size, size)).clamp(0.0, 1.0)
    return ObjectCrop(resized, (x, y), side)


def box_of(mask: Tensor) -> tuple[float, float, float, float] | None:
    """Return the box of a mask.

    Args:
        mask: (H, W) bool.

    Returns:
        Left, top, right, bottom in pixels; None for an empty mask.
    """
    at = torch.nonzero(mask)
    if not len(at):
        return None
    (top, left), (bottom, right) = at.amin(dim=0).tolist(), at.amax(dim=0).tolist()
    return float(left), float(top), float(right + 1), float(bottom + 1)
