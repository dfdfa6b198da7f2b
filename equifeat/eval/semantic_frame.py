"""How a picture of a semantic pair is shown to the model: padded, stretched or as it is."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.geometry.pixels import SizeHW

Fit = Literal["pad", "corner", "stretch", "own"]
_MAX_SIDE = 8192


class Frame(NamedTuple):
    """Where a picture lies in what the model sees.

    Attributes:
        size_hw: Height and width of what the model sees.
        content_hw: Height and width of the picture in it.
        scale_xy: Factors of x and y.
        offset_xy: Column and row of the picture's corner.
    """

    size_hw: SizeHW
    content_hw: SizeHW
    scale_xy: tuple[float, float]
    offset_xy: tuple[int, int]

    def carry(self, xy: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Carry points of the picture into the frame.

        Args:
            xy: (N, 2) pixels of the picture.

        Returns:
            (N, 2) pixels of the frame.
        """
        return xy * xy.new_tensor(self.scale_xy) + xy.new_tensor(self.offset_xy)

    def back(self, xy: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Carry points of the frame into the picture: the inverse of `carry`.

        Args:
            xy: (N, 2) pixels of the frame.

        Returns:
            (N, 2) pixels of the picture.
        """
        return (xy - xy.new_tensor(self.offset_xy)) / xy.new_tensor(self.scale_xy)


def frame_of(size_hw: SizeHW, fit: Fit, side: int) -> Frame:
    """Place a picture in its frame.

    Args:
        size_hw: Height and width of the picture.
        fit: "pad": longer side to ``side``, centred in a square (3DCorrEnhance, evaluate.py and
            utils/functions.py: the shorter side is rounded, points take the longer side's factor);
            "corner": the same at the top-left corner (Probe3D); "stretch": both sides to ``side``
            (DHPF); "own": as it is.
        side: Side of the square in pixels.

    Returns:
        The frame.

    Raises:
        RecipeError: The side makes no sense.
    """
    h, w = size_hw
    if fit == "own":
        return Frame(size_hw, size_hw, (1.0, 1.0), (0, 0))
    if not 1 <= side <= _MAX_SIDE:
        raise RecipeError(f"side={side} must be 1 to {_MAX_SIDE} pixels.")
    square = (side, side)
    if fit == "stretch":
        return Frame(square, square, (side / w, side / h), (0, 0))
    factor = side / max(h, w)
    # np.around rounds halves to even, as the reference does
    content = tuple(
        side if n == max(h, w) else max(1, int(np.around(side * n / max(h, w)))) for n in (h, w)
    )
    offset = (0, 0)
    if fit == "pad":
        offset = ((side - content[1]) // 2, (side - content[0]) // 2)
    return Frame(square, (content[0], content[1]), (factor, factor), offset)


def show(image: Float[Tensor, "3 h w"], frame: Frame, fill: int = 0) -> Float[Tensor, "3 h2 w2"]:
    """Draw a picture into its frame, resized by Pillow's Lanczos filter as the reference does.

    Args:
        image: RGB in [0, 1].
        frame: Its frame.
        fill: Grey value of the padding, 0 to 255.

    Returns:
        RGB in [0, 1].

    Raises:
        RecipeError: The fill is no grey value.
    """
    if not 0 <= fill <= 255:
        raise RecipeError(f"fill={fill} must be 0 to 255.")
    if frame.size_hw == tuple(image.shape[-2:]):
        return image
    h, w = frame.content_hw
    if (h, w) != tuple(image.shape[-2:]):
        bytes_hwc = (image * 255.0).round().byte().permute(1, 2, 0).numpy()
        resized = Image.fromarray(bytes_hwc).resize((w, h), Image.Resampling.LANCZOS)
        image = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255.0
    x, y = frame.offset_xy
    out = image.new_full((3, *frame.size_hw), fill / 255.0)
    out[:, y : y + h, x : x + w] = image
    return out
