"""View-equivariant features of vision transformers.

The public names are loaded on first use, so that `import equifeat` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from equifeat._version import __version__

if TYPE_CHECKING:
    from equifeat.checkpoint import load_model, save_model
    from equifeat.checkpoint import load_model as load
    from equifeat.hub.pretrained import from_pretrained
    from equifeat.image_files import read_image
    from equifeat.model.extractor import FeatureExtractor, build_extractor
    from equifeat.video_files import VideoFrames

__all__ = [
    "FeatureExtractor",
    "VideoFrames",
    "__version__",
    "build_extractor",
    "from_pretrained",
    "load",
    "load_model",
    "read_image",
    "save_model",
]

_WHERE = {
    "FeatureExtractor": ("equifeat.model.extractor", "FeatureExtractor"),
    "VideoFrames": ("equifeat.video_files", "VideoFrames"),
    "build_extractor": ("equifeat.model.extractor", "build_extractor"),
    "from_pretrained": ("equifeat.hub.pretrained", "from_pretrained"),
    "load": ("equifeat.checkpoint", "load_model"),
    "load_model": ("equifeat.checkpoint", "load_model"),
    "read_image": ("equifeat.image_files", "read_image"),
    "save_model": ("equifeat.checkpoint", "save_model"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'equifeat' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
