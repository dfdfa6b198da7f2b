"""Lists of image pairs with intrinsics and relative pose, as SuperGlue's evaluation reads them.

A line has 38 columns: image 0, image 1, quarter turns of both, K0 and K1 (9 numbers each, row by
row), T_0to1 (16 numbers); see github.com/magicleap/SuperGluePretrainedNetwork, match_pairs.py. K is
in pixels of the picture file before it is turned. That code uses K as it is with keypoints whose
first pixel centre is (0, 0), so the lists are in that convention; ``pixels`` says otherwise.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.data.text_files import MAX_LIST_BYTES, read_text
from equifeat.errors import EvalDataError, ImageError
from equifeat.geometry.pixels import SizeHW, from_integer_centers
from equifeat.image_files import read_image

PixelCenters = Literal["integer", "corner"]
_COLUMNS = 38
_SCANNET = re.compile(r"(scene\d{4}_\d{2})_frame-(\d{6})\.jpg")
# Entries of the lists have 4 to 5 digits.
_NOT_A_ROTATION = 1e-2


class ImagePair(NamedTuple):
    """Two views of a rigid scene.

    Attributes:
        name: Unique in its list.
        scene: What both show, as far as the names tell.
        image0: Picture.
        image1: Picture.
        turns: Quarter turns counter-clockwise that make the pictures upright.
        K0: (3, 3) float64 intrinsics of picture 0 before it is turned, corner convention.
        K1: (3, 3) of picture 1.
        cam1_from_cam0: (4, 4) float64, of the cameras before they are turned.
    """

    name: str
    scene: str
    image0: Path
    image1: Path
    turns: tuple[int, int]
    K0: Tensor
    K1: Tensor
    cam1_from_cam0: Tensor


def find_list(root: Path, name: str = "") -> Path:
    """Return the list of pairs in a folder.

    Args:
        root: Folder of the data.
        name: File name of the list; the only *pairs*.txt there is when empty.

    Returns:
        The file.

    Raises:
        EvalDataError: There is none, or several.
    """
    if name:
        if name != Path(name).name or not (root / name).is_file():
            raise EvalDataError(f"{root}: has no list {name!r}.")
        return root / name
    found = sorted(root.glob("*pairs*.txt")) if root.is_dir() else []
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise EvalDataError(f"{root}: needs one list *pairs*.txt, found {names}.")
    return found[0]


def read_pair_list(file: Path, pixels: PixelCenters = "integer") -> list[ImagePair]:
    """Read a list of pairs.

    Args:
        file: The list; pictures are named relative to its folder. Where a picture such as
            scene0707_00_frame-000015.jpg is not there, scene0707_00/color/15.jpg is taken, as in
            the archive that LoFTR offers.
        pixels: Convention of K.

    Returns:
        The pairs, in the order of the list.

    Raises:
        EvalDataError: The list is not in the format.
    """
    pairs: list[ImagePair] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(read_text(file, MAX_LIST_BYTES).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        where = f"{file}: line {number}"
        if len(words) != _COLUMNS:
            raise EvalDataError(
                f"{where} has {len(words)} columns instead of {_COLUMNS}: image 0, image 1, "
                "rotation 0, rotation 1, K0 (9), K1 (9), T_0to1 (16)."
            )
        try:
            turns = (int(words[2]) % 4, int(words[3]) % 4)
            numbers = torch.tensor([float(word) for word in words[4:]], dtype=torch.float64)
        except ValueError as error:
            raise EvalDataError(f"{where}: {error}; get the list anew.") from error
        K0, K1, T = numbers[:9], numbers[9:18], numbers[18:].reshape(4, 4)
        pose = rigid(where, T)
        name = f"{Path(words[0]).stem} {Path(words[1]).stem}"
        seen[name] = seen.get(name, 0) + 1
        pairs.append(
            ImagePair(
                name if seen[name] == 1 else f"{name} ({seen[name]})",
                _scene_of(words[0], name),
                find_picture(file.parent, words[0], where),
                find_picture(file.parent, words[1], where),
                turns,
                read_K(where, K0.reshape(3, 3), pixels),
                read_K(where, K1.reshape(3, 3), pixels),
                pose,
            )
        )
    if not pairs:
        raise EvalDataError(f"{file}: has no pairs; get the list anew.")
    return pairs


def find_picture(root: Path, name: str, where: str) -> Path:
    """Return the picture of a name in a list.

    Args:
        root: Folder of the data.
        name: Relative path, as the list has it.
        where: For messages: file and line.

    Returns:
        The file, which need not exist.

    Raises:
        EvalDataError: The name leaves the folder.
    """
    path = root / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(root.resolve()):
        raise EvalDataError(f"{where}: {name!r} lies outside {root}.")
    found = _SCANNET.fullmatch(Path(name).name)
    if found and not path.is_file():
        other = root / found[1] / "color" / f"{int(found[2])}.jpg"
        return other if other.is_file() else path
    return path


def read_K(  # noqa: N802
    where: str, K: Float[Tensor, "3 3"], pixels: PixelCenters
) -> Float[Tensor, "3 3"]:
    """Check intrinsics and return them in the corner convention.

    Args:
        where: For messages: file and line.
        K: (3, 3) as in the file.
        pixels: Their convention.

    Returns:
        (3, 3) float64.

    Raises:
        EvalDataError: They are no intrinsics.
    """
    out = K.double().clone()
    bottom = torch.equal(out[2], out.new_tensor([0.0, 0.0, 1.0]))
    if not (
        bool(out.isfinite().all()) and bottom and float(out[0, 0]) > 0 and float(out[1, 1]) > 0
    ):
        raise EvalDataError(f"{where}: K = {K.tolist()} is no matrix of intrinsics.")
    if pixels == "integer":
        out[:2, 2] = from_integer_centers(out[:2, 2])
    return out


def rigid(where: str, pose: Float[Tensor, "4 4"]) -> Float[Tensor, "4 4"]:
    """Check a rigid transform, whose rotation may be rounded to a few digits.

    Args:
        where: For messages: file and line.
        pose: (4, 4).

    Returns:
        (4, 4) float64 with the nearest true rotation.

    Raises:
        EvalDataError: It is no rigid transform.
    """
    out = pose.double().clone()
    good = bool(out.isfinite().all())
    if good:
        U, _, Vt = torch.linalg.svd(out[:3, :3])
        R = U @ Vt
        good = float((R - out[:3, :3]).abs().max()) < _NOT_A_ROTATION and float(R.det()) > 0
    if not good or not torch.equal(out[3], out.new_tensor([0.0, 0.0, 0.0, 1.0])):
        raise EvalDataError(f"{where}: {pose.tolist()} is no rigid transform.")
    out[:3, :3] = R
    return out


def read_picture(path: Path, turns: int = 0) -> Float[Tensor, "3 h w"]:
    """Read a picture of an evaluation data set.

    Args:
        path: The file.
        turns: Quarter turns counter-clockwise.

    Returns:
        (3, H, W) RGB in [0, 1].

    Raises:
        EvalDataError: It cannot be read.
    """
    try:
        return torch.rot90(read_image(path), turns, dims=(1, 2)).contiguous()
    except ImageError as error:
        raise EvalDataError(f"{str(error).rstrip('.')}; get the data set anew.") from error


def turned_K(  # noqa: N802
    K: Float[Tensor, "3 3"], size_hw: SizeHW, turns: int
) -> Float[Tensor, "3 3"]:
    """Return the intrinsics of a picture turned counter-clockwise by quarters.

    Args:
        K: (3, 3), corner convention.
        size_hw: Height and width before.
        turns: Quarter turns.

    Returns:
        (3, 3); one quarter carries (x, y) to (y, W - x).
    """
    h, w = size_hw
    for _ in range(turns % 4):
        fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
        K = torch.zeros_like(K)
        K[0, 0], K[1, 1], K[0, 2], K[1, 2], K[2, 2] = fy, fx, cy, w - cx, 1.0
        h, w = w, h
    return K


def turned_camera(turns: int) -> Float[Tensor, "4 4"]:
    """Return what carries a camera's coordinates to those of the turned camera.

    Args:
        turns: Quarter turns counter-clockwise of its picture.

    Returns:
        (4, 4) float64; one quarter carries (x, y, z) to (y, -x, z).
    """
    quarter = torch.eye(4, dtype=torch.float64)
    quarter[:2, :2] = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    out: Tensor = torch.linalg.matrix_power(quarter, turns % 4)
    return out


def _scene_of(name: str, pair: str) -> str:
    found = re.match(r"scene\d{4}_\d{2}", Path(name).name)
    if found:
        return found[0]
    parts = Path(name).parts
    return parts[0] if len(parts) > 1 else pair
