"""Features that need no training: an oracle and chance, to prove a task's pipeline.

The oracle reads object coordinates that were painted into the pictures (``--painted`` fixtures of
`equifeat fixtures`): a task whose pipeline is right scores close to 100 % with it. Random features
score at chance. Both are models like any other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.model.feature_map import FeatureMap
from equifeat.seeding import torch_generator

# Painted colours lie in [PAINT_LOW, 255]: black stays background.
PAINT_LOW = 32


class CoordinateOracle:
    """Descriptors of painted coordinates: random Fourier features of the colour.

    Args:
        width: Distance of colours (of 1) at which the similarity has fallen to 0.6.
        dim: Channels D.
    """

    hash = "oracle-coordinates-1"

    def __init__(self, width: float = 0.05, dim: int = 96) -> None:
        generator = torch_generator(0)
        self.frequencies = torch.randn(3, dim // 2, generator=generator) / width

    def dense(
        self,
        images: Tensor,
        resolution: int | None = None,
        *,
        overlap: int = 1,
        layers: Sequence[int] = (-1,),
        norm: bool = True,
    ) -> FeatureMap:
        """Return one descriptor a pixel.

        Args:
            images: (B, 3, H, W) painted pictures in [0, 1].
            resolution: Ignored, like the options of a ViT: the map has the images' own size.
            overlap: Ignored.
            layers: Ignored.
            norm: Ignored.

        Returns:
            Unit descriptors on the object, zero on black.
        """
        low = PAINT_LOW / 255.0
        xyz = (images.movedim(1, -1) - low) / (1.0 - low)
        phase = xyz @ self.frequencies.to(images)
        half = math.sqrt(2.0 / (2 * phase.shape[-1]))
        values = torch.cat([phase.cos(), phase.sin()], dim=-1) * half
        solid = (images > 0.5 * low).all(dim=1).unsqueeze(-1)
        out = torch.where(solid, values, torch.zeros_like(values)).movedim(-1, 1)
        return FeatureMap(out.contiguous(), (int(images.shape[-2]), int(images.shape[-1])))


class RandomFeatures:
    """Independent random descriptors on a grid of patches, the same for the same picture.

    Args:
        dim: Channels D.
        patch: Pixels a descriptor covers when no resolution is asked for.
        seed: Seed.
    """

    def __init__(self, dim: int = 64, patch: int = 14, seed: int = 0) -> None:
        self.dim, self.patch, self.seed = dim, patch, seed
        self.hash = f"random-features-1-{dim}-{patch}-{seed}"

    def dense(
        self,
        images: Tensor,
        resolution: int | None = None,
        *,
        overlap: int = 1,
        layers: Sequence[int] = (-1,),
        norm: bool = True,
    ) -> FeatureMap:
        """Return random unit descriptors.

        Args:
            images: (B, 3, H, W) RGB in [0, 1].
            resolution: Patches on the longer side.
            overlap: How many times as many descriptors there are along each side.
            layers: Ignored.
            norm: Ignored.

        Returns:
            The map.
        """
        h, w = int(images.shape[-2]), int(images.shape[-1])
        count = overlap * (resolution or max(1, round(max(h, w) / self.patch)))
        grid = (max(1, round(h / max(h, w) * count)), max(1, round(w / max(h, w) * count)))
        maps = []
        for image in images:
            digest = hashlib.sha256(image.cpu().contiguous().numpy().tobytes()).digest()
            generator = torch_generator(self.seed, int.from_bytes(digest[:8], "big"))
            maps.append(torch.randn(self.dim, *grid, generator=generator))
        return FeatureMap(F.normalize(torch.stack(maps), dim=1).to(images), (h, w))
