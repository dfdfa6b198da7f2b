"""Areas under recall curves, and mean matching accuracy.

The area is SuperGlue's (Sarlin et al., CVPR 2020; github.com/magicleap/SuperGluePretrainedNetwork,
models/utils.py, pose_auc): recall over error as straight lines from (0, 0) through one point an
error, flat from the last error below the limit to the limit. LightGlue and glue-factory compute the
same for homographies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from equifeat.errors import RecipeError


def auc(errors: ArrayLike, limit: float) -> float:
    """Return the area under the recall curve up to an error.

    Args:
        errors: One error a pair, not negative; infinite for a failure.
        limit: Largest error, in the errors' unit.

    Returns:
        The area in percent of the full one, 0 to 100; NaN when there is no error.

    Raises:
        RecipeError: The limit is not positive, or an error is negative or NaN.
    """
    found = np.sort(np.asarray(errors, np.float64).reshape(-1))
    if not limit > 0:
        raise RecipeError(f"the limit of an area is {limit}, but it must be greater than 0.")
    if not len(found):
        return float("nan")
    if not (found >= 0).all():
        raise RecipeError("errors of a recall curve must be 0 or more; failures are infinite.")
    below = found[: np.searchsorted(found, limit)]
    recall = np.arange(len(below) + 1) / len(found)
    x = np.concatenate([[0.0], below, [limit]])
    y = np.concatenate([recall, recall[-1:]])
    area = ((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2.0).sum()
    return 100.0 * float(area) / limit


def matching_accuracy(errors: Float[Tensor, "n"], thresholds: Sequence[float]) -> tuple[float, ...]:
    """Return the share of matches within each threshold (matching accuracy; its mean is MMA).

    As D2-Net's evaluation (github.com/mihaidusmanu/d2-net, hpatches_sequences): at most the
    threshold, and an image pair without matches counts as 0.

    Args:
        errors: (N,) error of each match.
        thresholds: In the errors' unit.

    Returns:
        One percentage a threshold.
    """
    if not len(errors):
        return (0.0,) * len(thresholds)
    return tuple(100.0 * float((errors <= t).double().mean()) for t in thresholds)
