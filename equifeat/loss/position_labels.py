"""Cross entropy against labels that fall off smoothly with the distance of the 3D points."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.loss.pairs import (
    FAR,
    ExtraNegatives,
    check_temperature,
    squared_distances,
    upcast,
    within,
)

# In label radii: what is farther from every label is not one surface point with any of them.
_REACH = 3.0


def soft_labels(
    descriptors0: Float[Tensor, "n d"],
    descriptors1: Float[Tensor, "m d"],
    points3d0: Float[Tensor, "n 3"],
    points3d1: Float[Tensor, "m 3"],
    *,
    temperature: float = 0.05,
    label_radius: float = 0.02,
    extra: ExtraNegatives | None = None,
) -> Float[Tensor, ""]:
    """Return the cross entropy between similarities and Gaussian labels, averaged over rows.

    A row of view 0 is a distribution over all keypoints of view 1, and so is its label, from the
    distances d of the 3D points and the label radius r:

        p_ij = exp(s_ij / T) / Σ_k exp(s_ik / T)
        q_ij = exp(-d_ij² / 2r²) / Σ_k exp(-d_ik² / 2r²)
        loss = mean over rows of -Σ_j q_ij log p_ij

    There are no radii of positives and negatives and no gap between them: every keypoint of view 1
    is in both sums. Rows whose nearest point is farther than 3 r have no true place and are left
    out. The least value is not 0 but the mean entropy of the labels. Half types are computed in
    float32, also under autocast.

    Args:
        descriptors0: (N, D) L2-normalised descriptors of view 0.
        descriptors1: (M, D) L2-normalised descriptors of view 1.
        points3d0: (N, 3) their points in object coordinates.
        points3d1: (M, 3) likewise.
        temperature: Temperature T.
        label_radius: Standard deviation r of the labels, in object units.
        extra: Descriptors of other pairs: further columns with label 0. Those of the same object
            within 3 r of the row's point are left out of that row.

    Returns:
        Scalar ≥ 0; 0 with zero gradients when no row is left.

    Raises:
        RecipeError: A radius or temperature that makes no sense.
    """
    check_temperature(temperature)
    if not label_radius > 0.0:
        raise RecipeError(f"label_radius is {label_radius}, but it must be greater than 0.")
    reach, m = _REACH * label_radius, len(points3d1)
    with torch.autocast(device_type=descriptors0.device.type, enabled=False):
        rows = within(points3d0, points3d1, reach).any(1)
        points3d0, columns = points3d0[rows], upcast(descriptors1)
        if extra is not None:
            columns = torch.cat([columns, upcast(extra.descriptors)])
        logits = upcast(descriptors0)[rows] @ columns.mT / temperature
        if not len(logits):
            return logits.sum()
        labels = (squared_distances(points3d0, points3d1) / (-2.0 * label_radius**2)).softmax(1)
        true = (labels.to(logits) * logits[:, :m]).sum(1)
        if extra is not None:
            near = within(points3d0, extra.points3d, reach).logical_and_(extra.same_object)
            others = logits[:, m:].masked_fill(near, FAR)
            logits = torch.cat([logits[:, :m], others], dim=1)
        return (logits.logsumexp(1) - true).mean()
