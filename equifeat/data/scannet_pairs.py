"""The 1,500 pairs of ScanNet's test split, in the folder that LoFTR offers and Probe3D reads.

SCENE/color/N.jpg (480x640), SCENE/depth/N.png (16 bits, mm, of the same view), SCENE/pose/N.txt
(world_from_cam); test.npz with `name`: rows of scene, sequence and both frames; intrinsics.npz: K
of each scene. Without test.npz the pairs, K and relative poses come from SuperGlue's list
scannet_test_pairs_with_gt.txt (see equifeat/data/image_pairs.py); its K is of the pictures that it
names, 968x1296 in ScanNet, so smaller pictures do not fit it.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from equifeat.data.image_pairs import PixelCenters, find_list, read_K, read_pair_list, rigid
from equifeat.data.text_files import MAX_ANNOTATION_BYTES, read_text
from equifeat.errors import EvalDataError
from equifeat.geometry.camera import invert
from equifeat.geometry.pixels import SizeHW

_MAX_NPZ_BYTES = 2**24
# What intrinsics.npz is for, whatever the size of the pictures (LoFTR and Probe3D resize them).
_ARRAYS_HW = (480, 640)


class ScanNetPair(NamedTuple):
    """Two frames of a scene.

    Attributes:
        name: Unique.
        scene: Such as "scene0707_00".
        images: Both pictures.
        depths: Both depth images.
        K: (2, 3, 3) float64 intrinsics, corner convention.
        K_hw: Height and width of the images that K is for; None for the pictures' own.
        cam1_from_cam0: (4, 4) float64, metres.
    """

    name: str
    scene: str
    images: tuple[Path, Path]
    depths: tuple[Path, Path]
    K: Tensor
    K_hw: SizeHW | None
    cam1_from_cam0: Tensor


def read_scannet_pairs(
    root: Path, pixels: PixelCenters = "corner"
) -> tuple[list[ScanNetPair], list[Path]]:
    """Read the pairs.

    Args:
        root: Folder of the scenes.
        pixels: Convention of K.

    Returns:
        The pairs in the order of the list, and the files that say them.

    Raises:
        EvalDataError: The folder does not hold them, or a file is damaged.
    """
    if (root / "test.npz").is_file():
        return _from_arrays(root, pixels)
    file = find_list(root)
    pairs = []
    for pair in read_pair_list(file, pixels):
        if any(pair.turns):
            raise EvalDataError(f"{file}: {pair.name} is turned, which depth images are not.")
        pairs.append(
            ScanNetPair(
                pair.name,
                pair.scene,
                (pair.image0, pair.image1),
                (depth_of(pair.image0), depth_of(pair.image1)),
                torch.stack([pair.K0, pair.K1]),
                None,
                pair.cam1_from_cam0,
            )
        )
    return pairs, [file]


def depth_of(image: Path) -> Path:
    """Return the depth image of a picture.

    Args:
        image: SCENE/color/N.jpg, or another picture.

    Returns:
        SCENE/depth/N.png, or NAME.depth.png beside the other picture.
    """
    if image.parent.name == "color":
        return image.parent.parent / "depth" / f"{image.stem}.png"
    return image.with_name(f"{image.stem}.depth.png")


def _from_arrays(root: Path, pixels: PixelCenters) -> tuple[list[ScanNetPair], list[Path]]:
    rows = _load(root / "test.npz").get("name")
    cameras = _load(root / "intrinsics.npz")
    files = [root / "test.npz", root / "intrinsics.npz"]
    if rows is None or rows.ndim != 2 or rows.shape[1] != 4 or rows.dtype.kind not in "iu":
        raise EvalDataError(
            f"{files[0]}: `name` must have rows of scene, sequence, frame 0, frame 1; get it anew."
        )
    pairs: list[ScanNetPair] = []
    poses: dict[Path, Tensor] = {}
    for room, sequence, *frames in rows.tolist():
        scene = f"scene{room:04d}_{sequence:02d}"
        if scene not in cameras or cameras[scene].shape != (3, 3):
            raise EvalDataError(f"{files[1]}: has no K of {scene}; get it anew.")
        K = read_K(str(files[1]), torch.from_numpy(cameras[scene].astype(np.float64)), pixels)
        for frame in frames:
            file = root / scene / "pose" / f"{frame}.txt"
            if file not in poses:
                poses[file] = _read_pose(file)
        pose0, pose1 = (poses[root / scene / "pose" / f"{frame}.txt"] for frame in frames)
        images = tuple(root / scene / "color" / f"{frame}.jpg" for frame in frames)
        pairs.append(
            ScanNetPair(
                f"{scene} {frames[0]}-{frames[1]}",
                scene,
                (images[0], images[1]),
                (depth_of(images[0]), depth_of(images[1])),
                torch.stack([K, K]),
                _ARRAYS_HW,
                invert(pose1) @ pose0,
            )
        )
    return pairs, [*files, *poses]


def _read_pose(file: Path) -> Tensor:
    words = read_text(file, MAX_ANNOTATION_BYTES).split()
    try:
        pose = torch.tensor([float(word) for word in words], dtype=torch.float64).reshape(4, 4)
    except (ValueError, RuntimeError) as error:
        raise EvalDataError(f"{file}: is no 4x4 matrix ({error}); unpack it again.") from error
    return rigid(str(file), pose)


def _load(file: Path) -> dict[str, Any]:
    """Read the arrays of a file, never objects."""
    try:
        with zipfile.ZipFile(file) as packed:
            size = sum(entry.file_size for entry in packed.infolist())
        if size > _MAX_NPZ_BYTES:
            raise EvalDataError(f"{file}: unpacks to {size} bytes, more than any such file.")
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise EvalDataError(f"{file}: cannot be read ({error}); get it anew.") from error
