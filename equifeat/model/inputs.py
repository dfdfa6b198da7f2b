"""What users have as images (tensors, arrays, PIL images, files, lists of them) → one batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from equifeat.errors import ImageError, KeypointError
from equifeat.geometry.pixels import SizeHW, inside
from equifeat.image_files import read_pixels, rgb_pixels
from equifeat.model.feature_map import FeatureMap
from equifeat.video_files import Frame, VideoFrames

OneImage: TypeAlias = Tensor | NDArray[Any] | Image.Image | str | Path
"""An image: a tensor (3, H, W), an array (H, W), (H, W, 3) or (H, W, 4), a PIL image, a file."""
Images: TypeAlias = OneImage | Sequence[OneImage]
"""An image, a batch as a tensor (B, 3, H, W) or array (B, H, W, 3), or a list of images."""
Points: TypeAlias = Tensor | NDArray[Any]
"""Points as (B, N, 2) xy in pixels, or (N, 2) for a single image."""
ManyImages: TypeAlias = OneImage | VideoFrames | Iterable[OneImage | Frame | VideoFrames]
"""A file, folder or glob pattern, a video, a batch, or whatever gives images when iterated."""


class ImageFeatures(NamedTuple):
    """The features of one of many images.

    Attributes:
        name: Its file, a video's file with `#` and the frame's number among those taken, or its
            number among the given images.
        maps: Its features, a batch of one.
        time_s: Seconds since its video's first frame; None for what is no frame.
    """

    name: str
    maps: FeatureMap
    time_s: float | None = None


_CHANNELS = (1, 3, 4)


def gather(images: Any) -> Tensor:
    """Make one batch of what a user gives, without a copy where it is one already.

    Args:
        images: See `Images`. Files are read as `equifeat.image_files.read_image` does.

    Returns:
        (B, 3, H, W) RGB: uint8, or floats in [0, 1]; where the images are.

    Raises:
        ImageError: Something is no image, its layout or range is in doubt, or sizes differ.
    """
    if isinstance(images, Tensor) or not _is_list(images):
        return _checked(_batch_of(images))
    if not len(images):
        raise ImageError("the list of images is empty")
    batches = [_checked(_batch_of(image), f"image {k}: ") for k, image in enumerate(images)]
    sizes = [size_of(batch) for batch in batches]
    other = next((k for k, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        (h0, w0), (h1, w1) = sizes[0], sizes[other]
        raise ImageError(
            f"image 0 is {w0} x {h0} px but image {other} is {w1} x {h1}: dense_many() takes "
            "images of different sizes"
        )
    if len({(batch.dtype, batch.device) for batch in batches}) > 1:
        device = batches[0].device
        batches = [unit_floats(batch, device).to(device).float() for batch in batches]
    return torch.cat(batches)


def unit_floats(batch: Tensor, device: torch.device) -> Tensor:
    """Turn 0 … 255 into floats in [0, 1], on the device: bytes are quicker to move.

    Args:
        batch: uint8, or floats that stay as they are, on their device.
        device: Where bytes go before they become floats.

    Returns:
        Floats of the same shape.
    """
    if batch.is_floating_point():
        return batch
    return batch.to(device, non_blocking=True).float().div_(255.0)


def size_of(batch: Tensor) -> SizeHW:
    """Return height and width of a batch.

    Args:
        batch: (B, 3, H, W).

    Returns:
        Height and width in pixels.
    """
    return int(batch.shape[-2]), int(batch.shape[-1])


def keypoints_of(keypoints: Points, batch: int, size_hw: SizeHW) -> Tensor:
    """Check points and make them floats.

    Args:
        keypoints: (B, N, 2) xy in pixels, a tensor or an array; (N, 2) for a single image.
        batch: Number of images.
        size_hw: Their height and width.

    Returns:
        (B, N, 2) floats.

    Raises:
        KeypointError: A point lies outside its image, or the shape is wrong.
    """
    points = keypoints
    if not isinstance(points, Tensor):
        points = torch.from_numpy(np.array(points, dtype=np.float32))
    points = points if points.is_floating_point() else points.float()
    points = points[None] if points.ndim == 2 and batch == 1 else points
    shape = tuple(points.shape)
    if len(shape) != 3 or shape[0] != batch or shape[2] != 2:
        raise KeypointError(f"keypoints must have the shape ({batch}, N, 2), not {shape}")
    outside = (~inside(points, size_hw)).nonzero()
    if len(outside):
        image, index = outside[0].tolist()
        x, y = points[image, index].tolist()
        raise KeypointError(
            f"keypoint {index} of image {image} at (x, y) = ({x:g}, {y:g}) lies outside the image "
            f"of width {size_hw[1]} and height {size_hw[0]}"
        )
    return points


def _is_list(images: Any) -> bool:
    return isinstance(images, Sequence) and not isinstance(images, str | bytes)


def _batch_of(image: Any) -> Tensor:
    """Return one thing as (B, 3, H, W), its range not checked."""
    if isinstance(image, Tensor):
        return image[None] if image.ndim == 3 and image.shape[0] == 3 else image
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, str | Path):
        return read_pixels(image)[None]
    if isinstance(image, Image.Image):
        try:
            return rgb_pixels(image)[None]
        except (OSError, SyntaxError, ValueError) as error:  # its file is read only now
            raise ImageError(f"the PIL image is damaged ({error}); save it anew") from error
    raise ImageError(
        f"an image must be a tensor, an array, a PIL image or a file's path, not {_kind(image)}"
    )


def _kind(image: Any) -> str:
    if _is_list(image):
        return "a list inside a list"
    hint = ": dense_many() takes what is iterated" if hasattr(image, "__iter__") else ""
    return f"{type(image).__name__}{hint}"


def _from_array(array: NDArray[Any]) -> Tensor:
    """Return a numpy array, channels last as everywhere but in torch, as (B, 3, H, W)."""
    shape = array.shape
    if array.ndim == 2:
        array = array[None, ..., None]
    elif array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or 0 in shape or array.shape[-1] not in _CHANNELS:
        swapped = len(shape) in (3, 4) and shape[-3] in _CHANNELS
        remedy = "; give channels-first images as a torch tensor" if swapped else ""
        raise ImageError(
            f"an array must have the shape (H, W), (H, W, 3), (H, W, 4) or (B, H, W, 3), not "
            f"{shape}{remedy}"
        )
    if len(shape) > 2 and shape[-3] in _CHANNELS:
        raise ImageError(
            f"an array of the shape {shape} may have its channels first or last: give a torch "
            "tensor, whose channels are first"
        )
    if array.dtype == np.uint16:
        array = array.astype(np.float32) / 65535.0
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ImageError(
            f"an array must be uint8, uint16, or floats in [0, 1], not {array.dtype}: convert it "
            "with astype"
        )
    if not array.flags.writeable or min(array.strides) < 0:  # torch would warn of the first
        array = array.copy()
    pixels = torch.from_numpy(array.astype(np.float32) if array.dtype.kind == "f" else array)
    if pixels.shape[-1] == 4:
        pixels = _on_black(pixels)
    return pixels.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)


def _on_black(rgba: Tensor) -> Tensor:
    """Return RGB with transparency made black; bytes are rounded as Pillow does."""
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if rgba.is_floating_point():
        return rgb * alpha
    return ((rgb.int() * alpha.int() + 127) // 255).to(torch.uint8)


def _checked(images: Tensor, name: str = "") -> Tensor:
    """Check shape, type and range of a batch."""
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3 or 0 in shape:
        last = len(shape) in (3, 4) and shape[-1] == 3
        remedy = ": move the channels with movedim(-1, -3)" if last else ""
        raise ImageError(f"{name}images must have the shape (B, 3, H, W), not {shape}{remedy}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ImageError(
            f"{name}images must be uint8 or floats in [0, 1], not {images.dtype}: convert them "
            "to uint8, or to floats divided by their largest value"
        )
    low, top = torch.stack(images.detach().aminmax()).tolist()
    # A little beyond is normal after augmentation; 0 … 255 and NaN are not.
    if not top <= 2.0:
        raise ImageError(
            f"{name}images must be floats in [0, 1], but the largest value is {top:g}: divide by "
            "255 if they are bytes"
        )
    if low < -1.0:
        raise ImageError(
            f"{name}images must be floats in [0, 1], but the smallest value is {low:g}: give them "
            "without normalisation, the model does it"
        )
    return images
