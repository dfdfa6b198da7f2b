"""SmoothAP as in the published code of 3DCorrEnhance (arXiv 2411.19458)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.loss.pairs import (
    FAR,
    ExtraNegatives,
    Problem,
    check_chunk,
    check_options,
    pairs_of,
    rows_at_once,
)


class SmoothAPTerms(NamedTuple):
    """The loss and what a trainer logs beside it.

    Attributes:
        loss: Scalar with its gradient graph.
        num_positives: Number of positive pairs.
        mean_ap: Mean smoothed AP over the positives, detached; NaN when there is none.
        top1: Share of positives more similar than every negative of their row, detached; NaN when
            there is none.
    """

    loss: Tensor
    num_positives: int
    mean_ap: Tensor
    top1: Tensor


class _SmoothAP(torch.autograd.Function):
    """Mean of 1 - (ap1 + ap2) / 2 over the positives; the gradient is made in the same pass.

    The plain form keeps several (P, M) tensors for the backward pass. Here the forward pass folds
    each block of positives into one (R, M) gradient at once, so memory does not grow with P.
    """

    @staticmethod
    def forward(
        ctx: Any,
        similarity: Tensor,
        negative: Tensor,
        row: Tensor,
        col: Tensor,
        single: bool,
        tau: float,
        chunk: int,
    ) -> Tensor:
        similarity = similarity.detach()
        positive = similarity[row, col]
        # ap1 compares with the ideal similarity 1: its sum over negatives belongs to the row.
        sums = similarity.new_empty(len(similarity))
        for start in range(0, len(similarity), chunk):
            block = slice(start, start + chunk)
            sums[block] = _soft_steps(similarity[block], 1.0, tau, negative[block]).sum(1)
        beyond = torch.sigmoid((positive - 1.0) / tau)
        own, others = 1.0 + beyond, sums[row]
        ap1 = own / (own + others)

        need = bool(ctx.needs_input_grad[0])
        grad = torch.zeros_like(similarity) if need else None
        ap2 = torch.empty_like(positive)
        grad_positive = torch.empty_like(positive)
        below = torch.sigmoid((1.0 - positive) / tau)
        for start in range(0, len(positive), chunk):
            block = slice(start, start + chunk)
            # With one positive a row, positives and rows are the same list: slices, no copies.
            at = block if single else row[block]
            steps = _soft_steps(similarity[at], positive[block, None], tau, negative[at])
            a, b = 1.0 + below[block], steps.sum(1)
            ap2[block] = a / (a + b)
            if grad is None:
                continue
            # σ' = σ (1 - σ) / τ; masked entries are 0 and stay 0. dAP/db = -a / (a + b)².
            slope = torch.addcmul(steps, steps, steps, value=-1.0, out=steps)
            by_b = -a / (a + b).square()
            by_a = b / (a + b).square()
            grad_positive[block] = -by_b * slope.sum(1)
            grad_positive[block] -= by_a * below[block] * (1.0 - below[block])
            slope *= by_b[:, None]
            if single:
                grad[block] = slope
            else:
                grad.index_add_(0, row[block], slope)
        loss = 1.0 - 0.5 * (ap1.mean() + ap2.mean())
        if grad is not None:
            total = (own + others).square()
            by_sum = similarity.new_zeros(len(similarity)).index_add_(0, row, -own / total)
            for start in range(0, len(similarity), chunk):
                block = slice(start, start + chunk)
                steps = _soft_steps(similarity[block], 1.0, tau, negative[block])
                slope = torch.addcmul(steps, steps, steps, value=-1.0, out=steps)
                grad[block].addcmul_(slope, by_sum[block, None])
            grad_positive += others / total * beyond * (1.0 - beyond)
            grad.index_put_((row, col), grad_positive, accumulate=True)
            grad *= -0.5 / (len(positive) * tau)
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # Only so under create_graph=True.
            raise RuntimeError("smooth_ap has first derivatives only, not create_graph=True.")
        (grad,) = ctx.saved_tensors
        return grad_output * grad, None, None, None, None, None, None


def _soft_steps(
    similarity: Tensor, reference: Tensor | float, tau: float, negative: Tensor
) -> Tensor:
    """σ((s - reference) / τ) at negatives, else 0, in one new tensor."""
    return (similarity - reference).div_(tau).sigmoid_().mul_(negative)


def smooth_ap_terms(
    descriptors0: Float[Tensor, "n d"],
    descriptors1: Float[Tensor, "m d"],
    points3d0: Float[Tensor, "n 3"],
    points3d1: Float[Tensor, "m 3"],
    *,
    tau: float = 0.01,
    pos_radius: float = 5e-3,
    neg_radius: float = 0.1,
    variant: Literal["reference"] = "reference",
    chunk: int | None = None,
    extra: ExtraNegatives | None = None,
) -> SmoothAPTerms:
    """`smooth_ap` with the numbers that are logged beside it.

    Args:
        descriptors0: See `smooth_ap`.
        descriptors1: See `smooth_ap`.
        points3d0: See `smooth_ap`.
        points3d1: See `smooth_ap`.
        tau: See `smooth_ap`.
        pos_radius: See `smooth_ap`.
        neg_radius: See `smooth_ap`.
        variant: See `smooth_ap`.
        chunk: See `smooth_ap`.
        extra: See `smooth_ap`.

    Returns:
        The loss, the number of positives, and detached mean AP and top-1 share.

    Raises:
        RecipeError: A radius, tau, chunk or variant that makes no sense.
    """
    loss, problem = _smooth_ap(
        descriptors0,
        descriptors1,
        points3d0,
        points3d1,
        tau=tau,
        pos_radius=pos_radius,
        neg_radius=neg_radius,
        variant=variant,
        chunk=chunk,
        extra=extra,
    )
    if not len(problem.row):
        nan = loss.new_full((), float("nan"))
        return SmoothAPTerms(loss, 0, nan, nan)
    similarity = problem.similarity.detach()
    hardest = similarity.masked_fill(~problem.negative, FAR).amax(1)
    top1 = (similarity[problem.row, problem.col] > hardest[problem.row]).to(loss.dtype).mean()
    return SmoothAPTerms(loss, len(problem.row), 1.0 - loss.detach(), top1)


def smooth_ap(
    descriptors0: Float[Tensor, "n d"],
    descriptors1: Float[Tensor, "m d"],
    points3d0: Float[Tensor, "n 3"],
    points3d1: Float[Tensor, "m 3"],
    *,
    tau: float = 0.01,
    pos_radius: float = 5e-3,
    neg_radius: float = 0.1,
    variant: Literal["reference"] = "reference",
    chunk: int | None = None,
    extra: ExtraNegatives | None = None,
) -> Float[Tensor, ""]:
    """Return 1 minus the smoothed average precision of every positive pair, averaged.

    With similarities s, σ(x) = 1 / (1 + exp(-x / τ)) and the negatives N of row i, each positive
    (i, j) has two one-positive forms:

        ap1 = (1 + σ(s_ij - 1)) / (1 + σ(s_ij - 1) + Σ_N σ(s_ik - 1))
        ap2 = (1 + σ(1 - s_ij)) / (1 + σ(1 - s_ij) + Σ_N σ(s_ik - s_ij))

    and the loss is the mean over positives of 1 - (ap1 + ap2) / 2 (the published code of
    arXiv 2411.19458). That code clamps the exponent at ±50 against overflow; the sigmoid here
    cannot overflow, and the two differ by less than 2e-22 a term. Time grows with positives × M,
    memory with N × M whatever the number of positives. Half types are computed in float32, also
    under autocast; float64 stays. First derivatives only.

    Args:
        descriptors0: (N, D) L2-normalised descriptors of view 0.
        descriptors1: (M, D) L2-normalised descriptors of view 1.
        points3d0: (N, 3) their points in object coordinates.
        points3d1: (M, 3) likewise.
        tau: Temperature τ.
        pos_radius: Positives are at most this far apart, in object units.
        neg_radius: Negatives are farther apart than this.
        variant: "reference", the published averaging of the two forms.
        chunk: Positives handled at once; chosen by the device when None. The result does not
            depend on it beyond rounding.
        extra: Further negatives from other pairs: N grows by theirs, M by E.

    Returns:
        Scalar from 0 to 1; 0 with zero gradients when there is no positive.

    Raises:
        RecipeError: A radius, tau, chunk or variant that makes no sense.
    """
    loss, _ = _smooth_ap(
        descriptors0,
        descriptors1,
        points3d0,
        points3d1,
        tau=tau,
        pos_radius=pos_radius,
        neg_radius=neg_radius,
        variant=variant,
        chunk=chunk,
        extra=extra,
    )
    return loss


def _smooth_ap(
    descriptors0: Tensor,
    descriptors1: Tensor,
    points3d0: Tensor,
    points3d1: Tensor,
    *,
    tau: float,
    pos_radius: float,
    neg_radius: float,
    variant: str,
    chunk: int | None,
    extra: ExtraNegatives | None,
) -> tuple[Tensor, Problem]:
    check_options(pos_radius, neg_radius, tau)
    if variant != "reference":
        raise RecipeError(f"variant={variant!r} is unknown: the only one is 'reference'.")
    check_chunk(chunk)
    with torch.autocast(device_type=descriptors0.device.type, enabled=False):
        problem = pairs_of(
            descriptors0, descriptors1, points3d0, points3d1, pos_radius, neg_radius, extra
        )
        similarity = problem.similarity
        if not len(problem.row):
            return similarity.sum(), problem
        if chunk is None:
            chunk = rows_at_once(similarity.shape[1], similarity.device)
        loss = _SmoothAP.apply(
            similarity, problem.negative, problem.row, problem.col, problem.single, tau, chunk
        )
    return cast(Tensor, loss), problem
