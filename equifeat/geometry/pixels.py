"""THE pixel convention: every resize, normalisation and sampling of the project is here.

Convention:
    Pixels are (x, y) floats. The image's top-left corner is (0, 0), the first pixel's centre is
    (0.5, 0.5), the bottom-right corner is (W, H).

    >>> import torch
    >>> pixel_centers((1, 2))
    tensor([[[0.5000, 0.5000],
             [1.5000, 0.5000]]])
    >>> normalize_xy(torch.tensor([[0.0, 0.0], [640.0, 480.0], [320.0, 240.0]]), (480, 640))
    tensor([[-1., -1.],
            [ 1.,  1.],
            [ 0.,  0.]])
    >>> scale_xy(torch.tensor([[0.5, 0.5]]), (480, 640), (240, 320))
    tensor([[0.2500, 0.2500]])
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int, Num
from torch import Tensor

SizeHW = tuple[int, int]
TracedHW = tuple[int | torch.SymInt, int | torch.SymInt]
"""A size inside a trace of torch.export, where a free side is a symbol."""
MarginYX = tuple[float, float]
"""Pixels of an image that a map leaves uncovered: at top and bottom each, at left and right."""


def pixel_centers(
    size_hw: SizeHW, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "h w 2"]:
    """Return the centres of all pixels.

    Args:
        size_hw: Height and width.
        device: Device of the result.
        dtype: Floating type of the result; torch's default when None.

    Returns:
        (H, W, 2) xy in pixels, (0.5, 0.5) first.
    """
    dtype = dtype or torch.get_default_dtype()
    y = torch.arange(size_hw[0], device=device, dtype=dtype) + 0.5
    x = torch.arange(size_hw[1], device=device, dtype=dtype) + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def patch_centers(
    grid_hw: SizeHW,
    size_hw: SizeHW,
    device: torch.device | str | None = None,
    margin_yx: MarginYX = (0.0, 0.0),
) -> Float[Tensor, "h w 2"]:
    """Return the centres of a grid of patches that covers an image, in the image's pixels.

    Args:
        grid_hw: Rows and columns of patches.
        size_hw: Height and width of the image.
        device: Device of the result.
        margin_yx: What the grid leaves uncovered on each side, in pixels of the image.

    Returns:
        (h, w, 2) xy in pixels of the image.

    Convention:
        Patches of 4 pixels that start every 2 pixels in an image of 8 × 4:

        >>> patch_centers((1, 3), (4, 8), margin_yx=(1.0, 1.0))
        tensor([[[2., 2.],
                 [4., 2.],
                 [6., 2.]]])
    """
    centers = pixel_centers(grid_hw, device)
    if not any(margin_yx):
        return scale_xy(centers, grid_hw, size_hw)
    inner_h, inner_w = _without_margin(size_hw, margin_yx)
    stride = centers.new_tensor([inner_w / grid_hw[1], inner_h / grid_hw[0]])
    return centers * stride + centers.new_tensor(margin_yx[::-1])


def pixel_index(xy: Float[Tensor, "*b 2"]) -> Int[Tensor, "*b 2"]:
    """Return the integer (column, row) of the pixel that holds each point.

    Args:
        xy: Points in pixels.

    Returns:
        floor(xy) as int64, in (x, y) order. Points on the right or bottom border fall outside.

    Convention:
        >>> pixel_index(torch.tensor([[0.0, 0.99], [1.0, 2.5]]))
        tensor([[0, 0],
                [1, 2]])
    """
    return torch.floor(xy).long()


def from_integer_centers(xy: Float[Tensor, "*b 2"]) -> Float[Tensor, "*b 2"]:
    """Convert from the convention where the first pixel's centre is (0, 0) (OpenCV, kornia).

    Args:
        xy: Points whose first pixel centre is (0, 0).

    Returns:
        The same points in the project's convention.

    Convention:
        >>> from_integer_centers(torch.tensor([[0.0, 3.0]]))
        tensor([[0.5000, 3.5000]])
    """
    return xy + 0.5


def to_integer_centers(xy: Float[Tensor, "*b 2"]) -> Float[Tensor, "*b 2"]:
    """Convert to the convention where the first pixel's centre is (0, 0) (OpenCV, kornia).

    Args:
        xy: Points in the project's convention.

    Returns:
        The same points, shifted by half a pixel.

    Convention:
        >>> to_integer_centers(torch.tensor([[0.5, 3.5]]))
        tensor([[0., 3.]])
    """
    return xy - 0.5


def scale_xy(xy: Float[Tensor, "*b 2"], from_hw: SizeHW, to_hw: SizeHW) -> Float[Tensor, "*b 2"]:
    """Carry points from an image to its resized version: a multiplication.

    Args:
        xy: Points in pixels of the image of size from_hw.
        from_hw: Height and width of that image.
        to_hw: Height and width of the resized image.

    Returns:
        Points in pixels of the resized image.
    """
    return xy * xy.new_tensor([to_hw[1] / from_hw[1], to_hw[0] / from_hw[0]])


def normalize_xy(
    xy: Float[Tensor, "*b 2"], size_hw: TracedHW | tuple[float, float]
) -> Float[Tensor, "*b 2"]:
    """Map pixels to [-1, 1], corners to ±1 (align_corners=False): 2x/W - 1.

    Args:
        xy: Points in pixels.
        size_hw: Height and width of the image; a part of an image may have broken ones.

    Returns:
        Normalised points.
    """
    # Two products, because a tensor of two numbers would freeze symbols of torch.export.
    by_y, by_x = (cast(float, 2.0 / side) for side in size_hw)
    x, y = xy.unbind(-1)
    return torch.stack([x * by_x, y * by_y], dim=-1) - 1.0


def denormalize_xy(xy: Float[Tensor, "*b 2"], size_hw: SizeHW) -> Float[Tensor, "*b 2"]:
    """Invert `normalize_xy`.

    Args:
        xy: Points in [-1, 1].
        size_hw: Height and width of the image.

    Returns:
        Points in pixels.
    """
    return (xy + 1.0) * xy.new_tensor([size_hw[1] / 2.0, size_hw[0] / 2.0])


def inside(xy: Float[Tensor, "*b 2"], size_hw: SizeHW) -> Tensor:
    """Return which points lie in the image: 0 ≤ x < W and 0 ≤ y < H.

    Args:
        xy: Points in pixels.
        size_hw: Height and width of the image.

    Returns:
        Booleans, one a point.
    """
    x, y = xy.unbind(-1)
    return (x >= 0) & (y >= 0) & (x < size_hw[1]) & (y < size_hw[0])


def sample(
    features: Float[Tensor, "b d h w"],
    xy: Float[Tensor, "b n 2"],
    size_hw: TracedHW,
    mode: Literal["bilinear", "nearest"] = "bilinear",
    margin_yx: MarginYX = (0.0, 0.0),
) -> Float[Tensor, "b n d"]:
    """Sample a map that covers an image at points given in the image's pixels.

    The map may have any resolution: its corners are the image's corners, or lie a margin inside
    of them. Points outside take the border's value.

    Args:
        features: The map.
        xy: Points in pixels of the image.
        size_hw: Height and width of the image, not of the map.
        mode: Interpolation.
        margin_yx: What the map leaves uncovered on each side, in pixels of the image.

    Returns:
        One row of D values a point.

    Convention:
        The centre of the first of two pixels gives that pixel; the middle gives the mean.

        >>> row = torch.tensor([[[[1.0, 3.0]]]])
        >>> sample(row, torch.tensor([[[0.5, 0.5], [1.0, 0.5]]]), (1, 2))[0, :, 0]
        tensor([1., 2.])
    """
    covered: TracedHW | tuple[float, float] = size_hw
    if any(margin_yx):
        xy, covered = (
            xy - xy.new_tensor(margin_yx[::-1]),
            _without_margin(cast(SizeHW, size_hw), margin_yx),
        )
    grid = normalize_xy(xy, covered).to(features.dtype).unsqueeze(2)
    out = F.grid_sample(features, grid, mode=mode, padding_mode="border", align_corners=False)
    return out.squeeze(-1).transpose(1, 2)


class LinearTaps(NamedTuple):
    """Which two cells of a map bilinear sampling mixes at some places along one axis.

    Attributes:
        low: (K,) int64, the cell before each place.
        high: (K,) int64, the cell after it.
        weight: (K,) share of the cell after it, in [0, 1).
    """

    low: Tensor
    high: Tensor
    weight: Tensor


def linear_taps(
    places: Float[Tensor, "k"], cells: int, length: float, margin: float = 0.0
) -> LinearTaps:
    """Return what `sample` does along one axis, for those who mix something else instead.

    Args:
        places: Points along the axis, in pixels of the image.
        cells: Cells of the map along the axis.
        length: Size of the image along the axis.
        margin: What the map leaves uncovered on each side, in pixels of the image.

    Returns:
        Cells and weights; places outside take the border's cell.

    Convention:
        >>> low, high, weight = linear_taps(torch.tensor([0.5, 1.0, 1.75, 9.0]), 2, 2.0)
        >>> low.tolist(), high.tolist(), weight.tolist()
        ([0, 0, 1, 1], [1, 1, 1, 1], [0.0, 0.5, 0.0, 0.0])
    """
    stride = (length - 2.0 * margin) / cells
    at = ((places - margin) / stride - 0.5).clamp(0.0, cells - 1.0)
    low = at.floor().long()
    return LinearTaps(low, (low + 1).clamp(max=cells - 1), at - low)


def resize(
    image: Num[Tensor, "b c h w"],
    size_hw: SizeHW,
    mode: Literal["bilinear", "bicubic", "nearest"] = "bilinear",
    antialias: bool = True,
) -> Num[Tensor, "b c h2 w2"]:
    """Resize an image or a map; its corners stay its corners.

    Args:
        image: What to resize; uint8 on the CPU is many times faster and is rounded to uint8.
        size_hw: New height and width.
        mode: Interpolation; "nearest" takes the pixel that holds the new pixel's centre.
        antialias: Low-pass before shrinking (not for "nearest").

    Returns:
        The resized image; the same tensor when the size is already right.
    """
    if tuple(image.shape[-2:]) == tuple(size_hw):
        return image
    if mode == "nearest":
        return F.interpolate(image, size_hw, mode="nearest-exact")
    return F.interpolate(image, size_hw, mode=mode, align_corners=False, antialias=antialias)


def _without_margin(size_hw: SizeHW, margin_yx: MarginYX) -> tuple[float, float]:
    return size_hw[0] - 2.0 * margin_yx[0], size_hw[1] - 2.0 * margin_yx[1]


def resize_by_factor(
    grid: Float[Tensor, "b c h w"], factor_hw: tuple[float, float]
) -> Float[Tensor, "b c h2 w2"]:
    """Resize bicubically by a scale factor that is also used to place the samples.

    DINOv2's own code resamples its position embedding so, with (h + 0.1)/37: not a convention of
    this project, only there to reproduce imported checkpoints.

    Args:
        grid: The map.
        factor_hw: Scale of height and width; the new size is floor(size * factor).

    Returns:
        The resized map.
    """
    return F.interpolate(grid, scale_factor=factor_hw, mode="bicubic", align_corners=False)


def crop(image: Float[Tensor, "b c h w"], top_left_xy: tuple[int, int], size_hw: SizeHW) -> Tensor:
    """Cut a window out of an image; points move by minus the window's corner.

    Args:
        image: What to cut.
        top_left_xy: Column and row of the window's first pixel.
        size_hw: Height and width of the window.

    Returns:
        The window, a view of the input.

    Raises:
        ValueError: The window leaves the image.
    """
    x, y = top_left_xy
    h, w = size_hw
    if x < 0 or y < 0 or y + h > image.shape[-2] or x + w > image.shape[-1]:
        size = tuple(image.shape[-2:])
        raise ValueError(f"window {top_left_xy}+{size_hw} leaves the image of {size}")
    return image[..., y : y + h, x : x + w]
