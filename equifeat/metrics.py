"""Metrics of dense matching, and bootstrap intervals over objects: tensors in, numbers out.

Every error is relative to a normaliser that must be printed beside the number: "box", the longer
side of the object's box in the target view, or "image", the longer side of the target image.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from equifeat.errors import CorrespondenceError, RecipeError
from equifeat.seeding import torch_generator

Normalizer = Literal["box", "image"]
THRESHOLDS = (0.05, 0.1, 0.2)
# Resampling weights are made for so many bootstrap samples at once.
_SAMPLES_AT_ONCE = 500


class Interval(NamedTuple):
    """A percentile bootstrap interval.

    Attributes:
        low: Lower end, the shape of one object's values, float64.
        high: Upper end.
    """

    low: Tensor
    high: Tensor


class PairedDifference(NamedTuple):
    """Mean difference of two models over the same objects, with its interval.

    Attributes:
        mean: Mean of (second - first) over objects, the shape of one object's values, float64.
        low: Lower end of the bootstrap interval.
        high: Upper end.
    """

    mean: Tensor
    low: Tensor
    high: Tensor


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
        normalizer: Length in pixels, see :func:`normalizer_px`.

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
        errors: (N,) relative errors of :func:`matching_errors`, N ≥ 1.

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
        errors: (N,) relative errors of :func:`matching_errors`.
        thresholds: Shares of the normaliser.

    Returns:
        One percentage a threshold.
    """
    return tuple(pck(errors, threshold) for threshold in thresholds)


def bootstrap_interval(
    values: Float[Tensor, "n *k"], *, seed: int = 0, samples: int = 2000, level: float = 0.95
) -> Interval:
    """Return the percentile bootstrap interval of the mean over objects.

    Objects are the unit that is resampled: pairs and pixels of one object are not independent.

    Args:
        values: (n_objects, ...) one value, or several, an object.
        seed: Seed of the resampling; equal seeds and counts give equal resamples.
        samples: Number of bootstrap samples.
        level: Coverage, between 0 and 1.

    Returns:
        Lower and upper end in the shape of one object's values. NaN with fewer than two objects:
        one object says nothing about others.

    Raises:
        RecipeError: samples or level make no sense.
    """
    if samples < 1 or not 0.0 < level < 1.0:
        raise RecipeError(
            f"bootstrap samples={samples} and level={level} must satisfy samples ≥ 1 and "
            "0 < level < 1."
        )
    n, shape = len(values), values.shape[1:]
    if n < 2:
        nan = torch.full(shape, float("nan"), dtype=torch.float64)
        return Interval(nan, nan.clone())
    flat = values.detach().cpu().double().reshape(n, -1)
    generator = torch_generator(seed)
    means = []
    for start in range(0, samples, _SAMPLES_AT_ONCE):
        count = min(_SAMPLES_AT_ONCE, samples - start)
        drawn = torch.randint(n, (count, n), generator=generator)
        weights = torch.zeros(count, n, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones_like(weights))
        means.append(weights @ flat / n)
    tail = (1.0 - level) / 2.0
    ends = torch.quantile(
        torch.cat(means), torch.tensor([tail, 1.0 - tail], dtype=torch.float64), dim=0
    )
    return Interval(ends[0].reshape(shape), ends[1].reshape(shape))


def paired_difference(
    first: Float[Tensor, "n *k"],
    second: Float[Tensor, "m *j"],
    *,
    seed: int = 0,
    samples: int = 2000,
    level: float = 0.95,
) -> PairedDifference:
    """Return the mean of (second - first) over objects with its bootstrap interval.

    The same objects are drawn for both models, so what makes an object hard cancels.

    Args:
        first: (n_objects, ...) values of the first model.
        second: (n_objects, ...) values of the second model on the same objects in the same order.
        seed: See :func:`bootstrap_interval`.
        samples: See :func:`bootstrap_interval`.
        level: See :func:`bootstrap_interval`.

    Returns:
        Mean difference, lower and upper end.

    Raises:
        RecipeError: The two have different shapes, or samples or level make no sense.
    """
    if first.shape != second.shape:
        raise RecipeError(
            f"values of shapes {tuple(first.shape)} and {tuple(second.shape)} cannot be paired: "
            "score both models on the same objects."
        )
    difference = second.detach().cpu().double() - first.detach().cpu().double()
    low, high = bootstrap_interval(difference, seed=seed, samples=samples, level=level)
    return PairedDifference(difference.mean(0), low, high)
