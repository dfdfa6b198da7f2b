"""Refinement heads on the patch tokens."""

from __future__ import annotations

import math
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equifeat.errors import RecipeError, suggest
from equifeat.seeding import torch_generator

HeadKind = Literal["none", "conv", "residual"]


class Head(nn.Module):
    """A 3 × 3 convolution of the feature map, or nothing.

    Args:
        kind: "conv": conv(x) with torch's default random start (the reference);
            "residual": x + conv(x) with conv zero at the start, so that an untrained model is
            exactly the raw ViT; "none": x.
        dim: Number of channels.
        seed: Seed of the random start.

    Raises:
        RecipeError: There is no such kind.
    """

    def __init__(self, kind: str, dim: int, seed: int = 0) -> None:
        super().__init__()
        if kind not in get_args(HeadKind):
            kinds = ", ".join(get_args(HeadKind))
            near = suggest(kind, get_args(HeadKind))
            raise RecipeError(f"head must be one of {kinds}, not {kind!r}.{near}")
        self.kind = cast(HeadKind, kind)
        self.conv: nn.Conv2d | None = None
        if kind == "none":
            return
        with torch.random.fork_rng(devices=[]):  # Conv2d's own start draws global random numbers
            self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        assert self.conv.bias is not None
        if kind == "residual":
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)
        else:
            generator = torch_generator(seed)
            bound = 1.0 / math.sqrt(dim * 9)  # what nn.Conv2d.reset_parameters does
            nn.init.kaiming_uniform_(self.conv.weight, a=math.sqrt(5), generator=generator)
            nn.init.uniform_(self.conv.bias, -bound, bound, generator=generator)
        # A map of tokens has its channels last already.
        self.conv.to(memory_format=torch.channels_last)

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """Refine a feature map.

        Args:
            features: Patch tokens as a map.

        Returns:
            A map of the same shape.
        """
        if self.conv is None:
            return features
        refined: Tensor = self.conv(features.to(self.conv.weight.dtype))
        return features + refined if self.kind == "residual" else refined
