"""Carry keypoints from one image to another, to a fraction of a patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from equifeat.downstream.posed_views import checked_image
from equifeat.errors import CorrespondenceError, KeypointError, RecipeError
from equifeat.eval.features import Dense, FeatureSource
from equifeat.eval.locate import MatchMethod, MatchSpec, locate
from equifeat.eval.protocol import FeatureSpec
from equifeat.geometry.pixels import SizeHW, inside, resize
from equifeat.model.inputs import OneImage


@dataclass(frozen=True)
class TransferOptions:
    """How images are looked at, and how places are found.

    Args:
        resolution: Patches on the longer side; None for the image's own size.
        overlap: Patches start every patch_size / overlap pixels; 2 takes several times as long.
        stride: Candidates lie this many pixels of the target image apart; the map is interpolated
            bilinearly there.
        method: "nearest" takes the most similar candidate, "soft_argmax" the mean of those around
            it, weighted by softmax(similarity / temperature).
        temperature: Of soft_argmax.
        window: Radius of "around it" in patches.
        mutual: A transfer is mutual when the way back ends within this many patches.
    """

    resolution: int | None = None
    overlap: int = 1
    stride: float = 2.0
    method: MatchMethod = "soft_argmax"
    temperature: float = 0.05
    window: float = 1.5
    mutual: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        if not (self.stride > 0 and self.window > 0 and self.mutual > 0):
            raise RecipeError(
                f"stride={self.stride:g}, window={self.window:g} and mutual={self.mutual:g} must "
                "be above 0."
            )


class TransferredKeypoints(NamedTuple):
    """Where keypoints of image 0 are in image 1.

    Attributes:
        keypoints1: (N, 2) xy in pixels of image 1; every keypoint gets a place.
        similarity: (N,) cosine there.
        mutual: (N,) whether the place's own match in image 0 is (about) the keypoint. What image 1
            does not show is mostly not mutual.
    """

    keypoints1: Tensor
    similarity: Tensor
    mutual: Tensor


@torch.no_grad()
def transfer(
    model: Dense,
    image0: OneImage,
    keypoints0: Tensor,
    image1: OneImage,
    options: TransferOptions | None = None,
    *,
    mask0: Tensor | None = None,
    mask1: Tensor | None = None,
) -> TransferredKeypoints:
    """Carry keypoints from one image to another, of the same object or of one like it.

    Args:
        model: Anything with ``dense(images, resolution)``, such as `equifeat.load` gives.
        image0: A tensor (3, H0, W0), an array (H0, W0, 3), a PIL image or a file.
        keypoints0: (N, 2) xy in pixels of image 0; the first pixel's centre is (0.5, 0.5).
        image1: The same, of any size.
        options: How.
        mask0: (H0, W0) where the object is in image 0; None for everywhere. Ways back end there.
        mask1: (H1, W1) where the object is in image 1; None for everywhere. Places are found there.

    Returns:
        Places in image 1, on the CPU.

    Raises:
        ImageError: An image is none.
        KeypointError: A keypoint lies outside image 0, or the shape is wrong.
        CorrespondenceError: A mask is empty or not of its image's size.
    """
    options = options or TransferOptions()
    pixels0, pixels1 = checked_image(image0, "image 0"), checked_image(image1, "image 1")
    keypoints0 = torch.as_tensor(keypoints0).detach().cpu().float()
    _check_keypoints(keypoints0, (int(pixels0.shape[-2]), int(pixels0.shape[-1])))
    source = FeatureSource(model, FeatureSpec(options.resolution, overlap=options.overlap))
    map0, map1 = source(pixels0), source(pixels1)
    specs = [
        MatchSpec(options.method, options.temperature, options.window * max(one.stride))
        for one in (map0, map1)
    ]
    grids = [_grid(one.size_hw, options.stride) for one in (map0, map1)]
    masks = [
        _on_grid(m, i, grids[k], k) for k, (m, i) in enumerate(((mask0, pixels0), (mask1, pixels1)))
    ]
    device = map1.features.device
    there = locate(map0.sample(keypoints0[None].to(device))[0], map1, specs[1], grids[1], masks[1])
    back = locate(map1.sample(there.xy[None])[0], map0, specs[0], grids[0], masks[0])
    near = (back.xy.cpu() - keypoints0).norm(dim=-1) <= options.mutual * max(map0.stride)
    return TransferredKeypoints(there.xy.cpu(), there.similarity.cpu(), near)


def _grid(size_hw: SizeHW, stride: float) -> SizeHW:
    return max(1, round(size_hw[0] / stride)), max(1, round(size_hw[1] / stride))


def _on_grid(mask: Tensor | None, image: Tensor, grid_hw: SizeHW, number: int) -> Tensor | None:
    """The mask at the candidates: True where the pixel that holds the candidate is."""
    if mask is None:
        return None
    mask = torch.as_tensor(mask).detach().cpu().bool()
    if tuple(mask.shape) != tuple(image.shape[-2:]):
        raise CorrespondenceError(
            f"mask{number} must have its image's size {tuple(image.shape[-2:])} (height, width), "
            f"not {tuple(mask.shape)}."
        )
    return resize(mask.float()[None, None], grid_hw, "nearest")[0, 0] > 0.5


def _check_keypoints(keypoints: Tensor, size_hw: SizeHW) -> None:
    if keypoints.ndim != 2 or keypoints.shape[1] != 2:
        raise KeypointError(
            f"keypoints0 must have the shape (N, 2), x and y, not {tuple(keypoints.shape)}."
        )
    outside = (~inside(keypoints, size_hw)).nonzero()
    if len(outside):
        x, y = keypoints[outside[0, 0]].tolist()
        raise KeypointError(
            f"keypoint {int(outside[0, 0])} at ({x:g}, {y:g}) lies outside image 0 of width "
            f"{size_hw[1]} and height {size_hw[0]}."
        )
