"""Linear probes in closed form: ridge regression from sums, so no feature is ever kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import EvalDataError, RecipeError

# Of channels with variance 1; the one with the smallest error on held-out groups is taken.
PENALTIES = tuple(10.0**k for k in range(-4, 4))


class Moments:
    """Sums over patches of features, targets and their products: all that ridge regression needs.

    Attributes:
        count: Number of patches N.
        sums: (D + T,) sums of the D channels and the T targets.
        products: (D + T, D + T) sums of their products.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sums = torch.zeros((), dtype=torch.float64)
        self.products = torch.zeros((), dtype=torch.float64)

    def add(self, features: Float[Tensor, "n d"], targets: Float[Tensor, "n t"]) -> None:
        """Take in some patches.

        Args:
            features: (N, D) features.
            targets: (N, T) what they are to tell.

        Raises:
            RecipeError: A feature is not finite.
        """
        both = torch.cat([features.double(), targets.double()], dim=1)
        if not bool(both.isfinite().all()):
            raise RecipeError(
                "the model gives features that are not finite, so no probe can be fitted: look "
                "at its weights and its precision."
            )
        self.count += len(both)
        self.sums = self.sums + both.sum(0)
        self.products = self.products + both.mT @ both

    def __add__(self, other: Moments) -> Moments:
        out = Moments()
        out.count = self.count + other.count
        out.sums = self.sums + other.sums
        out.products = self.products + other.products
        return out

    def centred(self) -> tuple[Tensor, Tensor]:
        """Return what all patches have in common and how they vary.

        Returns:
            (D + T,) means and (D + T, D + T) covariances.
        """
        mean = self.sums / self.count
        return mean, self.products / self.count - torch.outer(mean, mean)


class Probe(NamedTuple):
    """A linear map from features to targets.

    Attributes:
        weight: (D, T).
        bias: (T,).
        penalty: The ridge penalty, of channels with variance 1.
    """

    weight: Tensor
    bias: Tensor
    penalty: float

    def __call__(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n t"]:
        """Return what the features tell, in float64.

        Args:
            features: (N, D) features as the model gives them.

        Returns:
            (N, T) predictions.
        """
        return features.double() @ self.weight + self.bias


def is_held_out(number: int, count: int) -> bool:
    """Return whether a group of patches is kept back to choose the penalty.

    Args:
        number: Number of the group (an object, or a view of it), from 0.
        count: How many groups there are.

    Returns:
        True for every fourth group; of fewer than four, for the last one.
    """
    return number % 4 == 3 if count >= 4 else number == count - 1


def fit_probe(kept: Moments, held: Moments, targets: int) -> Probe:
    """Fit a probe to all patches, with the penalty that is best for the held-out ones.

    Channels are standardised by the mean and deviation of what is fitted, so the scale of features
    does not matter; constant channels get no weight.

    Args:
        kept: Patches of the groups that are not held out.
        held: Patches of the held-out groups.
        targets: Number of targets T.

    Returns:
        The probe.

    Raises:
        EvalDataError: There are no patches.
    """
    if not kept.count or not held.count:
        raise EvalDataError(
            "the training views show no patch of the object that a probe could be fitted to: take "
            "more of them, or larger ones."
        )
    errors = [_error(_solve(kept, targets, penalty), held, targets) for penalty in PENALTIES]
    best = PENALTIES[int(torch.stack(errors).argmin())]
    return _solve(kept + held, targets, best)


def _solve(moments: Moments, targets: int, penalty: float) -> Probe:
    mean, cov = moments.centred()
    d = len(mean) - targets
    variance = cov.diagonal()[:d]
    # Sums leave a constant channel a variance of rounding errors.
    alive = variance > 1e-12 * (mean[:d] ** 2 + variance)
    scale = torch.where(alive, variance.clamp(min=0.0).sqrt(), float("inf")).reciprocal()
    matrix = cov[:d, :d] * torch.outer(scale, scale)
    matrix += penalty * torch.eye(d, dtype=matrix.dtype)
    right = cov[:d, d:] * scale[:, None]
    solved = torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
    weight = solved * scale[:, None]
    return Probe(weight, mean[d:] - mean[:d] @ weight, penalty)


def _error(probe: Probe, moments: Moments, targets: int) -> Tensor:
    """Mean squared error of all targets, from sums alone."""
    mean, cov = moments.centred()
    d, w = len(mean) - targets, probe.weight
    varying = cov[d:, d:] - 2.0 * w.mT @ cov[:d, d:] + w.mT @ cov[:d, :d] @ w
    constant = mean[d:] - mean[:d] @ w - probe.bias
    return varying.diagonal().sum() + (constant**2).sum()
