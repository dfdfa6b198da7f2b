"""A term that keeps what the frozen ViT knows: distillation of features or of their relations."""

from __future__ import annotations

import math
from typing import Literal, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from equifeat.data.batch import PairBatch
from equifeat.errors import RecipeError, suggest
from equifeat.geometry.pixels import pixel_index
from equifeat.model.extractor import FeatureExtractor
from equifeat.model.feature_map import FeatureMap, TrunkState
from equifeat.seeding import torch_generator

PreserveKind = Literal["none", "features", "relations"]
MOST_PATCHES = 512
"""Patches of a view whose relations are compared: the matrix has this many rows and columns."""


class Preservation:
    """How far the features of views are from those of the frozen ViT, over all patches.

    Object and background weigh the same in a view that shows both, so that neither a small object
    nor a plain background is lost.

    Args:
        kind: "features": mean of 1 - cosine of a patch's two features; "relations": mean squared
            difference of the two matrices of cosines between patches of one view.
        weight: What the term is multiplied by in the loss; 0 measures it and trains without.
        seed: Seed of the choice of patches for "relations".

    Raises:
        RecipeError: There is no such kind, or the weight is negative or not finite.
    """

    def __init__(self, kind: str, weight: float, seed: int = 0) -> None:
        kinds = get_args(PreserveKind)
        if kind not in kinds:
            raise RecipeError(
                f"preserve must be one of {', '.join(kinds)}, not {kind!r}.{suggest(kind, kinds)}"
            )
        if not 0.0 <= weight < math.inf:
            raise RecipeError(f"preserve_weight is {weight}: use a finite number, 0 or more")
        self.kind = cast(PreserveKind, kind)
        self.weight = weight
        self.seed = seed

    def __call__(self, maps: FeatureMap, raw: FeatureMap, batch: PairBatch) -> Tensor:
        """Return the term, not yet weighted.

        Args:
            maps: Features of the 2 B views: all views 0, then all views 1.
            raw: The frozen ViT's features of the same views.
            batch: The B pairs.

        Returns:
            Scalar in float32: the mean over views; 0 exactly for the raw features themselves.

        Raises:
            RecipeError: "features" of a model with another number of channels.
        """
        channels, raw_channels = maps.features.shape[1], raw.features.shape[1]
        if self.kind == "features" and channels != raw_channels:
            raise RecipeError(
                f"preserve=features compares features channel by channel, but the head gives "
                f"{channels} channels and the ViT {raw_channels}: use preserve=relations"
            )
        on_object = _on_object(raw, torch.cat([batch.masks0, batch.masks1]))
        with torch.autocast(maps.features.device.type, enabled=False):
            now, then = _at_patches(maps, raw), _at_patches(raw, raw)
            if self.kind == "features":
                return _balanced(on_object).mul(_one_minus_cosine(now, then)).sum(dim=1).mean()
            sides = [(draw, side) for side in (0, 1) for draw in batch.draws]
            terms = [
                _relations(a, b, mask, torch_generator(self.seed, *path))
                for a, b, mask, path in zip(now, then, on_object, sides, strict=True)
            ]
            return torch.stack(terms).mean()


def raw_features(extractor: FeatureExtractor, state: TrunkState) -> Tensor:
    """Run the last blocks as they were before training: no adapter, no head, no gradients.

    Args:
        extractor: The model in training.
        state: What its trunk gave.

    Returns:
        (B, D, h, w) features of the frozen ViT.
    """
    with torch.no_grad():
        return extractor.raw().tail(state).features


def _on_object(raw: FeatureMap, masks: Bool[Tensor, "b h w"]) -> Bool[Tensor, "b p"]:
    """A patch belongs to what lies at its centre."""
    column, row = pixel_index(raw.centers()).flatten(0, 1).unbind(-1)
    return masks[:, row, column]


def _at_patches(maps: FeatureMap, raw: FeatureMap) -> Float[Tensor, "b p d"]:
    """Descriptors at the ViT's patches; a head may give a finer map."""
    if maps.grid_hw == raw.grid_hw:
        return maps.normalized().features.flatten(2).mT
    centers = raw.centers().reshape(1, -1, 2).expand(len(maps.features), -1, -1)
    return maps.sample(centers)


def _one_minus_cosine(a: Float[Tensor, "*b d"], b: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    # Of unit vectors; unlike 1 - a·b it has no rounding left where both are equal.
    return (a - b).square().sum(dim=-1) / 2


def _balanced(on_object: Bool[Tensor, "*b p"]) -> Float[Tensor, "*b p"]:
    """Weights of patches, in sum 1: half for the object and half for the background."""
    sets = torch.stack([on_object, ~on_object]).float()
    count = sets.sum(dim=-1, keepdim=True)
    weights = (sets / count.clamp(min=1.0)).sum(dim=0)
    return weights / (count > 0).sum(dim=0)


def _relations(
    now: Float[Tensor, "p d"],
    then: Float[Tensor, "p c"],
    on_object: Bool[Tensor, "p"],
    generator: torch.Generator,
) -> Tensor:
    """Weighted mean squared difference of the matrices of cosines of one view."""
    if len(now) > MOST_PATCHES:
        rows = _choice(on_object, generator)
        now, then, on_object = now[rows], then[rows], on_object[rows]
    weights = _balanced(on_object)
    return weights @ (now @ now.mT - then @ then.mT).square() @ weights


def _choice(on_object: Bool[Tensor, "p"], generator: torch.Generator) -> Tensor:
    """Rows of patches: half of the object and half of the background, as far as there are."""
    there, beside = (rows.nonzero()[:, 0] for rows in (on_object, ~on_object))
    few = min(len(there), max(MOST_PATCHES // 2, MOST_PATCHES - len(beside)))
    parts = ((there, few), (beside, MOST_PATCHES - few))
    return torch.cat(
        [
            rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]
            for rows, count in parts
        ]
    )
