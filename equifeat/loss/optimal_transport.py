"""Optimal transport between the keypoints of two views, with a dustbin for the unmatched."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.loss.pairs import check_options, upcast, within


class _LogSums(torch.autograd.Function):
    """Logarithms of the row sums of exp(scores + offset).

    Plain, each call would keep a matrix for its gradient; here all calls share the scores.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, offset: Tensor) -> Tensor:
        out = (scores + offset).logsumexp(1)
        ctx.save_for_backward(scores, offset, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        scores, offset, out = ctx.saved_tensors
        grad = (scores + offset).sub_(out[:, None]).exp_().mul_(grad_output[:, None])
        return grad, grad.sum(0)


def transport(
    descriptors0: Float[Tensor, "n d"],
    descriptors1: Float[Tensor, "m d"],
    points3d0: Float[Tensor, "n 3"],
    points3d1: Float[Tensor, "m 3"],
    *,
    temperature: float = 0.05,
    dustbin: float = 0.8,
    iterations: int = 20,
    pos_radius: float = 5e-3,
    neg_radius: float = 0.1,
) -> Float[Tensor, ""]:
    """Return the negative log-likelihood of the true matches under entropic optimal transport.

    As in SuperGlue (arXiv 1911.11763): similarities over the temperature T get a last row and a
    last column for the dustbin, all of the score dustbin / T. Sinkhorn's iterations in the log
    domain scale the exponentials to a transport P that gives every keypoint the mass 1, the last
    column the mass N and the last row the mass M. A keypoint without any point of the other view
    within neg_radius belongs to the dustbin, and

        loss = (mean of -log P_ij over the positives (i, j)
                + mean of -log P over the dustbin cells of keypoints without a match) / 2

    A keypoint whose nearest point lies between the radii is in neither mean. Half types are
    computed in float32, also under autocast. Memory is a few (N, M) matrices whatever the number of
    iterations.

    Args:
        descriptors0: (N, D) L2-normalised descriptors of view 0.
        descriptors1: (M, D) L2-normalised descriptors of view 1.
        points3d0: (N, 3) their points in object coordinates.
        points3d1: (M, 3) likewise.
        temperature: Temperature T.
        dustbin: Similarity that every keypoint has to the dustbin. The default is about the median
            of true matches under the raw DINOv2 ViT-S on rendered views.
        iterations: Sinkhorn iterations.
        pos_radius: Positives are at most this far apart, in object units.
        neg_radius: A keypoint without a point this near has no match.

    Returns:
        Scalar, 0 at best up to what the iterations have not settled; 0 with zero gradients when
        there is no positive.

    Raises:
        RecipeError: A radius, temperature, dustbin or number of iterations that makes no sense.
    """
    check_options(pos_radius, neg_radius, temperature)
    if not math.isfinite(dustbin):
        raise RecipeError(f"dustbin is {dustbin}, but it must be finite.")
    if iterations < 1:
        raise RecipeError(f"iterations={iterations} must be at least 1.")
    with torch.autocast(device_type=descriptors0.device.type, enabled=False):
        scores = upcast(descriptors0) @ upcast(descriptors1).mT / temperature
        row, col = within(points3d0, points3d1, pos_radius).nonzero(as_tuple=True)
        if not len(row):
            return scores[:0].sum()
        scores = torch.nn.functional.pad(scores, (0, 1, 0, 1), value=dustbin / temperature)
        u, v = _sinkhorn(scores, iterations)
        n, m = len(points3d0), len(points3d1)
        near = within(points3d0, points3d1, neg_radius)
        lost0, lost1 = (~near.any(1)).nonzero()[:, 0], (~near.any(0)).nonzero()[:, 0]
        true = scores[row, col] + u[row] + v[col]
        bins = torch.cat([u[lost0] + v[m], u[n] + v[lost1]]) + dustbin / temperature
        loss = -true.mean()
        return (loss - bins.mean()) / 2.0 if len(bins) else loss / 2.0


def _sinkhorn(scores: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return u (N + 1,) and v (M + 1,): the transport is exp(scores + u + v)."""
    n, m = scores.shape[0] - 1, scores.shape[1] - 1
    mass0, mass1 = scores.new_zeros(n + 1), scores.new_zeros(m + 1)
    mass0[n], mass1[m] = math.log(m), math.log(n)
    v = torch.zeros_like(mass1)
    for _ in range(iterations):
        u = mass0 - _LogSums.apply(scores, v)
        v = mass1 - _LogSums.apply(scores.mT, u)
    return u, v
