"""What the match and procedural commands do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.procedural import write_procedural
from equifeat.downstream.transfer import TransferOptions, transfer
from equifeat.errors import KeypointError, RecipeError
from equifeat.eval.matching import mutual_nearest
from equifeat.eval.models import open_model
from equifeat.files import atomic_file
from equifeat.geometry.pixels import inside, patch_centers
from equifeat.image_files import read_image
from equifeat.model.extractor import FeatureExtractor
from equifeat.model.feature_map import FeatureMap
from equifeat.viz import match_picture, save_png


def _dense(extractor: FeatureExtractor, image: Tensor, resolution: int | None) -> FeatureMap:
    with torch.inference_mode():
        return extractor.dense(image[None], resolution)


def match(
    images: Sequence[Path],
    model: str,
    out: Path,
    keypoints: Path | None = None,
    weights: str = "auto",
    resolution: int | None = None,
    device: str = "cpu",
) -> str:
    """Match two images, and write matches.npz and matches.png.

    Without keypoints the centres of all patches are matched and mutual nearest neighbours kept.
    With keypoints each gets its nearest point of the second image, and whether the way back ends
    within one patch of it.

    Args:
        images: Two images, A and B.
        model: A model folder or the name of a timm ViT.
        out: Folder to write to.
        keypoints: Points of A: text with x and y on each line, a JSON list, or an npy array, in
            pixels; the centre of the first pixel is (0.5, 0.5).
        weights: Weights of a raw model: auto, hub, packaged, random or a file.
        resolution: Patches on the longer side of the model's input; the image's own size when None.
        device: Device of the model.

    Returns:
        What was found.

    Raises:
        RecipeError: Not two images.
        KeypointError: A keypoint outside the image, or an unreadable file.
    """
    if len(images) != 2:
        raise RecipeError(f"equifeat match takes two images, not {len(images)}")
    image0, image1 = (read_image(path) for path in images)
    size0 = (int(image0.shape[1]), int(image0.shape[2]))
    asked = None if keypoints is None else read_keypoints(keypoints, size0)
    extractor = open_model(model, weights, device)
    if asked is None:
        map0, map1 = (_dense(extractor, image, resolution) for image in (image0, image1))
        xy0, d0 = _grid(map0, map0.grid_hw)
        xy1, d1 = _grid(map1, map1.grid_hw)
        found = mutual_nearest(d0, d1)
        keep = found.matches0 >= 0
        xy0, xy1 = xy0[keep], xy1[found.matches0[keep]]
        similarity, mutual = found.similarity[keep], torch.ones(len(xy0), dtype=torch.bool)
    else:
        options = TransferOptions(resolution=resolution, method="nearest")
        xy0, (xy1, similarity, mutual) = asked, transfer(extractor, image0, asked, image1, options)
    with atomic_file(out / "matches.npz") as temporary:
        np.savez_compressed(
            temporary,
            keypoints0=xy0.numpy(),
            keypoints1=xy1.numpy(),
            similarity=similarity.numpy(),
            mutual=mutual.numpy(),
        )
    best = similarity.argsort(descending=True)[:150]
    picture = match_picture(
        image0,
        image1,
        xy0[best],
        xy1[best],
        similarity[best],
        value_range=(float(similarity[best].min()), float(similarity[best].max())),
        label="cosine similarity",
        colormap="viridis",
        titles=(images[0].name, images[1].name),
        title=f"{len(xy0)} matches" + (", the 150 most similar shown" if len(xy0) > 150 else ""),
    )
    save_png(picture, out / "matches.png")
    return f"{len(xy0)} matches, {int(mutual.sum())} mutual: {out}/matches.npz, {out}/matches.png"


def _grid(found: FeatureMap, grid_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Points on a regular grid over the image, on the CPU, and their descriptors."""
    xy = patch_centers(grid_hw, found.size_hw).reshape(-1, 2)
    descriptors = found.sample(xy[None].to(found.features.device))[0].cpu()
    return xy, descriptors


def read_keypoints(path: Path, size_hw: tuple[int, int]) -> Tensor:
    """Read points of an image.

    Args:
        path: .npy, .json, or text with x and y on each line (comma or blank between).
        size_hw: Height and width of the image.

    Returns:
        (N, 2) float32 xy in pixels.

    Raises:
        KeypointError: The file is unreadable or a point lies outside the image.
    """
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        elif path.suffix == ".json":
            values = np.array(json.loads(path.read_text()), dtype=np.float32)
        else:
            lines = path.read_text().replace(",", " ").split("\n")
            values = np.array([line.split() for line in lines if line.strip()], dtype=np.float32)
        points = torch.from_numpy(np.asarray(values, dtype=np.float32))
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise KeypointError(f"{path}: unreadable keypoints ({reason}); write x y lines") from error
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        shape = tuple(points.shape)
        raise KeypointError(f"{path}: keypoints must be N rows of x and y, not of shape {shape}")
    outside = ~inside(points, size_hw)
    if outside.any():
        x, y = points[outside][0].tolist()
        h, w = size_hw
        raise KeypointError(
            f"{path}: keypoint ({x:g}, {y:g}) lies outside the image of {w}x{h} px; "
            "give pixels with 0 <= x < width and 0 <= y < height"
        )
    return points


def procedural(out: Path, count: int = 1, seed: int = 0) -> str:
    """Write textured, asymmetric objects as GLB files, for trying things out.

    Args:
        out: Folder to write to.
        count: Number of objects.
        seed: Seed of the first object; the others follow.

    Returns:
        What was written.

    Raises:
        RecipeError: count is below 1.
    """
    if count < 1:
        raise RecipeError(f"--count {count} must be at least 1")
    files = write_procedural(out, range(seed, seed + count))
    return "\n".join(str(file) for file in files)
