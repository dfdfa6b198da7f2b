"""Bootstrap intervals over objects, alone and paired: values in, intervals out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.seeding import torch_generator

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
        seed: See `bootstrap_interval`.
        samples: See `bootstrap_interval`.
        level: See `bootstrap_interval`.

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
