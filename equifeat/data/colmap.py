"""Read a COLMAP sparse model: cameras, posed images and the points they see.

The binary files are read here, by their documented layout (colmap.github.io/format.html, little
endian), because pycolmap 4.2 believes their counters: a points3D.bin that claims 2**60 points keeps
it busy for ever, and it takes a cut cameras.bin without a word. The text form, which is bounded by
its own length, and the lens models are pycolmap's. rigs.* and frames.* of newer COLMAPs are not
needed: images.* still holds every image's own pose.

Convention:
    COLMAP's pixels are the project's: the top-left corner is (0, 0), the first pixel's centre is
    (0.5, 0.5). Poses are cam_from_world with OpenCV axes, quaternions are (w, x, y, z).
"""

from __future__ import annotations

import struct
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.data.colmap_camera import LENSES
from equifeat.data.colmap_camera import ColmapCamera as ColmapCamera
from equifeat.data.object_views import MAX_SIDE
from equifeat.errors import ViewsError, import_extra

_FILES = ("cameras", "images", "points3D")
_MAX_BYTES = 2**31  # of one file; a model of 1,000 images and a million points has a fifth of it
_NO_POINT = -1  # COLMAP's invalid id, 2**64 - 1, as int64


@dataclass(frozen=True)
class ColmapImage:
    """One posed image and what it sees.

    Args:
        name: Path of the picture in its folder of pictures, with "/" and without "..".
        camera_id: Its camera.
        cam_from_world: (4, 4) float64 pose.
        xy: (N, 2) float64 pixels of the picture as it is stored, still distorted.
        point_ids: (N,) int64 rows of the model's points3d; keypoints without a point are left out.
    """

    name: str
    camera_id: int
    cam_from_world: Float[Tensor, "4 4"]
    xy: Float[Tensor, "n 2"]
    point_ids: Tensor


@dataclass(frozen=True)
class ColmapModel:
    """A sparse model.

    Args:
        cameras: By COLMAP's id.
        images: Sorted by name.
        points3d: (P, 3) float64 points in the model's own, arbitrary scale.
        errors: (P,) float64 mean reprojection errors in pixels, negative where COLMAP had none.
    """

    cameras: dict[int, ColmapCamera]
    images: list[ColmapImage]
    points3d: Float[Tensor, "p 3"]
    errors: Float[Tensor, "p"]


def is_colmap(folder: Path) -> bool:
    """Whether a folder holds a sparse model, binary or text.

    Args:
        folder: Any folder.

    Returns:
        True where cameras, images and points3D are, all .bin or all .txt.
    """
    return any(_complete(folder, suffix) for suffix in (".bin", ".txt"))


def read_colmap(folder: Path) -> ColmapModel:
    """Read a sparse model; the binary form is taken where both are there.

    Args:
        folder: The folder with cameras, images and points3D as .bin or .txt.

    Returns:
        The model, with every lens undistortable.

    Raises:
        ViewsError: Files are missing or damaged, a name leaves its folder, or the lens is one that
            no pinhole picture can be made of.
        MissingExtraError: The model is text and pycolmap is not installed.
    """
    folder = Path(folder)
    if _complete(folder, ".bin"):
        return _read_binary(folder, folder)
    if not _complete(folder, ".txt"):
        raise ViewsError(
            f"{folder}: no COLMAP model (cameras, images and points3D, all .bin or all .txt); "
            "export it with `colmap model_converter`"
        )
    pycolmap = import_extra("pycolmap", "captures", "reading a COLMAP model in text form")
    for name in _FILES:
        _check_size(folder / f"{name}.txt")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            model = pycolmap.Reconstruction()
            model.read_text(str(folder))
            model.write_binary(temporary)
        except (ValueError, IndexError, KeyError, RuntimeError, MemoryError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ViewsError(
                f"{folder}: not a COLMAP text model ({reason}); export it again"
            ) from error
        return _read_binary(Path(temporary), folder)


def _complete(folder: Path, suffix: str) -> bool:
    return all((folder / f"{name}{suffix}").is_file() for name in _FILES)


def _check_size(file: Path) -> None:
    if (size := file.stat().st_size) > _MAX_BYTES:
        raise ViewsError(f"{file}: {size} bytes are more than {_MAX_BYTES}; split the model")


class _Cursor:
    """Reads a file from front to end and never past it."""

    def __init__(self, file: Path, name: str) -> None:
        _check_size(file)
        self.data = file.read_bytes()
        self.at = 0
        self.name = name

    def take(self, form: str) -> tuple[Any, ...]:
        start = self.skip(struct.calcsize("<" + form))
        return struct.unpack_from("<" + form, self.data, start)

    def array(self, dtype: Any, count: int) -> Any:
        start = self.skip(count * np.dtype(dtype).itemsize)
        return np.frombuffer(self.data, dtype, count, start)

    def text(self) -> str:
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise self.damaged("a name does not end")
        raw, self.at = self.data[self.at : end], end + 1
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"the name {raw[:60]!r} is not UTF-8") from error

    def skip(self, size: int) -> int:
        start = self.at
        if size > len(self.data) - start:
            raise self.damaged(f"it ends after {len(self.data)} bytes, within a record")
        self.at = start + size
        return start

    def end(self) -> None:
        if self.at != len(self.data):
            raise self.damaged(f"{len(self.data) - self.at} bytes follow its last record")

    def damaged(self, why: str) -> ViewsError:
        return ViewsError(f"{self.name}: not a COLMAP file ({why}); export the model again")


def _read_binary(folder: Path, shown: Path) -> ColmapModel:
    cameras, images, points = (_Cursor(folder / f"{n}.bin", str(shown / n)) for n in _FILES)
    by_id = _cameras(cameras)
    ids, points3d, errors = _points(points)
    found = sorted(_images(images, by_id, ids), key=lambda image: image.name)
    if not found:
        raise images.damaged("it holds no image")
    names = [image.name for image in found]
    twice = next((a for a, b in pairwise(names) if a == b), None)
    if twice:
        raise images.damaged(f"two images are named {twice!r}")
    return ColmapModel(by_id, found, torch.from_numpy(points3d), torch.from_numpy(errors))


def _cameras(file: _Cursor) -> dict[int, ColmapCamera]:
    out: dict[int, ColmapCamera] = {}
    for _ in range(file.take("Q")[0]):
        camera_id, model, w, h = file.take("IiQQ")
        lens = LENSES.get(model)
        if lens is None or lens.fx_fy_cx_cy is None:
            name = lens.name if lens else f"number {model}"
            raise ViewsError(
                f"{file.name}: camera {camera_id} has the lens model {name}, which this release "
                "cannot undistort (it knows SIMPLE_PINHOLE, PINHOLE, SIMPLE_RADIAL, RADIAL, OPENCV "
                "and FULL_OPENCV); run `colmap image_undistorter` and give its result"
            )
        params = file.take(f"{lens.params}d")
        fx, fy, cx, cy = (params[k] for k in lens.fx_fy_cx_cy)
        usable = bool(np.isfinite(params).all()) and min(fx, fy) > 0
        if not usable or not (0 < w <= MAX_SIDE and 0 < h <= MAX_SIDE):
            raise file.damaged(f"camera {camera_id} of {w}x{h} px has parameters {params}")
        K = torch.tensor([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]], dtype=torch.float64)
        distorted = any(params[max(lens.fx_fy_cx_cy) + 1 :])
        out[camera_id] = ColmapCamera(lens.name, K, (h, w), params, distorted)
    file.end()
    return out


def _points(file: _Cursor) -> tuple[Any, Any, Any]:
    """Ids in ascending order with their points and errors."""
    ids, xyz, errors = [], [], []
    for _ in range(file.take("Q")[0]):
        point_id, x, y, z, _r, _g, _b, error, length = file.take("Q3d3BdQ")
        file.skip(8 * length)  # the track: what images.bin says once more
        ids.append(point_id)
        xyz.append((x, y, z))
        errors.append(error)
    file.end()
    points3d = np.asarray(xyz, dtype=np.float64).reshape(-1, 3)
    if not np.isfinite(points3d).all():
        raise file.damaged("a point is not a number")
    known = np.asarray(ids, dtype=np.uint64).astype(np.int64)
    order = np.argsort(known, kind="stable")
    if len(np.unique(known)) != len(known):
        raise file.damaged("two points have one id")
    return known[order], points3d[order], np.asarray(errors, dtype=np.float64)[order]


def _images(file: _Cursor, cameras: dict[int, ColmapCamera], ids: Any) -> list[ColmapImage]:
    out = []
    seen = np.dtype([("xy", "<f8", 2), ("id", "<i8")])
    for _ in range(file.take("Q")[0]):
        image_id, *pose, camera_id = file.take("I7dI")
        name = _safe_name(file.text(), file)
        observed = file.array(seen, file.take("Q")[0])
        observed = observed[observed["id"] != _NO_POINT]
        if camera_id not in cameras:
            raise file.damaged(f"image {image_id} has camera {camera_id}, which is not there")
        rows = np.searchsorted(ids, observed["id"])
        if not np.isin(observed["id"], ids).all():
            raise file.damaged(f"{name} sees a point that points3D does not hold")
        xy = np.array(observed["xy"])
        if not np.isfinite(xy).all():
            raise file.damaged(f"a pixel of {name} is not a number")
        matrix = _pose(pose)
        if matrix is None:
            raise file.damaged(f"the pose of {name} is not a rotation with a translation")
        out.append(
            ColmapImage(name, camera_id, matrix, torch.from_numpy(xy), torch.from_numpy(rows))
        )
    file.end()
    return out


def _pose(values: list[float]) -> Tensor | None:
    """cam_from_world of a unit quaternion (w, x, y, z) and a translation."""
    pose = torch.tensor(values, dtype=torch.float64)
    norm = float(pose[:4].norm())
    if not bool(pose.isfinite().all()) or not abs(norm - 1.0) < 1e-3:
        return None
    w, x, y, z = (pose[:4] / norm).tolist()
    out = torch.eye(4, dtype=torch.float64)
    out[:3, :3] = torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )
    out[:3, 3] = pose[4:]
    return out


def _safe_name(name: str, file: _Cursor) -> str:
    """The name of a picture, which must stay in the folder of pictures."""
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
    if unsafe or not path.parts or len(name) > 1000:
        raise ViewsError(
            f"{file.name}: the image name {name[:80]!r} leaves the folder of pictures; rename the "
            "picture and export the model again"
        )
    return path.as_posix()
