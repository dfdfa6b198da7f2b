"""Keep what is frozen of pictures that come again, so that small runs pay for it once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from equifeat.model.extractor import FeatureExtractor
from equifeat.model.feature_map import TrunkState
from equifeat.train.preserve import raw_features

# Object, view, and which of its fixed augmentations (0: as rendered).
ViewKey = tuple[str, int, int]


class FrozenViews(NamedTuple):
    """What never changes in training of one or several views.

    Attributes:
        state: Tokens after the frozen blocks.
        raw: (B, D, h, w) features of the frozen ViT, where they were asked for.
    """

    state: TrunkState
    raw: Tensor | None

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.state.tokens.nbytes + (0 if self.raw is None else self.raw.nbytes)


class TrunkCache:
    """Least-recently-used store of what is frozen, one entry a view.

    Each view goes through the ViT alone, cached or not, so that a resumed run with a cold cache
    computes bit by bit what the unbroken run did.

    Args:
        max_bytes: Largest size of all that is stored; 0 stores nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._views: OrderedDict[ViewKey, FrozenViews] = OrderedDict()

    def views(
        self,
        extractor: FeatureExtractor,
        images: Tensor,
        keys: Sequence[ViewKey | None],
        resolution: int | None,
        raw: bool = False,
    ) -> FrozenViews:
        """Return what is frozen of a batch of views of one size.

        Args:
            extractor: The model; what is frozen in it never goes stale.
            images: (B, 3, H, W) images.
            keys: Identity of each picture, or None for one that does not come again.
            resolution: Patches on the longer side.
            raw: Whether to give the frozen ViT's own features too; always the same of one cache.

        Returns:
            That of all views, joined along the batch.
        """
        found = [
            self._one(extractor, images[i : i + 1], key, resolution, raw)
            for i, key in enumerate(keys)
        ]
        maps = [one.raw for one in found if one.raw is not None]
        state = TrunkState.cat([one.state for one in found])
        return FrozenViews(state, torch.cat(maps) if maps else None)

    def _one(
        self,
        extractor: FeatureExtractor,
        image: Tensor,
        key: ViewKey | None,
        resolution: int | None,
        raw: bool,
    ) -> FrozenViews:
        if key is not None and key in self._views:
            self.hits += 1
            self._views.move_to_end(key)
            return self._views[key]
        self.misses += 1
        state = extractor.trunk(image, resolution)
        view = FrozenViews(state, raw_features(extractor, state) if raw else None)
        size = view.nbytes
        if key is None or size > self.max_bytes:
            return view
        while self.bytes + size > self.max_bytes:
            self.bytes -= self._views.popitem(last=False)[1].nbytes
        self._views[key] = view
        self.bytes += size
        return view
