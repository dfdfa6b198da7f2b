"""SmoothAP with all positives of a row in one ranking (arXiv 2007.12163)."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.loss.pairs import ExtraNegatives, check_chunk, check_options, pairs_of, rows_at_once


class _MultiPositiveAP(torch.autograd.Function):
    """1 - mean AP over the rows; the gradient is made in the same pass, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        similarity: Tensor,
        negative: Tensor,
        row: Tensor,
        col: Tensor,
        tau: float,
        chunk: int,
    ) -> Tensor:
        similarity = similarity.detach()
        own = similarity[row, col]
        positive = torch.zeros_like(negative)
        positive[row, col] = True
        # Every row counts the same, and every positive of a row.
        weight = 1.0 / (len(similarity) * torch.bincount(row).to(own)[row])
        ap = torch.empty_like(own)
        grad = torch.zeros_like(similarity) if ctx.needs_input_grad[0] else None
        grad_own = torch.empty_like(own)
        for start in range(0, len(own), chunk):
            block = slice(start, start + chunk)
            at = row[block]
            steps = (similarity[at] - own[block, None]).div_(tau).sigmoid_()
            before, wrong = positive[at], negative[at]
            # The pair itself is among the positives with σ(0) = 1/2; half more makes the 1.
            rank = (steps * before).sum(1) + 0.5
            total = rank + (steps * wrong).sum(1)
            ap[block] = rank / total
            if grad is None:
                continue
            # σ' = σ (1 - σ) / τ. The pair's own term cancels between its column and grad_own.
            slope = torch.addcmul(steps, steps, steps, value=-1.0, out=steps)
            scale = weight[block] / total.square()
            slope *= before * ((total - rank) * scale)[:, None] - wrong * (rank * scale)[:, None]
            grad_own[block] = -slope.sum(1)
            grad.index_add_(0, at, slope)
        if grad is not None:
            grad.index_put_((row, col), grad_own, accumulate=True)
            ctx.save_for_backward(grad.div_(-tau))
        return 1.0 - (weight * ap).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # Only so under create_graph=True.
            raise RuntimeError(
                "multi_positive_ap has first derivatives only, not create_graph=True."
            )
        (grad,) = ctx.saved_tensors
        return grad_output * grad, None, None, None, None, None


def multi_positive_ap(
    descriptors0: Float[Tensor, "n d"],
    descriptors1: Float[Tensor, "m d"],
    points3d0: Float[Tensor, "n 3"],
    points3d1: Float[Tensor, "m 3"],
    *,
    tau: float = 0.01,
    pos_radius: float = 5e-3,
    neg_radius: float = 0.1,
    chunk: int | None = None,
    extra: ExtraNegatives | None = None,
) -> Float[Tensor, ""]:
    """Return 1 minus the smoothed average precision of every row with a positive, averaged.

    With similarities s, σ(x) = 1 / (1 + exp(-x / τ)), the positives P and the negatives N of row i
    (SmoothAP, arXiv 2007.12163; points between the radii are in neither):

        rank_P(j) = 1 + Σ_{k in P, k ≠ j} σ(s_ik - s_ij)
        AP_i = mean over j in P of rank_P(j) / (rank_P(j) + Σ_{k in N} σ(s_ik - s_ij))

    Time grows with positives × M, memory with N × M whatever the number of positives. Half types
    are computed in float32, also under autocast; float64 stays. First derivatives only.

    Args:
        descriptors0: (N, D) L2-normalised descriptors of view 0.
        descriptors1: (M, D) L2-normalised descriptors of view 1.
        points3d0: (N, 3) their points in object coordinates.
        points3d1: (M, 3) likewise.
        tau: Temperature τ.
        pos_radius: Positives are at most this far apart, in object units.
        neg_radius: Negatives are farther apart than this.
        chunk: Positives handled at once; chosen by the device when None. The result does not
            depend on it beyond rounding.
        extra: Further negatives from other pairs.

    Returns:
        Scalar from 0 to 1; 0 with zero gradients when there is no positive.

    Raises:
        RecipeError: A radius, tau or chunk that makes no sense.
    """
    check_options(pos_radius, neg_radius, tau)
    check_chunk(chunk)
    with torch.autocast(device_type=descriptors0.device.type, enabled=False):
        problem = pairs_of(
            descriptors0, descriptors1, points3d0, points3d1, pos_radius, neg_radius, extra
        )
        similarity = problem.similarity
        if not len(problem.row):
            return similarity.sum()
        if chunk is None:
            chunk = rows_at_once(similarity.shape[1], similarity.device)
        loss = _MultiPositiveAP.apply(
            similarity, problem.negative, problem.row, problem.col, tau, chunk
        )
    return cast(Tensor, loss)
