"""Mutual nearest neighbours of two images' features on grids of points."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.eval.features import FeatureSource
from equifeat.eval.matching import mutual_nearest
from equifeat.eval.task import Prediction
from equifeat.geometry.pixels import SizeHW, patch_centers, resize


class GridMatcher:
    """Matches images, and remembers the last image 0: sequences are matched from one to all.

    Args:
        stride: Pixels from one point to the next; 0 takes the centres of the model's own patches.
    """

    def __init__(self, stride: int) -> None:
        if stride < 0:
            raise RecipeError(f"stride={stride} must be 0 or more.")
        self.stride = stride
        self._last: tuple[object, FeatureSource, Tensor, Tensor] | None = None

    def match(
        self,
        image0: Float[Tensor, "3 h0 w0"],
        image1: Float[Tensor, "3 h1 w1"],
        source: FeatureSource,
        key0: object = None,
    ) -> Prediction:
        """Match two images.

        Args:
            image0: RGB in [0, 1].
            image1: RGB in [0, 1].
            source: The model.
            key0: Calls in a row with an equal key have the same image 0.

        Returns:
            xy0 and xy1, (N, 2) float32 pixels, and score, (N,) similarities.
        """
        last = self._last
        if last is not None and key0 is not None and last[0] == key0 and last[1] is source:
            xy0, descriptors0 = last[2:]
        else:
            xy0, descriptors0 = self._describe(image0, source)
            self._last = (key0, source, xy0, descriptors0)
        xy1, descriptors1 = self._describe(image1, source)
        found = mutual_nearest(descriptors0, descriptors1)
        kept = found.matches0 >= 0
        return {
            "xy0": xy0[kept].float().cpu(),
            "xy1": xy1[found.matches0[kept]].float().cpu(),
            "score": found.similarity[kept].float().cpu(),
        }

    def _describe(self, image: Tensor, source: FeatureSource) -> tuple[Tensor, Tensor]:
        features = source(image)
        if self.stride:
            h, w = size_of(image)
            grid = (max(1, h // self.stride), max(1, w // self.stride))
            xy = patch_centers(grid, (h, w), features.features.device)
        else:
            xy = features.centers()
        xy = xy.reshape(-1, 2)
        return xy, features.sample(xy[None])[0]


def size_of(image: Tensor) -> SizeHW:
    """Return an image's height and width."""
    return int(image.shape[-2]), int(image.shape[-1])


def at_most(image: Float[Tensor, "3 h w"], side: int, shorter: bool) -> Float[Tensor, "3 h2 w2"]:
    """Shrink an image, never enlarge it.

    Args:
        image: RGB in [0, 1].
        side: Pixels that a side has at most; 0 leaves the image as it is.
        shorter: Whether that is the shorter side.

    Returns:
        The image, its sides rounded to whole pixels.
    """
    size_hw = size_of(image)
    own = min(size_hw) if shorter else max(size_hw)
    if side < 1 or own <= side:
        return image
    h, w = (max(1, round(one * side / own)) for one in size_hw)
    return resize(image[None], (h, w))[0].clamp(0.0, 1.0)


def scaling(from_hw: SizeHW, to_hw: SizeHW) -> Float[Tensor, "3 3"]:
    """Return the matrix that carries pixels of an image to its resized version.

    Args:
        from_hw: Height and width.
        to_hw: New height and width.

    Returns:
        (3, 3) float64.
    """
    diagonal = [to_hw[1] / from_hw[1], to_hw[0] / from_hw[0], 1.0]
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64))
