"""Find descriptors as the reference does on PF-PASCAL: dot products at the corners of pixels.

github.com/qq456cvb/3DCorrEnhance, evaluate.py: the target's features are interpolated between patch
centres and repeated beyond them, are not normalised, and candidate (i, j) lies at the corner
coordinates (i, j), where every patch centre of an even patch size is a candidate.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from equifeat.errors import CorrespondenceError
from equifeat.eval.locate import Located
from equifeat.eval.matching import DEFAULT_BUDGET
from equifeat.geometry.pixels import SizeHW, pixel_centers, scale_xy, to_integer_centers
from equifeat.model.feature_map import FeatureMap


def corner_places(
    grid_hw: SizeHW, size_hw: SizeHW, device: torch.device | str | None = None
) -> Float[Tensor, "h w 2"]:
    """Return the top-left corners of the cells of a grid that covers an image.

    Args:
        grid_hw: Rows and columns.
        size_hw: Height and width of the image.
        device: Device of the result.

    Returns:
        (h, w, 2) xy in pixels of the image, (0, 0) first.
    """
    return scale_xy(to_integer_centers(pixel_centers(grid_hw, device)), grid_hw, size_hw)


@torch.no_grad()
def locate_dot(
    descriptors: Float[Tensor, "n d"],
    target: FeatureMap,
    places: Float[Tensor, "h w 2"],
    mask: Bool[Tensor, "h w"] | None = None,
    budget_bytes: int = DEFAULT_BUDGET,
) -> Located:
    """Find the place of the largest dot product for each descriptor.

    The dot product with an interpolated feature is the interpolated dot product, so the map of
    products is interpolated, not the features.

    Args:
        descriptors: (N, D) descriptors.
        target: The target's features, batch 1, not normalised: long ones win more often.
        places: (h, w, 2) candidates in pixels of the target.
        mask: True for the candidates that may be taken; None takes all.
        budget_bytes: Largest block of products held at once; one descriptor's is always held.

    Returns:
        Places, and products instead of cosines, on the target's device; of equal ones the first.

    Raises:
        CorrespondenceError: The mask leaves no candidate.
    """
    features = target.features.float()
    xy = places.reshape(-1, 2).to(features.device)
    if mask is not None:
        xy = xy[mask.reshape(-1).to(xy.device)]
    if not len(xy):
        raise CorrespondenceError("the mask leaves no place of the target to be found.")
    at_once = max(1, budget_bytes // (2 * features.element_size() * len(xy)))
    wide = descriptors.to(features.device).float()
    values, index = [wide.new_zeros(0)], [wide.new_zeros(0, dtype=torch.int64)]
    for i in range(0, len(wide), at_once):
        products = torch.einsum("nd,bdhw->bnhw", wide[i : i + at_once], features)
        there = replace(target, features=products).sample(xy[None], normalize=False)[0].mT
        index.append(there.argmax(dim=1))
        values.append(there.gather(1, index[-1][:, None])[:, 0])
    return Located(xy[torch.cat(index)], torch.cat(values))
