"""Metrics of dense matching: tensors in, numbers out.

Every error is relative to a normaliser that must be printed beside the number: "box", the longer
side of the object's box in the target view, or "image", the longer side of the target image.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from equifeat.errors import CorrespondenceError, RecipeError

Normalizer = Literal["box", "image"]
THRESHOLDS = (0.05, 0.1, 0.2)


def box_normalizer(mask: Bool[Tensor, "h w"] | Float[Tensor, "h w"]) -> float:
    """Return the longer side of the object's box in pixels.

    Args:
        mask: (H, W) mask of the object, or its depth with 0 = background.

    Returns:
        max(width, height) of the tight box around the object, corner to corner.

    Raises:
        CorrespondenceError: The mask is empty.
    """
    solid = mask > 0
    sides = []
    for axis in (0, 1):
        index = solid.any(dim=axis).nonzero()
        if not len(index):
            raise CorrespondenceError(
                f"the mask of {tuple(mask.shape)} pixels is empty, so the object has no box; "
                'choose views that show it or the normaliser "image".'
            )
        sides.append(int(index[-1]) - int(index[0]) + 1)
    return float(max(sides))


def normalizer_px(
    mask: Bool[Tensor, "h w"] | Float[Tensor, "h w"], normalizer: Normalizer = "box"
) -> float:
    """Return the length in pixels that errors in a target view are divided by.

    Args:
        mask: (H, W) mask or depth of the target view.
        normalizer: "box" or "image".

    Returns:
        Longer side of the object's box, or of the image, in pixels.

    Raises:
        CorrespondenceError: The mask is empty and the normaliser is "box".
        RecipeError: The normaliser is unknown.
    """
    if normalizer == "image":
        return float(max(mask.shape))
    if normalizer == "box":
        return box_normalizer(mask)
    raise RecipeError(f"the normaliser {normalizer!r} is unknown: use 'box' or 'image'.")


def matching_errors(
    xy_pred: Float[Tensor, "n 2"], xy_true: Float[Tensor, "n 2"], normalizer: float
) -> Float[Tensor, "n"]:
    """Return distances of predicted to true points, relative to a length.

    Args:
        xy_pred: (N, 2) predicted pixels.
        xy_true: (N, 2) true pixels.
        normalizer: Length in pixels, see `normalizer_px`.

    Returns:
        (N,) errors; 0.05 is five percent of the normaliser.

    Raises:
        RecipeError: The normaliser is not positive.
    """
    if not normalizer > 0:
        raise RecipeError(f"the normaliser is {normalizer} px, but it must be greater than 0.")
    distance: Tensor = (xy_pred - xy_true).norm(dim=-1)
    return distance / normalizer


def ape(errors: Float[Tensor, "n"]) -> float:
    """Return the average pixel error (APE).

    Args:
        errors: (N,) relative errors of `matching_errors`, N ≥ 1.

    Returns:
        Mean error in percent of the normaliser; NaN when there is no error.
    """
    return 100.0 * float(errors.double().mean())


def pck(errors: Float[Tensor, "n"], threshold: float) -> float:
    """Return the percentage of correct keypoints (PCK): errors at most a threshold.

    Args:
        errors: (N,) relative errors.
        threshold: Largest error that counts as correct, in the errors' unit.

    Returns:
        Share in percent, 0 to 100; NaN when there is no error.
    """
    return 100.0 * float((errors <= threshold).double().mean())


def pcdp(
    errors: Float[Tensor, "n"], thresholds: tuple[float, ...] = THRESHOLDS
) -> tuple[float, ...]:
    """Return the percentage of correct dense points (PCDP) at several thresholds.

    Args:
        errors: (N,) relative errors of `matching_errors`.
        thresholds: Shares of the normaliser.

    Returns:
        One percentage a threshold.
    """
    return tuple(pck(errors, threshold) for threshold in thresholds)
