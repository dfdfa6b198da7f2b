"""Colours of features by their three largest principal components."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """Three directions in feature space, and how they become colours.

    Args:
        mean: (D,) mean of L2-normalised features.
        vectors: (D, 3) directions of largest variance, orthonormal.
        low: (3,) value that becomes 0.
        high: (3,) value that becomes 1.
    """

    mean: Tensor
    vectors: Tensor
    low: Tensor
    high: Tensor

    def colors(self, rows: Tensor) -> Tensor:
        """Return colours.

        Args:
            rows: (..., D) features.

        Returns:
            (..., 3) in [0, 1].
        """
        rows = F.normalize(rows.float(), dim=-1)
        shown = (rows - self.mean) @ self.vectors
        return ((shown - self.low) / (self.high - self.low).clamp_min(1e-9)).clamp(0.0, 1.0)


def fit_basis(rows: Tensor) -> Basis:
    """Fit a basis.

    Args:
        rows: (N, D) features, at least one.

    Returns:
        The basis; each component goes from its 2nd to its 98th percentile, and its sign is chosen
        so that its skewness is positive.
    """
    rows = F.normalize(rows.float(), dim=1)
    mean = rows.mean(0)
    centered = (rows - mean).double()
    _, vectors = torch.linalg.eigh(centered.mT @ centered)
    vectors = F.pad(vectors[:, -3:].flip(1), (0, max(0, 3 - vectors.shape[1])))
    shown = centered @ vectors
    # The sign of an eigenvector is arbitrary and would flip colours between machines.
    sign = torch.where(shown.pow(3).sum(0) < 0, -1.0, 1.0)
    ends = np.quantile((shown * sign).numpy(), [0.02, 0.98], axis=0)
    low, high = torch.from_numpy(ends).float()
    return Basis(mean, (vectors * sign).float(), low, high)
