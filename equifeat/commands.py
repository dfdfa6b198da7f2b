"""What the evaluate, features and match commands do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from equifeat.checkpoint import load_model
from equifeat.data.views import open_views, read_image
from equifeat.errors import ImageError, KeypointError, RecipeError, WeightsError
from equifeat.eval.equivariance import evaluate_equivariance
from equifeat.eval.matching import mutual_nearest, nearest
from equifeat.files import write_bytes, write_npz
from equifeat.geometry.pixels import inside, patch_centers
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.weights import PACKAGED_BACKBONE, packaged_available
from equifeat.progress import progress
from equifeat.viz import match_picture, pca_rgb


def open_model(model: str, weights: str = "auto", device: str = "cpu") -> FeatureExtractor:
    """Open a finetuned model folder, or any timm ViT raw.

    Args:
        model: A model folder, or the name of a timm ViT.
        weights: For a raw ViT: "hub", "packaged", "random", a file, or "auto", which takes the
            packaged weights when the model is the packaged one and they are installed, else the
            hub's.
        device: Device of the model.

    Returns:
        The extractor in eval mode.

    Raises:
        CheckpointError: The folder is not a model folder.
        ModelNameError: timm has no such model.
    """
    if Path(model).exists() or "/" in model or model.startswith("."):
        return load_model(Path(model), device=device)
    if weights == "auto":
        weights = "packaged" if model == PACKAGED_BACKBONE and packaged_available() else "hub"
    return build_extractor(model, weights=weights, head="none", lora_blocks=0).to(device).eval()


def _patches(model: FeatureExtractor, resolution: int | None) -> int | None:
    if resolution is None:
        return None
    if resolution < model.backbone.patch_size:
        raise RecipeError(
            f"--resolution {resolution} is less than one patch of {model.backbone.patch_size} px"
        )
    return round(resolution / model.backbone.patch_size)


def equivariance(
    views: Path,
    model: list[str],
    out: Path | None = None,
    weights: str = "auto",
    pairs: str = "all",
    points: str = "500",
    target_stride: int = 1,
    max_angle: float = 180.0,
    normalizer: Literal["box", "image"] = "box",
    resolution: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """Measure APE and PCDP of models on rendered views.

    Args:
        views: Folder of views of one object, or of many.
        model: Model folders or names of timm ViTs (scored raw).
        out: JSON file to write.
        weights: Weights of the raw models: auto, hub, packaged, random or a file.
        pairs: "all" ordered pairs, or a number drawn per object.
        points: "dense" or a number of covisible pixels drawn per pair.
        target_stride: Match against every n-th mask pixel of the target view, in x and y.
        max_angle: Largest view change in degrees.
        normalizer: "box" (longer side of the object's box in the target view) or "image".
        resolution: Longer side of the model's input in pixels; None keeps the view's size.
        seed: Seed of the drawn pairs, points and bootstrap.
        device: Device of the models.

    Returns:
        The table as text.
    """
    objects = open_views(views)
    results = []
    for name in model:
        extractor = open_model(name, weights, device)
        results.append(
            evaluate_equivariance(
                extractor,
                objects,
                name=name,
                pairs=pairs if pairs == "all" else _count("--pairs", pairs),
                points=points if points == "dense" else _count("--points", points),
                target_stride=target_stride,
                max_angle_deg=max_angle,
                normalizer=normalizer,
                resolution=_patches(extractor, resolution),
                seed=seed,
                progress=progress,
            )
        )
    raise AssertionError


def _count(option: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        word = "all" if option == "--pairs" else "dense"
        raise RecipeError(f"{option} {value!r} must be {word} or a number of at least 1")
    return int(value)
