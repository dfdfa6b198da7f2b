"""Percentage of correct keypoints (PCK) of semantic correspondence, in its published averages.

A keypoint is correct when it lies within α times a length of the true one (Yang and Ramanan, TPAMI
2013). The length is the longer side of the target's image, of its object's box, or of the box
around its keypoints. Averages are per image (mean over pairs of the share in a pair), per point
(share of all keypoints), or per point within a category and then over categories. Bases as in HPF
and DHPF (github.com/juhongm999/dhpf, data/dataset.py, data/pfwillow.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from equifeat.errors import RecipeError

Basis = Literal["image", "box", "box-kp"]
CategoryMean = Literal["points", "categories", "pairs"]


def pck_length(
    basis: Basis,
    size_hw: tuple[float, float],
    keypoints: Float[Tensor, "n 2"],
    box: Float[Tensor, "4"] | None = None,
) -> float:
    """Return the length that α multiplies.

    Args:
        basis: "image": longer side of the target image; "box": longer side of the object's box;
            "box-kp": longer side of the box around the true keypoints.
        size_hw: Height and width of the target image in pixels.
        keypoints: (N, 2) true keypoints in it.
        box: (4,) left, top, right, bottom of the object.

    Returns:
        Pixels; NaN for "box-kp" without keypoints.

    Raises:
        RecipeError: The basis is "box" and there is no box.
    """
    if basis == "image":
        return float(max(size_hw))
    if basis == "box":
        if box is None:
            raise RecipeError("basis=box needs boxes, which this data has not; use basis=box-kp.")
        return float((box[2:] - box[:2]).max())
    if not len(keypoints):
        return float("nan")
    return float((keypoints.max(dim=0).values - keypoints.min(dim=0).values).max())


def correct_keypoints(
    xy_pred: Float[Tensor, "n 2"], xy_true: Float[Tensor, "n 2"], length: float, alpha: float
) -> Bool[Tensor, "n"]:
    """Return which keypoints lie within α times a length of the truth.

    Args:
        xy_pred: (N, 2) predicted pixels.
        xy_true: (N, 2) true pixels.
        length: From `pck_length`, in the same pixels.
        alpha: Share of it.

    Returns:
        (N,) booleans.
    """
    distance = (xy_pred.double() - xy_true.double()).norm(dim=-1)
    within: Tensor = distance <= alpha * length
    return within


def pair_weights(
    counts: Sequence[int], categories: Sequence[str], mean: CategoryMean
) -> list[float]:
    """Return the weight of each pair's own PCK in an average over keypoints.

    The weighted mean of the pairs' PCK is then: "points": share of all keypoints; "categories":
    share within each category, averaged over categories (Probe3D); "pairs": the same, averaged
    with the categories' numbers of pairs as weights (3DCorrEnhance, evaluate.py).

    Args:
        counts: Keypoints of each pair.
        categories: Category of each pair.
        mean: Which average.

    Returns:
        One weight a pair; 0 for a pair without keypoints.
    """
    if mean == "points":
        return [float(n) for n in counts]
    points: dict[str, int] = defaultdict(int)
    pairs: dict[str, int] = defaultdict(int)
    for n, category in zip(counts, categories, strict=True):
        points[category] += n
        pairs[category] += 1
    share = {c: (pairs[c] if mean == "pairs" else 1) / max(n, 1) for c, n in points.items()}
    return [n * share[category] for n, category in zip(counts, categories, strict=True)]


def mean_pck(
    correct: Sequence[Bool[Tensor, "_"]],
    categories: Sequence[str],
    mean: Literal["images", "points", "categories", "pairs"],
) -> float:
    """Return the PCK of a set of pairs.

    Args:
        correct: For each pair, which keypoints are correct.
        categories: Category of each pair.
        mean: "images": mean of the pairs' PCK; else see `pair_weights`.

    Returns:
        Percent; pairs without keypoints say nothing; NaN when none has any.
    """
    kept = [(c, name) for c, name in zip(correct, categories, strict=True) if len(c)]
    if not kept:
        return float("nan")
    shares = torch.stack([c.double().mean() for c, _ in kept])
    names = [name for _, name in kept]
    weights = (
        [1.0] * len(kept)
        if mean == "images"
        else pair_weights([len(c) for c, _ in kept], names, mean)
    )
    weight = torch.tensor(weights, dtype=torch.float64)
    return 100.0 * float((shares * weight).sum() / weight.sum())
