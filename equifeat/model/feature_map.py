"""What passes between the parts of the model: trunk tokens and feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from equifeat.geometry.pixels import (
    MarginYX,
    SizeHW,
    patch_centers,
    pixel_centers,
    resize,
    sample,
)


class TrunkState(NamedTuple):
    """Tokens after the frozen blocks: all that is needed to go on, and small enough to store.

    Args:
        tokens: (B, prefix + h*w, D), detached.
        grid_hw: Rows and columns of patches.
        size_hw: Height and width of the image that was asked about.
        blocks_done: How many blocks the tokens have passed.
        margin_yx: See `FeatureMap`.
    """

    tokens: Tensor
    grid_hw: SizeHW
    size_hw: SizeHW
    blocks_done: int
    margin_yx: MarginYX = (0.0, 0.0)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TrunkState:
        """Return the state on another device or in another floating type (half to store it).

        Args:
            device: New device, or None.
            dtype: New type, or None.

        Returns:
            The moved state.
        """
        tokens = self.tokens.to(device=device or self.tokens.device, dtype=dtype)
        return self._replace(tokens=tokens)

    @staticmethod
    def cat(states: Sequence[TrunkState]) -> TrunkState:
        """Join states of images of one size into one batch.

        Args:
            states: At least one.

        Returns:
            One state.

        Raises:
            ValueError: The images have different sizes or the states different depths.
        """
        if len({state[1:] for state in states}) != 1:
            raise ValueError("only states of one image size and one depth can be joined")
        return states[0]._replace(tokens=torch.cat([state.tokens for state in states]))


@dataclass(frozen=True)
class FeatureMap:
    """A map of features that covers an image, up to a margin.

    Args:
        features: (B, D, h, w), not normalised unless `normalized` made it.
        size_hw: Height and width of the image, in whose pixels points are given.
        margin_yx: Pixels of the image that the map leaves uncovered at top and bottom each, and at
            left and right each. Patches of p pixels that overlap and start every s pixels cover
            the image but for (p - s) / 2 when each stands for the s pixels around its centre.
        point_scale: What `sample` multiplies points by: 1, or the patch size / 14 to repeat
            a fault of the reference implementation, see docs/convert.md.
    """

    features: Float[Tensor, "b d h w"]
    size_hw: SizeHW
    margin_yx: MarginYX = (0.0, 0.0)
    point_scale: float = 1.0

    @property
    def grid_hw(self) -> SizeHW:
        """Rows and columns of the map."""
        return int(self.features.shape[-2]), int(self.features.shape[-1])

    @property
    def stride(self) -> tuple[float, float]:
        """Pixels of the image from one feature to the next, (y, x)."""
        y, x = (self.size_hw[i] - 2 * self.margin_yx[i] for i in (0, 1))
        return y / self.grid_hw[0], x / self.grid_hw[1]

    def centers(self) -> Float[Tensor, "h w 2"]:
        """Return where the features lie.

        Returns:
            (h, w, 2) xy in pixels of the image, in float32, on the map's device.
        """
        return patch_centers(self.grid_hw, self.size_hw, self.features.device, self.margin_yx)

    def at_image(self) -> FeatureMap:
        """Return a map with one feature a pixel, bilinearly resized.

        Returns:
            A map of the image's size, without a margin: there the border's value is repeated.
        """
        if not any(self.margin_yx):
            return FeatureMap(resize(self.features, self.size_hw), self.size_hw)
        xy = pixel_centers(self.size_hw, self.features.device, torch.float32).reshape(1, -1, 2)
        xy = xy.expand(len(self.features), -1, -1)
        exact = replace(self, point_scale=1.0)
        values = exact.sample(xy, normalize=False).to(self.features.dtype)
        return FeatureMap(values.mT.reshape(len(values), -1, *self.size_hw), self.size_hw)

    def normalized(self) -> FeatureMap:
        """Return the map with every feature divided by its L2 norm, in float32 or better.

        Returns:
            The map of descriptors.
        """
        return replace(self, features=F.normalize(_at_least_float32(self.features), dim=1))

    def sample(
        self, keypoints: Float[Tensor, "b n 2"], *, normalize: bool = True
    ) -> Float[Tensor, "b n d"]:
        """Interpolate the map bilinearly at points; points outside take the border's value.

        Args:
            keypoints: xy in pixels of the image.
            normalize: Divide by the L2 norm after interpolating (the reference's order).

        Returns:
            One descriptor a point, in float32 or better.
        """
        # Half-precision coordinates would be off by whole pixels, so the map is widened first.
        wide = _at_least_float32(self.features)
        if self.point_scale != 1.0:
            keypoints = keypoints * self.point_scale
        values = sample(wide, keypoints, self.size_hw, margin_yx=self.margin_yx)
        return F.normalize(values, dim=-1) if normalize else values


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
