"""Feature maps of a scene's images, as trainers of radiance fields and Gaussian splats read them.

One image is in memory at a time. What is computed waits in a folder `.partial` beside the result,
so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor

from equifeat.downstream.nerf_images import SceneImage, scene_images
from equifeat.downstream.waiting_maps import WaitingMaps, fit_principal, waiting_maps
from equifeat.errors import ImageError, RecipeError
from equifeat.eval.models import extractor_hash, open_model
from equifeat.files import atomic_file
from equifeat.geometry.pixels import from_integer_centers, pixel_centers, to_integer_centers
from equifeat.image_files import read_image
from equifeat.model.extractor import FeatureExtractor
from equifeat.model.feature_map import FeatureMap
from equifeat.progress import progress

Layout = Literal["lerf", "feature-3dgs", "feature-3dgs-r0", "npy"]
INDEX, COMPONENTS = "features.json", "pca.safetensors"
LERF_DATA, LERF_INFO = "dino.npy", "dino.info"
# LERF trains on this share of the images (lerf_config.py), and its field has this many outputs.
LERF_TRAIN_FRACTION, LERF_DIM = 0.99, 384
_PARTIAL = ".partial"
_FORMAT, _VERSION = "equifeat-scene-features", 1
_CELLS = (
    "cells cover the image corner to corner: cell (i, j) lies at ((j + 0.5) * W / w, "
    "(i + 0.5) * H / h), where the first pixel's centre is (0.5, 0.5)"
)
_PLACES = {
    "npy": _CELLS,
    "feature-3dgs-r0": _CELLS,
    "lerf": "pixel (row, column) of an image of H x W reads cell (row * h // H, column * w // W)",
    "feature-3dgs": "cell (i, j) lies on the centre of pixel (i * (H - 1) / (h - 1), "
    "j * (W - 1) / (w - 1)), the first pixel being 0: align_corners=True",
}


@dataclass(frozen=True)
class SceneOptions:
    """Which features of which images are written.

    Args:
        resolution: Patches on the longer side; None for the images' own size.
        normalize: Divide every feature by its L2 norm (before the PCA).
        half: Write float16 instead of float32.
        pca: Channels to keep, by principal components of all images together; None for all.
        downscale: See `equifeat.downstream.nerf_images.scene_images`.
        train_fraction: Share of the images to take; None for the trainer's own: 0.99 for LERF, else
            all of them.
    """

    resolution: int | None = None
    normalize: bool = True
    half: bool = False
    pca: int | None = None
    downscale: int | None = None
    train_fraction: float | None = None


def write_scene_features(
    scene: str | Path,
    model: str | Path | FeatureExtractor,
    out: str | Path,
    layout: str = "lerf",
    options: SceneOptions | None = None,
    *,
    weights: str = "auto",
    device: str = "cpu",
) -> str:
    """Write the feature map of every image of a scene for a trainer to read.

    Args:
        scene: A nerfstudio scene (transforms.json), or a folder of images.
        model: A model folder, the name of a timm ViT, or a model in memory.
        out: Folder to write to; an interrupted run of the same job goes on there.
        layout: "lerf" writes dino.npy (N, h, w, D) and dino.info; "feature-3dgs" writes
            NAME_fmap_CxHxW.pt (D, h, w) for every image, "feature-3dgs-r0" the same for its option
            -r 0, which compares other places; "npy" writes NAME.npy (D, h, w).
        options: Which features, of which images.
        weights: Weights of a raw ViT, see `equifeat.eval.models.open_model`.
        device: Device of a model that is opened here.

    Returns:
        What was written and what the trainer needs to know.

    Raises:
        RecipeError: An option is out of range, two images have one name, or out holds other files.
        ImageError: An image cannot be read, or LERF's images differ in size.
        CheckpointError: The model cannot be loaded.
    """
    options, out = options or SceneOptions(), Path(out)
    if layout not in get_args(Layout):
        raise RecipeError(f"layout must be one of {', '.join(get_args(Layout))}, not {layout!r}")
    fraction = options.train_fraction
    if fraction is None:
        fraction = LERF_TRAIN_FRACTION if layout == "lerf" else 1.0
    images = scene_images(scene, options.downscale, fraction)
    _check_images(images, layout)
    opened = not isinstance(model, FeatureExtractor)
    extractor = open_model(str(model), weights, device) if opened else model
    assert isinstance(extractor, FeatureExtractor)
    if options.pca is not None and not 1 <= options.pca <= extractor.dim:
        raise RecipeError(f"pca must be between 1 and the model's {extractor.dim} channels")
    chosen = asdict(replace(options, train_fraction=fraction))
    job = {
        "format": _FORMAT,
        "version": _VERSION,
        "layout": layout,
        "model": extractor_hash(extractor),
        "options": chosen,
        "images": [
            {"file": image.path.name, "size_hw": list(image.size_hw), "bytes": _bytes(image)}
            for image in images
        ],
    }
    if _is_done(out, job):
        return f"{out} holds these features already"
    # neither type nor components change what the model computes
    computed = {**job, "options": {**chosen, "half": None, "pca": None}}
    maps = waiting_maps(out / _PARTIAL, computed, len(images))
    for index, image in enumerate(progress(images, "features")):
        if not maps.has(index):
            maps.put(index, _features(extractor, image, layout, options))
    maps = replace(maps, half=options.half)
    if options.pca is not None:
        principal = fit_principal(maps, options.pca)
        maps = replace(maps, principal=principal)
        with atomic_file(out / COMPONENTS) as temporary:
            save_file(principal._asdict(), temporary)
    size = _write(out, layout, maps, images)
    h, w, channels = maps.shape(0)
    index_text = {**job, "channels": channels, "pixels": _PLACES[layout]}
    with atomic_file(out / INDEX) as temporary:
        temporary.write_text(json.dumps(index_text, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(maps.folder)
    kind = "float16" if options.half else "float32"
    said = (
        f"wrote {len(images)} maps, the first of {h} x {w} patches and {channels} channels "
        f"({kind}, {size / 2**20:.1f} MiB in all), to {out}"
    )
    if layout == "lerf" and channels != LERF_DIM:
        said += f"\nLERF expects {LERF_DIM} channels: set n_output_dims={channels} of its dino_net"
    return said


def radiance_field_command(
    scene: str,
    model: str,
    out: Path,
    layout: Layout = "lerf",
    resolution: int | None = None,
    pca: int | None = None,
    half: bool = False,
    downscale: int | None = None,
    train_fraction: float | None = None,
    weights: str = "auto",
    device: str = "cpu",
) -> str:
    """Write the feature maps of a scene for a radiance field or Gaussian splatting trainer.

    Args:
        scene: A folder with a transforms.json of nerfstudio, or a folder of images.
        model: A model folder or the name of a timm ViT.
        out: Folder to write to.
        layout: lerf, feature-3dgs (feature-3dgs-r0 for its option -r 0), or npy.
        resolution: Patches on the longer side of the model's input; the image's own size when None.
        pca: Channels to keep, by principal components of all images together.
        half: Write float16.
        downscale: Take the copies in images_2, images_4, …; nerfstudio's own choice when None.
        train_fraction: Share of the images to take; 0.99 for lerf and 1 else when None.
        weights: Weights of a raw model: auto, hub, packaged, random or a file.
        device: Device of the model.

    Returns:
        What was written.
    """
    options = SceneOptions(resolution, True, half, pca, downscale, train_fraction)
    return write_scene_features(scene, model, out, layout, options, weights=weights, device=device)


def _features(
    extractor: FeatureExtractor, image: SceneImage, layout: str, options: SceneOptions
) -> Tensor:
    """Return (h, w, D) float32 on the grid that the layout's reader assumes."""
    with torch.inference_mode():
        maps = extractor.dense(read_image(image.path)[None], options.resolution)
        # a reference's faulty sampling has no place in a picture of the scene
        maps = replace(maps, point_scale=1.0)
        values = _on_pixel_centers(maps) if layout == "feature-3dgs" else maps.features
        values = values[0].float()
        values = F.normalize(values, dim=0) if options.normalize else values
        return values.permute(1, 2, 0).cpu().contiguous()


def _on_pixel_centers(maps: FeatureMap) -> Tensor:
    """Resample (1, D, h, w) so that the outermost cells lie on centres of the outermost pixels.

    Feature 3DGS shrinks its rendered map to the size of ours with align_corners=True before it
    compares them. With -r 0 it renders at that size, and there is nothing to shrink.
    """
    (height, width), (h, w) = maps.size_hw, maps.grid_hw
    index = to_integer_centers(pixel_centers((h, w), maps.features.device, torch.float32))
    step = index.new_tensor([(width - 1) / max(1, w - 1), (height - 1) / max(1, h - 1)])
    xy = from_integer_centers(index * step).reshape(1, -1, 2)
    return maps.sample(xy, normalize=False).mT.reshape(1, -1, h, w)


def _write(out: Path, layout: str, maps: WaitingMaps, images: list[SceneImage]) -> int:
    """Write the files of a layout; return their bytes."""
    if layout == "lerf":
        kind = np.float16 if maps.half else np.float32
        target, shape = out / LERF_DATA, (len(images), *maps.shape(0))
        with atomic_file(target) as temporary:
            stored = np.lib.format.open_memmap(temporary, mode="w+", dtype=kind, shape=shape)
            for index, values in enumerate(maps):
                stored[index] = values.numpy()
            stored.flush()
            del stored
        with atomic_file(out / LERF_INFO) as temporary:
            # LERF compares it with its own, so nothing else may be in it
            temporary.write_text(json.dumps({"image_shape": list(images[0].size_hw)}))
        return target.stat().st_size
    size = 0
    for image, values in zip(images, maps, strict=True):
        planes = values.permute(2, 0, 1).contiguous()
        target = out / _file_name(image.path, layout)
        with atomic_file(target) as temporary:
            if layout == "npy":
                np.save(temporary, planes.numpy())
            else:
                torch.save(planes, temporary)
        size += target.stat().st_size
    return size


def _file_name(path: Path, layout: str) -> str:
    """Return the name of an image's own file; Feature 3DGS cuts names at their first dot."""
    if layout == "npy":
        return f"{path.stem}.npy"
    return f"{path.name.split('.')[0]}_fmap_CxHxW.pt"


def _check_images(images: list[SceneImage], layout: str) -> None:
    """Raise unless the layout can hold these images."""
    if layout == "lerf":
        odd = next((image for image in images if image.size_hw != images[0].size_hw), None)
        if odd is not None:
            (h, w), (h0, w0) = odd.size_hw, images[0].size_hw
            raise ImageError(
                f"{odd.path}: {w}x{h} px, but {images[0].path.name} has {w0}x{h0}, and LERF needs "
                "images of one size: make them equal or take another layout"
            )
        return
    names: dict[str, Path] = {}
    for image in images:
        first = names.setdefault(_file_name(image.path, layout), image.path)
        if first is not image.path:
            raise RecipeError(
                f"{first} and {image.path} would both become {_file_name(first, layout)}: "
                "rename one"
            )


def _bytes(image: SceneImage) -> int:
    return image.path.stat().st_size


def _is_done(out: Path, job: dict[str, Any]) -> bool:
    """Return whether out holds the result of this job; raise when it holds another's."""
    try:
        found = json.loads((out / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise RecipeError(f"{out / INDEX} cannot be read ({error}): give a new folder") from error
    if isinstance(found, dict) and all(found.get(key) == value for key, value in job.items()):
        return True
    raise RecipeError(
        f"{out} holds features of another model, of other images or with other options: "
        "give a new folder, or delete it"
    )
