"""Read written features back as a feature map."""

from __future__ import annotations

from pathlib import Path

import torch

from equifeat.features.formats import read_stored
from equifeat.model.feature_map import FeatureMap


def read(path: str | Path) -> FeatureMap:
    """Read the features of one image, as `equifeat features` wrote them.

    Args:
        path: `OUT/NAME.npz`, `OUT/NAME.safetensors`, or `OUT.zarr/NAME`, the array in the store.
            The file may come from a stranger: nothing in it is run.

    Returns:
        A map of (1, D, h, w) in the type that was stored; points are in pixels of the image.

    Raises:
        FeaturesError: There are no features, or they are damaged or of another format.
        MissingExtraError: A zarr store without the extra `zarr`.
    """
    about, features = read_stored(Path(path))
    tensor = torch.from_numpy(features)[None]
    return FeatureMap(tensor, about.size_hw, about.margin_yx, about.point_scale)
