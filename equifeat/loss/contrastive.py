"""InfoNCE with several positives a row."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.loss.pairs import FAR, ExtraNegatives, check_options, pairs_of


def info_nce(
    descriptors0: Float[Tensor, "n d"],
    descriptors1: Float[Tensor, "m d"],
    points3d0: Float[Tensor, "n 3"],
    points3d1: Float[Tensor, "m 3"],
    *,
    temperature: float = 0.05,
    pos_radius: float = 5e-3,
    neg_radius: float = 0.1,
    extra: ExtraNegatives | None = None,
) -> Float[Tensor, ""]:
    """Return InfoNCE with several positives a row, averaged over the positive pairs.

    Each positive (i, j) is classified against the negatives N of its row alone; positives of one
    row do not compete, and points between the radii count for nothing:

        -log( exp(s_ij / T) / (exp(s_ij / T) + Σ_N exp(s_ik / T)) )

    With one positive a row and every other point a negative this is the usual InfoNCE
    (arXiv 1807.03748). Half types are computed in float32, also under autocast.

    Args:
        descriptors0: (N, D) L2-normalised descriptors of view 0.
        descriptors1: (M, D) L2-normalised descriptors of view 1.
        points3d0: (N, 3) their points in object coordinates.
        points3d1: (M, 3) likewise.
        temperature: Temperature T.
        pos_radius: Positives are at most this far apart, in object units.
        neg_radius: Negatives are farther apart than this.
        extra: Further negatives from other pairs.

    Returns:
        Scalar ≥ 0; 0 with zero gradients when there is no positive.

    Raises:
        RecipeError: A radius or temperature that makes no sense.
    """
    check_options(pos_radius, neg_radius, temperature)
    with torch.autocast(device_type=descriptors0.device.type, enabled=False):
        problem = pairs_of(
            descriptors0, descriptors1, points3d0, points3d1, pos_radius, neg_radius, extra
        )
        if not len(problem.row):
            return problem.similarity.sum()
        logits = problem.similarity / temperature
        others = logits.masked_fill(~problem.negative, FAR).logsumexp(1)
        gap = others[problem.row] - logits[problem.row, problem.col]
        # Not softplus, which is only linear beyond 20.
        return torch.logaddexp(gap, torch.zeros_like(gap)).mean()
