"""Correlation of two measures over models, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from equifeat.errors import RecipeError
from equifeat.seeding import numpy_generator


class Correlation(NamedTuple):
    """A correlation coefficient.

    Attributes:
        value: Between −1 and 1; NaN when one side is constant.
        low: Lower end of the 95 % bootstrap interval over the points.
        high: Upper end.
        points: Number of points.
    """

    value: float
    low: float
    high: float
    points: int


def correlation(
    x: Sequence[float], y: Sequence[float], *, seed: int = 0, samples: int = 2000
) -> tuple[Correlation, Correlation]:
    """Return Pearson's and Spearman's coefficient with intervals over points.

    With few points an interval is rough: resamples of fewer than two different points, or of a
    constant side, give no coefficient and are left out.

    Args:
        x: One value a point.
        y: The other.
        seed: Seed of the resampling.
        samples: Number of bootstrap samples.

    Returns:
        Pearson's and Spearman's.

    Raises:
        RecipeError: Different numbers of values.
    """
    if len(x) != len(y):
        raise RecipeError(f"{len(x)} and {len(y)} values cannot be correlated.")
    points = np.array([x, y], np.float64)
    points = points[:, np.isfinite(points).all(0)]
    n = points.shape[1]
    if n < 2:
        nothing = Correlation(math.nan, math.nan, math.nan, n)
        return nothing, nothing
    drawn = points[:, numpy_generator(seed).integers(0, n, (samples, n))]
    pearson = _pearson(drawn[0], drawn[1])
    spearman = _pearson(_ranks(drawn[0]), _ranks(drawn[1]))
    one = points[:, None]
    return (
        _with_ends(float(_pearson(one[0], one[1])[0]), pearson, n),
        _with_ends(float(_pearson(_ranks(one[0]), _ranks(one[1]))[0]), spearman, n),
    )


def _with_ends(value: float, drawn: NDArray[np.float64], n: int) -> Correlation:
    drawn = drawn[np.isfinite(drawn)]
    if math.isnan(value) or n < 3 or not len(drawn):
        return Correlation(value, math.nan, math.nan, n)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Correlation(value, float(low), float(high), n)


def _pearson(x: Float[np.ndarray, "b n"], y: Float[np.ndarray, "b n"]) -> Float[np.ndarray, "b"]:
    x, y = (v - v.mean(1, keepdims=True) for v in (x, y))
    scale = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    # rounding leaves a constant side slightly uneven
    flat = scale <= 1e-12 * np.maximum(1.0, np.abs(x).max(1) * np.abs(y).max(1))
    return np.where(flat, np.nan, (x * y).sum(1) / np.where(flat, 1.0, scale)).clip(-1.0, 1.0)


def _ranks(values: Float[np.ndarray, "b n"]) -> Float[np.ndarray, "b n"]:
    """Ranks from 1; equal values share the mean of theirs."""
    below = (values[:, :, None] > values[:, None, :]).sum(2)
    equal = (values[:, :, None] == values[:, None, :]).sum(2)
    ranks: NDArray[np.float64] = below + (equal + 1) / 2.0
    return ranks
