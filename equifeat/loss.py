"""Losses on descriptors of two views whose 3D points are known: SmoothAP and InfoNCE.

Both call two pixels a positive pair when their object points are at most ``pos_radius`` apart, a
negative pair when they are farther apart than ``neg_radius``, and ignore what lies between. Only
view 0 → view 1 is scored, as in the reference (3DCorrEnhance, arXiv 2411.19458). Descriptors of
other pairs may be given as further negatives; they never are positives.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import RecipeError

# Elements of one block of (positives, M): on a CPU a block should stay in the cache, on an
# accelerator it should be large enough to fill it.
_CPU_BLOCK = 2**17
_DEVICE_BLOCK = 2**24
# Stands for minus infinity where gradients must stay finite.
_FAR = -1e30


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


class ExtraNegatives(NamedTuple):
    """Descriptors of other pairs that a pair's view 0 is compared with.

    Attributes:
        descriptors: (E, D) L2-normalised, with their graph.
        points3d: (E, 3) their points in the coordinates of their own object.
        same_object: (E,) true where that object is the pair's own: such a descriptor is a negative
            only beyond neg_radius. Points of any other object always are.
    """

    descriptors: Tensor
    points3d: Tensor
    same_object: Tensor


class _Problem(NamedTuple):
    """Rows of view 0 that have a positive, and their pairs sorted by row.

    Attributes:
        similarity: (R, M + E) with its graph, float32 or float64; extra negatives come last.
        negative: (R, M + E).
        row: (P,) index into the R rows, ascending.
        col: (P,) index into the M descriptors.
        single: Whether every row has exactly one positive.
    """

    similarity: Tensor
    negative: Tensor
    row: Tensor
    col: Tensor
    single: bool


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _within(points3d0: Tensor, points3d1: Tensor, radius: float) -> Tensor:
    """(N, M) booleans: at most the radius apart."""
    # Differences, axis by axis: the matrix-product form is wrong by 3e-4, far too much for a
    # radius of 5e-3, and cdist's exact form is several times slower than this on a CPU.
    p0, p1 = _upcast(points3d0.detach()), _upcast(points3d1.detach())
    out = torch.empty(len(p0), len(p1), dtype=torch.bool, device=p0.device)
    rows = _rows_at_once(len(p1), p0.device)
    for start in range(0, len(p0), rows):
        block = p0[start : start + rows]
        total = (block[:, None, 0] - p1[None, :, 0]).square_()
        for axis in (1, 2):
            total += (block[:, None, axis] - p1[None, :, axis]).square_()
        torch.le(total, radius**2, out=out[start : start + rows])
    return out


def _rows_at_once(columns: int, device: torch.device) -> int:
    block = _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK
    return max(1, block // max(1, columns))


def _check(pos_radius: float, neg_radius: float, tau: float) -> None:
    if not 0.0 < pos_radius <= neg_radius:
        raise RecipeError(
            f"pos_radius={pos_radius} and neg_radius={neg_radius} must satisfy "
            "0 < pos_radius ≤ neg_radius."
        )
    if not tau > 0.0:
        raise RecipeError(f"the temperature is {tau}, but it must be greater than 0.")


def _problem(
    descriptors0: Tensor,
    descriptors1: Tensor,
    points3d0: Tensor,
    points3d1: Tensor,
    pos_radius: float,
    neg_radius: float,
    extra: ExtraNegatives | None,
) -> _Problem:
    pairs_row, col = _within(points3d0, points3d1, pos_radius).nonzero(as_tuple=True)
    rows, row = torch.unique_consecutive(pairs_row, return_inverse=True)
    single = len(rows) == len(pairs_row)
    if len(rows) < len(points3d0):
        descriptors0, points3d0 = descriptors0[rows], points3d0[rows]
    negative = _within(points3d0, points3d1, neg_radius).logical_not_()
    descriptors1 = _upcast(descriptors1)
    if extra is not None:
        near = _within(points3d0, extra.points3d, neg_radius).logical_and_(extra.same_object)
        negative = torch.cat([negative, near.logical_not_()], dim=1)
        descriptors1 = torch.cat([descriptors1, _upcast(extra.descriptors)])
    similarity = _upcast(descriptors0) @ descriptors1.mT
    return _Problem(similarity, negative, row, col, single)


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


def count_positives(
    points3d0: Float[Tensor, "n 3"], points3d1: Float[Tensor, "m 3"], pos_radius: float = 5e-3
) -> int:
    """Count the pairs that are at most a radius apart.

    Args:
        points3d0: Object points of view 0.
        points3d1: Object points of view 1.
        pos_radius: Largest distance of a positive pair in object units.

    Returns:
        Number of positive pairs.
    """
    return int(_within(points3d0, points3d1, pos_radius).sum())


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
    hardest = similarity.masked_fill(~problem.negative, _FAR).amax(1)
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
) -> tuple[Tensor, _Problem]:
    _check(pos_radius, neg_radius, tau)
    if variant != "reference":
        raise RecipeError(f"variant={variant!r} is unknown: the only one is 'reference'.")
    if chunk is not None and chunk < 1:
        raise RecipeError(f"chunk={chunk} must be at least 1.")
    with torch.autocast(device_type=descriptors0.device.type, enabled=False):
        problem = _problem(
            descriptors0, descriptors1, points3d0, points3d1, pos_radius, neg_radius, extra
        )
        similarity = problem.similarity
        if not len(problem.row):
            return similarity.sum(), problem
        if chunk is None:
            chunk = _rows_at_once(similarity.shape[1], similarity.device)
        loss = _SmoothAP.apply(
            similarity, problem.negative, problem.row, problem.col, problem.single, tau, chunk
        )
    return cast(Tensor, loss), problem


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
    _check(pos_radius, neg_radius, temperature)
    with torch.autocast(device_type=descriptors0.device.type, enabled=False):
        problem = _problem(
            descriptors0, descriptors1, points3d0, points3d1, pos_radius, neg_radius, extra
        )
        if not len(problem.row):
            return problem.similarity.sum()
        logits = problem.similarity / temperature
        others = logits.masked_fill(~problem.negative, _FAR).logsumexp(1)
        gap = others[problem.row] - logits[problem.row, problem.col]
        # Not softplus, which is only linear beyond 20.
        return torch.logaddexp(gap, torch.zeros_like(gap)).mean()


__all__ = [
    "ExtraNegatives",
    "SmoothAPTerms",
    "count_positives",
    "info_nce",
    "smooth_ap",
    "smooth_ap_terms",
]
