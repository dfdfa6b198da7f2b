"""NAVI (Jampani et al., NeurIPS 2023; github.com/google/navi), version 1, as Probe3D reads it.

OBJECT/wild_set and OBJECT/multiview_… hold images/NAME.jpg, depth/NAME.png and annotations.json, a
list of {filename, image_size: [h, w], camera: {q: [w, x, y, z], t: [mm], focal_length}}. q and t
carry the object's points to the camera, with OpenCV axes; the principal point is the image's
middle. Depth is inverse: z = 655350 / value mm. Files `downsampled_NAME` are taken where there are
any: Probe3D makes them (data_processing/resize_navi.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from equifeat.data.text_files import MAX_LIST_BYTES, plain_name, read_text
from equifeat.errors import EvalDataError
from equifeat.geometry.camera import rotation_angle_deg
from equifeat.geometry.pixels import SizeHW
from equifeat.seeding import torch_generator

Collection = Literal["wild_set", "multiview"]
_MAX_PIXELS = 200_000_000
# Depth in mm of the value 1 in a depth image.
_DEPTH_OF_ONE = 655350.0


class NaviView(NamedTuple):
    """One photograph of an object.

    Attributes:
        obj: Name of the object.
        collection: Folder of the photograph, such as "wild_set".
        name: Name of the photograph, without its ending.
        image: The file.
        depth: The depth image.
        focal: Focal length in pixels of an image of ``size_hw``.
        size_hw: Height and width of the original photograph.
        cam_from_object: (4, 4) float64, metres.
    """

    obj: str
    collection: str
    name: str
    image: Path
    depth: Path
    focal: float
    size_hw: SizeHW
    cam_from_object: Tensor


class NaviPair(NamedTuple):
    """Two photographs of an object.

    Attributes:
        name: Unique.
        view0: The first.
        view1: The second.
    """

    name: str
    view0: NaviView
    view1: NaviView


def read_navi(root: Path, collection: Collection = "wild_set") -> dict[tuple[str, str], Any]:
    """Read the annotations of all objects that have a wild_set and a multiview set.

    Args:
        root: Folder of the objects.
        collection: Which sets are read: "wild_set", or all whose name starts with "multiview".

    Returns:
        By object and set, the list of its `NaviView`, both in the order of names.

    Raises:
        EvalDataError: There is none, or annotations are not in the format.
    """
    sets: dict[tuple[str, str], Any] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []:
        wild = folder / "wild_set"
        several = sorted(p for p in folder.glob("multiview*") if p.is_dir())
        if not wild.is_dir() or not several:
            continue
        for one in [wild] if collection == "wild_set" else several:
            sets[folder.name, one.name] = _read_set(folder.name, one)
    if not sets:
        raise EvalDataError(f"{root}: no folder in it has both a wild_set and a multiview set.")
    return sets


def navi_pairs(
    sets: dict[tuple[str, str], list[NaviView]], max_angle: float, every: int, seed: int
) -> list[NaviPair]:
    """Draw another photograph of its set to each photograph, and keep some of the pairs.

    Args:
        sets: From `read_navi`.
        max_angle: Largest angle of the rotation between the two, in degrees.
        every: Every so manieth photograph is kept, after drawing for all.
        seed: Seed. Probe3D draws with a seed of its own, but in the order of os.listdir, so its
            pairs cannot be had again.

    Returns:
        The pairs.
    """
    pairs = []
    number = 0
    for (obj, name), views in sets.items():
        poses = torch.stack([view.cam_from_object for view in views])[:, :3, :3]
        for i, view in enumerate(views):
            angle = rotation_angle_deg(poses[i] @ poses.mT)
            others = ((angle <= max_angle) & (torch.arange(len(views)) != i)).nonzero().flatten()
            kept, draw = number % every == 0, number
            number += 1
            if not kept or not len(others):
                continue
            chosen = int(torch.randint(len(others), (1,), generator=torch_generator(seed, draw)))
            other = views[int(others[chosen])]
            pairs.append(NaviPair(f"{obj}/{name}/{view.name}-{other.name}", view, other))
    return pairs


def read_navi_depth(file: Path) -> Float[Tensor, "h w"]:
    """Read a depth image.

    Args:
        file: 16-bit PNG.

    Returns:
        (H, W) float64 z-depth in metres, 0 where there is no object.

    Raises:
        EvalDataError: It is missing or damaged.
    """
    values = torch.from_numpy(read_16_bits(file))
    return torch.where(values > 0, _DEPTH_OF_ONE / values.clamp(min=1.0) / 1000.0, 0.0)


def read_16_bits(file: Path) -> Any:
    """Read a picture of one channel, of 16 bits mostly, turned upright.

    Args:
        file: The picture.

    Returns:
        (H, W) float64 values.

    Raises:
        EvalDataError: It is missing, damaged, too large or has several channels.
    """
    try:
        with Image.open(file) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise EvalDataError(
                    f"{file}: {image.width}x{image.height} px is more than {_MAX_PIXELS} pixels; "
                    "make it smaller first."
                )
            values = np.array(ImageOps.exif_transpose(image))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise EvalDataError(f"{file}: cannot be read ({error}); unpack it again.") from error
    except Image.DecompressionBombError as error:
        raise EvalDataError(f"{file}: is too large ({error}); make it smaller first.") from error
    if values.ndim != 2:
        raise EvalDataError(f"{file}: has several channels; a depth image has one.")
    return values.astype(np.float64)


def _read_set(obj: str, folder: Path) -> list[NaviView]:
    file = folder / "annotations.json"
    try:
        annotations = json.loads(read_text(file, MAX_LIST_BYTES))
    except ValueError as error:
        raise EvalDataError(f"{file}: is no JSON ({error}); unpack it again.") from error
    if not isinstance(annotations, list):
        raise EvalDataError(f"{file}: is no list of photographs; unpack it again.")
    views = []
    for number, one in enumerate(annotations):
        where = f"{file}: photograph {number}"
        try:
            name = plain_name(where, one["filename"]).split(".")[0]
            h, w = (int(side) for side in one["image_size"])
            camera = one["camera"]
            focal = float(camera["focal_length"])
            q = torch.tensor([float(x) for x in camera["q"]], dtype=torch.float64)
            t = torch.tensor([float(x) for x in camera["t"]], dtype=torch.float64)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EvalDataError(f"{where} lacks or misspells {error}; unpack it again.") from error
        good = len(q) == 4 and len(t) == 3 and bool(torch.cat([q, t]).isfinite().all())
        if not good or not float(q.norm()) > 0 or not focal > 0 or min(h, w) < 1:
            raise EvalDataError(f"{where} has no camera: q {q.tolist()}, t {t.tolist()}, {focal}.")
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3], pose[:3, 3] = _rotation(q / q.norm()), t / 1000.0
        image = _smaller(folder / "images" / f"{name}.jpg")
        depth = _smaller(folder / "depth" / f"{name}.png")
        views.append(NaviView(obj, folder.name, name, image, depth, focal, (h, w), pose))
    return sorted(views, key=lambda view: view.name)


def _smaller(file: Path) -> Path:
    other = file.with_name(f"downsampled_{file.name}")
    return other if other.is_file() else file


def _rotation(q: Tensor) -> Tensor:
    """Rotation of a unit quaternion (w, x, y, z)."""
    w, x, y, z = q.unbind()
    rows = [
        1 - 2 * (y * y + z * z),
        2 * (x * y - z * w),
        2 * (x * z + y * w),
        2 * (x * y + z * w),
        1 - 2 * (x * x + z * z),
        2 * (y * z - x * w),
        2 * (x * z - y * w),
        2 * (y * z + x * w),
        1 - 2 * (x * x + y * y),
    ]
    return torch.stack(rows).reshape(3, 3)
