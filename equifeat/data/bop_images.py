"""Read the depth images and masks of a data set in the format of BOP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, UnidentifiedImageError

from equifeat.data.bop import BopImage
from equifeat.errors import EvalDataError

_MAX_PIXELS = 200_000_000


def read_depth(image: BopImage) -> Float[torch.Tensor, "h w"] | None:
    """Read the depth of an image.

    Args:
        image: The image.

    Returns:
        (H, W) float32 z-depth in mm, 0 where there is none; None without a file.

    Raises:
        EvalDataError: The file cannot be read.
    """
    file = image.depth()
    if file is None:
        return None
    values = _pixels(file)
    if values.ndim != 2:
        raise EvalDataError(f"{file}: has several channels; a depth image has one.")
    # the toolkit reads to float32 and multiplies then
    return torch.from_numpy(values.astype(np.float32)) * image.depth_scale


def read_mask(file: Path) -> Bool[torch.Tensor, "h w"]:
    """Read a mask.

    Args:
        file: A picture that is not 0 on the object.

    Returns:
        (H, W) bool.

    Raises:
        EvalDataError: The file cannot be read.
    """
    values = _pixels(file)
    return torch.from_numpy((values if values.ndim == 2 else values[..., 0]) > 0)


def _pixels(file: Path) -> Any:
    try:
        with Image.open(file) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise EvalDataError(
                    f"{file}: {image.width}x{image.height} px is more than {_MAX_PIXELS} pixels; "
                    "give a smaller one."
                )
            return np.array(image.convert("L") if image.mode in ("1", "P") else image)
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        raise EvalDataError(f"{file}: damaged image ({error}); unpack it again.") from error
