"""Keep the frozen blocks' tokens of un-augmented views, so that small runs pay for them once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from equifeat.model.extractor import FeatureExtractor
from equifeat.model.feature_map import TrunkState

ViewKey = tuple[str, int]


class TrunkCache:
    """Least-recently-used store of trunk states, one a view.

    Each view goes through the trunk alone, cached or not, so that a resumed run with a cold cache
    computes bit by bit what the unbroken run did.

    Args:
        max_bytes: Largest size of all stored tokens; 0 stores nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._states: OrderedDict[ViewKey, TrunkState] = OrderedDict()

    def states(
        self,
        extractor: FeatureExtractor,
        images: Tensor,
        keys: Sequence[ViewKey | None],
        resolution: int | None,
    ) -> TrunkState:
        """Return the trunk's tokens of a batch of views of one size.

        Args:
            extractor: The model; its trunk is frozen, so tokens never go stale.
            images: (B, 3, H, W) images.
            keys: Identity of each view, or None for views that must not be stored (augmented).
            resolution: Patches on the longer side.

        Returns:
            The states of all views, joined along the batch.
        """
        return TrunkState.cat(
            [self._one(extractor, images[i : i + 1], key, resolution) for i, key in enumerate(keys)]
        )

    def _one(
        self,
        extractor: FeatureExtractor,
        image: Tensor,
        key: ViewKey | None,
        resolution: int | None,
    ) -> TrunkState:
        if key is not None and key in self._states:
            self.hits += 1
            self._states.move_to_end(key)
            return self._states[key]
        self.misses += 1
        state = extractor.trunk(image, resolution)
        size = state.tokens.numel() * state.tokens.element_size()
        if key is None or size > self.max_bytes:
            return state
        while self.bytes + size > self.max_bytes:
            _, old = self._states.popitem(last=False)
            self.bytes -= old.tokens.numel() * old.tokens.element_size()
        self._states[key] = state
        self.bytes += size
        return state
