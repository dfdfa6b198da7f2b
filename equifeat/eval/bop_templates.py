"""Templates of an object: images that show it in known poses, and descriptors with 3D points."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from equifeat.data.bop import BopImage, read_scene, scene_folders
from equifeat.data.bop_images import read_depth, read_mask
from equifeat.data.triangles import Triangles
from equifeat.errors import EvalDataError
from equifeat.eval.features import FeatureSource
from equifeat.eval.object_crop import box_of, crop_object
from equifeat.geometry.camera import Camera, invert, transform
from equifeat.geometry.pixels import from_integer_centers, inside, pixel_index
from equifeat.geometry.raster import rasterize_depth
from equifeat.image_files import read_image
from equifeat.seeding import numpy_generator

PixelCenters = Literal["integer", "corner"]
# Farthest-point sampling looks at no more candidates than this: videos are thinned out evenly.
_MOST_CANDIDATES = 2000
_CHOICE = 71


class Template(NamedTuple):
    """An instance in an image of known pose.

    Attributes:
        image: The image.
        instance: Which of its instances.
    """

    image: BopImage
    instance: int


class TemplateOptions(NamedTuple):
    """How templates become descriptors.

    Attributes:
        crop: Side of the crop in pixels.
        margin: Side of the square window over the longer side of the object's box.
        stride: Pixels of the crop from one descriptor to the next.
        black: Whether everything but the object is painted black.
        depth: Whether 3D points come from the depth image, where there is one.
        pixels: Convention of K.
    """

    crop: int
    margin: float
    stride: int
    black: bool
    depth: bool
    pixels: PixelCenters


class Bank(NamedTuple):
    """Descriptors of all templates of an object.

    Attributes:
        descriptors: (T, D) L2-normalised.
        points: (T, 3) float64 points on the object, mm.
    """

    descriptors: Tensor
    points: Tensor


def corner_K(K: Float[Tensor, "3 3"], pixels: PixelCenters) -> Float[Tensor, "3 3"]:  # noqa: N802
    """Return intrinsics in the project's convention.

    Args:
        K: (3, 3) as in the file.
        pixels: "integer" where the first pixel's centre is (0, 0), "corner" where it is (0.5, 0.5).

    Returns:
        (3, 3), corner convention.
    """
    out = K.clone()
    if pixels == "integer":
        out[:2, 2] = from_integer_centers(K[:2, 2])
    return out


def choose_templates(
    split: Path, objects: Iterable[int], count: int, min_visible: float, seed: int
) -> dict[int, list[Template]]:
    """Choose templates of each object that lie far apart in rotation.

    Args:
        split: Folder of the split.
        objects: Numbers of the objects.
        count: Templates of each object, if there are so many.
        min_visible: Instances less visible than this are left out.
        seed: Seed.

    Returns:
        By object, its templates.

    Raises:
        EvalDataError: The split does not hold the objects.
    """
    wanted = sorted(set(objects))
    found: dict[int, list[Template]] = {obj: [] for obj in wanted}
    seen, step = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 1)
    for folder in scene_folders(split):
        for image in read_scene(folder):
            for index, one in enumerate(image.objects):
                obj = one.obj_id
                if obj not in found or one.visib_fract < min_visible:
                    continue
                if seen[obj] % step[obj] == 0:
                    found[obj].append(Template(image, index))
                seen[obj] += 1
                if len(found[obj]) > _MOST_CANDIDATES:
                    found[obj], step[obj] = found[obj][::2], 2 * step[obj]
    missing = [obj for obj in wanted if not found[obj]]
    if missing:
        raise EvalDataError(
            f"{split}: has no image of object {', '.join(map(str, missing))} with at least "
            f"{min_visible:.0%} of it visible: unpack this split, or name another with "
            "--set template_split=…."
        )
    return {obj: _farthest(found[obj], count, seed, obj) for obj in wanted}


def build_bank(
    templates: Sequence[Template], model: Triangles, options: TemplateOptions, source: FeatureSource
) -> Bank:
    """Describe the templates of an object.

    Args:
        templates: At least one.
        model: The object's surface, for depth and silhouettes that the data set does not have.
        options: How.
        source: The model.

    Returns:
        Descriptors on the source's device, points on the CPU.

    Raises:
        EvalDataError: None of them shows the object.
    """
    rows = [_describe(template, model, options, source) for template in templates]
    kept = [row for row in rows if row is not None]
    if not kept:
        first = templates[0].image
        raise EvalDataError(
            f"{first.folder}: image {first.im_id} and all other templates have an empty mask or no "
            "depth on the object; unpack the split again."
        )
    return Bank(torch.cat([b.descriptors for b in kept]), torch.cat([b.points for b in kept]))


def _farthest(candidates: list[Template], count: int, seed: int, obj: int) -> list[Template]:
    """Farthest-point sampling by the angle between rotations."""
    rng = numpy_generator(seed, _CHOICE, obj)
    R = np.array([t.image.objects[t.instance].rotation for t in candidates])
    chosen = [int(rng.integers(len(candidates)))]
    # trace(A^T B) = 1 + 2 cos(angle): the smaller, the farther
    nearest = R @ R[chosen[0]]
    while len(chosen) < min(count, len(candidates)):
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, R @ R[chosen[-1]])
        nearest[chosen[-1]] = np.inf
    return [candidates[i] for i in chosen]


def _describe(
    template: Template, model: Triangles, options: TemplateOptions, source: FeatureSource
) -> Bank | None:
    frame, one = template.image, template.image.objects[template.instance]
    image = read_image(frame.picture())
    size_hw = (int(image.shape[-2]), int(image.shape[-1]))
    K, pose = corner_K(frame.K, options.pixels), one.cam_from_object
    drawn = rasterize_depth(transform(pose, model.vertices), model.faces, K, size_hw)
    depth = read_depth(frame) if options.depth else None
    file = frame.mask_visib(template.instance)
    mask = read_mask(file) if file is not None else drawn > 0
    for what in (mask, depth):
        if what is not None and tuple(what.shape) != size_hw:
            raise EvalDataError(
                f"{frame.folder}: image {frame.im_id} is {size_hw[1]}x{size_hw[0]} px, its mask or "
                "depth is not; unpack the split again."
            )
    depth = drawn if depth is None else depth.double()
    return describe_view(image, depth, mask, K, pose, options, source)


def describe_view(
    image: Float[Tensor, "3 h w"],
    depth: Float[Tensor, "h w"],
    mask: Bool[Tensor, "h w"],
    K: Float[Tensor, "3 3"],
    cam_from_object: Float[Tensor, "4 4"],
    options: TemplateOptions,
    source: FeatureSource,
) -> Bank | None:
    """Describe the points of an object that one image shows.

    Args:
        image: RGB in [0, 1].
        depth: float64 z-depth in the unit of the pose, 0 = unknown.
        mask: Where the object is.
        K: float64 intrinsics, corner convention.
        cam_from_object: float64 pose.
        options: How; ``depth`` and ``pixels`` say nothing here.
        source: The model.

    Returns:
        Descriptors on the source's device, points on the CPU; None for an empty mask or no depth.
    """
    box = box_of(mask)
    if box is None:
        return None
    size_hw = (int(image.shape[-2]), int(image.shape[-1]))
    crop = crop_object(image * mask if options.black else image, box, options.margin, options.crop)
    spread = crop.to_image(crop.grid(options.stride).double())
    # depth is known at pixel centres only: each point moves to its pixel's, once
    at = torch.unique(pixel_index(spread[inside(spread, size_hw)]), dim=0)
    x, y = at.unbind(1)
    on = mask[y, x] & (depth[y, x] > 0)
    at, z = at[on], depth[y, x][on]
    if not len(at):
        return None
    centers = from_integer_centers(at.double())
    points = transform(invert(cam_from_object), Camera(K, size_hw).unproject(centers, z))
    features = source(crop.image)
    xy = crop.from_image(centers).float()[None].to(features.features.device)
    return Bank(features.sample(xy)[0], points)
