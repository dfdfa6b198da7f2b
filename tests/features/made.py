"""Small pictures, and the features command on them with a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from equifeat.eval.models import open_model
from equifeat.features.command import features_command
from equifeat.model.extractor import FeatureExtractor

MODEL = "test_vit.r160_in1k"  # patches of 16 pixels, 64 channels
SIZES = [(64, 96), (96, 64), (50, 81), (64, 96)]


def model() -> FeatureExtractor:
    return open_model(MODEL, "random")


def write_image(path: Path, size_hw: tuple[int, int], seed: int = 0) -> Path:
    """Write a picture with structure at several scales: noise alone would survive no resizing."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size_hw[::-1], Image.Resampling.BICUBIC), dtype=int)
    pixels = smooth + rng.integers(-20, 21, (*size_hw, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def write_images(folder: Path, sizes: list[tuple[int, int]] | None = None) -> list[Path]:
    """Write a/0.png, b/1.png, a/2.png, … of several sizes."""
    sizes = SIZES if sizes is None else sizes
    return [
        write_image(folder / "ab"[i % 2] / f"{i}.png", size, seed=i) for i, size in enumerate(sizes)
    ]


def compute(*sources: Path, out: Path, **options: Any) -> str:
    """Run the command in this process."""
    options = {"weights": "random", "workers": 0, "device": "cpu", **options}
    return features_command(sources, MODEL, out, **options)
