"""Several models on one backbone: what they have in common is computed once a view."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from equifeat.model.extractor import FeatureExtractor
from equifeat.model.feature_map import FeatureMap, TrunkState

_Held = TypeVar("_Held", TrunkState, FeatureMap)


class SharedTokens:
    """What models on one backbone have in common, by image.

    Args:
        max_bytes: Images beyond this size are not kept; None keeps all. The first ones stay, since
            an evaluation goes through its views in the same order again and again.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.trunks: dict[bytes, TrunkState] = {}
        self.raws: dict[bytes, FeatureMap] = {}

    def __len__(self) -> int:
        return len(self.trunks)

    def trunk(self, key: bytes, make: Callable[[], TrunkState]) -> TrunkState:
        """Return the tokens after the frozen blocks.

        Args:
            key: Identity of the image.
            make: Computes what is not held yet.

        Returns:
            The state.
        """
        return self._hold(self.trunks, key, make, lambda state: state.tokens)

    def raw(self, key: bytes, make: Callable[[], FeatureMap]) -> FeatureMap:
        """Return the raw ViT's features.

        Args:
            key: Identity of the image.
            make: Computes what is not held yet.

        Returns:
            The feature map.
        """
        return self._hold(self.raws, key, make, lambda features: features.features)

    def _hold(
        self,
        held: dict[bytes, _Held],
        key: bytes,
        make: Callable[[], _Held],
        tensor: Callable[[_Held], Tensor],
    ) -> _Held:
        if key in held:
            return held[key]
        value = make()
        size = tensor(value).numel() * tensor(value).element_size()
        if self.max_bytes is None or self.bytes + size <= self.max_bytes:
            held[key] = value
            self.bytes += size
        return value


class SharedTrunk(nn.Module):
    """One of several models on one backbone.

    The frozen blocks are common to all; the raw ViT's own last blocks are common to those whose
    adapter is still zero, since such an adapter changes nothing, to the bit.

    Args:
        extractor: The model.
        shared: What is common, the same object for all models.
        first: The model with the most adapted blocks; it makes the tokens.
    """

    def __init__(
        self, extractor: FeatureExtractor, shared: SharedTokens, first: FeatureExtractor
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.shared = shared
        self.first = first
        adapter = extractor.adapter
        self.is_raw = adapter is None or not any(
            bool(update.b.any()) for key in adapter.blocks for update in adapter.pair(int(key))
        )

    def dense(
        self,
        images: Tensor,
        resolution: int | None = None,
        *,
        overlap: int = 1,
        layers: Sequence[int] = (-1,),
        norm: bool = True,
    ) -> FeatureMap:
        """Return the model's features; see FeatureExtractor.dense.

        Only maps with the default options share their trunk; others are computed whole.

        Args:
            images: (1, 3, H, W) RGB in [0, 1].
            resolution: Patches on the longer side.
            overlap: Patches start every patch_size / overlap pixels.
            layers: Blocks whose tokens are taken.
            norm: Apply the ViT's final norm.

        Returns:
            The feature map.
        """
        if (overlap, tuple(layers), norm) != (1, (-1,), True):
            with torch.no_grad():
                return self.extractor.dense(
                    images, resolution, overlap=overlap, layers=layers, norm=norm
                )
        key = hashlib.sha256(images.cpu().numpy().tobytes()).digest() + str(resolution).encode()

        def trunk() -> TrunkState:
            return self.shared.trunk(key, lambda: self.first.trunk(images, resolution))

        with torch.no_grad():
            if not self.is_raw:
                return self.extractor.tail(trunk())
            raw = self.shared.raw(key, lambda: self.first.raw().tail(trunk()))
            features = self.extractor.head(raw.features)
            return replace(raw, features=features, point_scale=self.extractor.point_scale)
