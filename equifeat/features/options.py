"""The options that features depend on, and the model that computes them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from equifeat.errors import RecipeError
from equifeat.model.precision import Precision

_WORDS = {
    "at": ("patch", "image"),
    "dtype": ("float32", "float16"),
    "precision": get_args(Precision),
}


@dataclass(frozen=True)
class FeatureOptions:
    """What `FeatureExtractor.dense` is asked for, and how its answer is stored.

    Args:
        resolution: Patches on the longer side; None for the image's own size.
        at: "patch" or "image": a feature for every patch or every pixel.
        layers: Blocks whose tokens are taken.
        overlap: Patches start every patch_size / overlap pixels.
        norm: Apply the ViT's final norm.
        normalize: Divide every feature by its L2 norm.
        dtype: Type of the stored numbers.
        precision: Type in which the ViT computes.
        tile: Side of the windows that an image is cut into, in patches; None for whole images.
        tile_overlap: Patches that neighbouring windows share.

    Raises:
        RecipeError: An option has no such value.
    """

    resolution: int | None = None
    at: str = "patch"
    layers: tuple[int, ...] = (-1,)
    overlap: int = 1
    norm: bool = True
    normalize: bool = False
    dtype: str = "float32"
    precision: str = "float32"
    tile: int | None = None
    tile_overlap: int = 0

    def __post_init__(self) -> None:
        """Check what is not checked by the model."""
        if self.resolution is not None and self.resolution < 1:
            raise RecipeError(f"--resolution {self.resolution} must be at least 1 patch")
        if self.tile is not None and not 0 <= self.tile_overlap < self.tile:
            raise RecipeError(
                f"--tile {self.tile} --tile-overlap {self.tile_overlap}: the overlap must be from "
                "0 to tile - 1 patches"
            )
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise RecipeError(
                    f"--{name} {getattr(self, name)!r} is not one of {', '.join(words)}"
                )

    def as_json(self) -> dict[str, Any]:
        """Return the options by name, as JSON has them."""
        out: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return out

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of the stored numbers."""
        return torch.float16 if self.dtype == "float16" else torch.float32


def run_hash(model_hash: str, options: FeatureOptions) -> str:
    """Return the identity of all that the features of a given image depend on.

    Args:
        model_hash: Identity of the model.
        options: The options.

    Returns:
        64 hexadecimal digits.
    """
    text = json.dumps([model_hash, options.as_json()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def source_hash(run: str, size: int, mtime_ns: int, frame: int | None = None) -> str:
    """Return the fingerprint that is kept with the features of an image.

    Args:
        run: What `run_hash` gave.
        size: Bytes of the image file.
        mtime_ns: When it was last changed.
        frame: Number of the frame in a video.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(f"{run} {size} {mtime_ns} {frame}".encode()).hexdigest()
