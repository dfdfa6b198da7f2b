"""CO3D sequences as views with tracks: points of the cloud, seen where depth map and mask agree.

Fields are those of co3d/dataset/data_types.py; how they are meant is in PyTorch3D's
implicitron/dataset (frame_data.py, utils.py). Only ``frame_annotations.jgz`` is read; set lists and
``sequence_annotations.jgz`` are not.

CO3D's depth maps come from multi-view stereo: they have holes and noise far above the tolerance of
the dense test, which was made for rendered depth. The point cloud is fused from many of them, and
its points are the same for all frames, so it gives what tracks are; a single depth map only has to
say whether a point is hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from equifeat.data.object_views import CACHED_VIEWS, MAX_SIDE, check_poses
from equifeat.data.point_cloud import read_points
from equifeat.data.sparse_views import (
    CaptureOptions,
    Frame,
    SparseViews,
    at_pixels,
    box_of,
    read_mask,
)
from equifeat.data.tracks import Tracks
from equifeat.errors import ImageError, ViewsError
from equifeat.files import read_gzip
from equifeat.geometry.camera import Camera, transform
from equifeat.geometry.pixels import SizeHW, inside

ANNOTATIONS = "frame_annotations.jgz"
_MAX_JSON = 2**30  # bytes of the annotations of one category, unpacked


def is_co3d(folder: Path) -> bool:
    """Whether this is a category of CO3D, or one of its sequences.

    Args:
        folder: Any folder.

    Returns:
        True where the annotations are, or where they are one folder up and images/ is here.
    """
    return (folder / ANNOTATIONS).is_file() or _is_sequence(folder)


def _is_sequence(folder: Path) -> bool:
    return (folder.absolute().parent / ANNOTATIONS).is_file() and (folder / "images").is_dir()


def open_co3d(
    folder: Path, options: CaptureOptions, leave_out: Callable[[ViewsError], None]
) -> list[SparseViews]:
    """Open a category, or one sequence of it.

    Args:
        folder: The folder with frame_annotations.jgz, or a folder of a sequence in it.
        options: How captures are read.
        leave_out: Told why a sequence of a category cannot be used.

    Returns:
        The sequences that are on disk, sorted by name. Frames whose picture, mask or depth map is
        missing are left out.

    Raises:
        ViewsError: The annotations are damaged, or the one sequence cannot be used.
    """
    one = None if (folder / ANNOTATIONS).is_file() else folder.absolute().name
    category = folder if one is None else folder.absolute().parent
    sequences: dict[str, list[dict[str, Any]]] = {}
    for entry in _annotations(category / ANNOTATIONS):
        sequences.setdefault(str(entry.get("sequence_name")), []).append(entry)
    out = []
    for name in sorted(sequences):
        safe = PurePosixPath(name).parts == (name,) and name not in ("..", ".")
        if not safe or not (category / name).is_dir() or one not in (None, name):
            continue
        try:
            out.append(_open_sequence(category, name, sequences[name], options))
        except ViewsError as error:
            if one is not None:
                raise
            leave_out(error)
    if one is not None and not out:
        raise ViewsError(f"{folder}: {category / ANNOTATIONS} has no sequence {one!r}")
    return out


def _annotations(file: Path) -> list[dict[str, Any]]:
    try:
        text = read_gzip(file, _MAX_JSON)
        if text is None:
            raise ViewsError(f"{file}: unpacks to more than {_MAX_JSON} bytes; split the category")
        entries = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ViewsError(f"{file}: not gzipped JSON ({error}); get the category again") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ViewsError(f"{file}: not a list of frames; get the category again")
    return entries


@dataclass(frozen=True, eq=False)
class _Depth:
    """A depth map of CO3D: float16 bits in a 16-bit PNG, times scale, is z-depth of the capture."""

    file: Path
    scale: float
    mask: Path | None


def _open_sequence(
    category: Path, name: str, entries: list[dict[str, Any]], options: CaptureOptions
) -> SparseViews:
    where = category / name
    frames: list[Frame] = []
    depths: list[_Depth] = []
    poses: list[Tensor] = []
    for entry in entries:
        try:
            frame, depth, pose = _frame(entry, category.absolute().parent)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            number = entry.get("frame_number")
            raise ViewsError(
                f"{category / ANNOTATIONS}: frame {number!r} of {name} lacks a field or has a "
                f"wrong one ({error!r}); get the category again"
            ) from error
        needed = (frame.image, frame.mask, depth.file, depth.mask)
        if all(file is None or file.is_file() for file in needed):
            frames.append(frame)
            depths.append(depth)
            poses.append(pose)
    if len(frames) < 2:
        raise ViewsError(
            f"{where}: {len(frames)} of its {len(entries)} frames have picture, mask and depth map "
            "on disk, at least 2 are needed; get the sequence again"
        )
    # Some point_cloud.path of CO3Dv2 are absolute paths of another machine; the place is fixed.
    points = read_points(where / "pointcloud.ply")
    thin = np.linspace(0, len(points) - 1, min(len(points), options.max_points)).round()
    box = box_of(points, str(where))
    placed = box.poses(torch.stack(poses))
    check_poses(placed, where)
    cloud = _Cloud(box.points(points)[torch.from_numpy(thin).long()], box.side, options)
    views = [
        _Seen(cloud, *each) for each in zip(frames, depths, placed.double().unbind(), strict=True)
    ]
    tracks = Tracks(_Lazy(views, 0), _Lazy(views, 1), cloud.points.float())
    identity = f"{category.absolute().name}/{name}"
    return SparseViews(identity, str(where), frames, placed, tracks, options)


def _frame(entry: dict[str, Any], root: Path) -> tuple[Frame, _Depth, Tensor]:
    image, depth, viewpoint = entry["image"], entry["depth"], entry["viewpoint"]
    mask = entry.get("mask")
    h, w = (int(side) for side in image["size"])
    if not (0 < h <= MAX_SIDE and 0 < w <= MAX_SIDE):
        raise ValueError(f"image.size {image['size']}")
    silhouette = _inside(root, mask["path"]) if mask else None
    hidden = depth.get("mask_path")
    frame = Frame(_inside(root, image["path"]), (h, w), _intrinsics(viewpoint, (h, w)), silhouette)
    scale = float(depth["scale_adjustment"])
    if not 0 < scale < float("inf"):
        raise ValueError(f"depth.scale_adjustment {scale}")
    stereo = _Depth(_inside(root, depth["path"]), scale, _inside(root, hidden) if hidden else None)
    return frame, stereo, _pose(viewpoint)


def _intrinsics(viewpoint: dict[str, Any], size_hw: SizeHW) -> Float[Tensor, "3 3"]:
    """K in pixels; PyTorch3D's NDC has +x left and +y up, and ±1 at the borders of the image.

    "ndc_isotropic" counts both axes in halves of the shorter side, "ndc_norm_image_bounds" every
    axis in halves of its own side.
    """
    h, w = size_hw
    kind = viewpoint.get("intrinsics_format", "ndc_norm_image_bounds")
    half = {
        "ndc_isotropic": (min(h, w) / 2, min(h, w) / 2),
        "ndc_norm_image_bounds": (w / 2, h / 2),
    }.get(kind)
    if half is None:
        raise ValueError(f"viewpoint.intrinsics_format {kind!r}")
    (fx, fy), (px, py) = viewpoint["focal_length"], viewpoint["principal_point"]
    K = torch.tensor(
        [
            [fx * half[0], 0.0, w / 2 - px * half[0]],
            [0.0, fy * half[1], h / 2 - py * half[1]],
            [0.0, 0.0, 1.0],
        ],
        dtype=torch.float64,
    )
    if not bool(K.isfinite().all()) or not (K[0, 0] > 0 and K[1, 1] > 0):
        raise ValueError(f"viewpoint.focal_length {viewpoint['focal_length']}")
    return K


def _pose(viewpoint: dict[str, Any]) -> Float[Tensor, "4 4"]:
    """cam_from_world with OpenCV axes of x_cam = x_world R + T with x left and y up."""
    R = torch.tensor(viewpoint["R"], dtype=torch.float64)
    T = torch.tensor(viewpoint["T"], dtype=torch.float64)
    if R.shape != (3, 3) or T.shape != (3,):
        raise ValueError(f"viewpoint.R {tuple(R.shape)} and T {tuple(T.shape)}")
    turn = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)
    out = torch.eye(4, dtype=torch.float64)
    out[:3, :3] = turn[:, None] * R.mT
    out[:3, 3] = turn * T
    return out


def _inside(root: Path, path: str) -> Path:
    """A path of the annotations, which must stay in the data set's folder."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\\" in path:
        raise ValueError(f"path {path!r} leaves the data set")
    return root / parts


@dataclass(frozen=True, eq=False)
class _Cloud:
    points: Tensor  # (P, 3) float64 object coordinates
    side: float  # units of the capture in one object unit
    options: CaptureOptions


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one frame sees of a cloud; looked up when asked for, as it needs two pictures."""

    cloud: _Cloud
    frame: Frame
    depth: _Depth
    cam_from_world: Tensor


class _Lazy(Sequence[Tensor]):
    """One half of what every frame sees."""

    def __init__(self, views: list[_Seen], part: int) -> None:
        self.views = views
        self.part = part

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, i: int) -> Tensor:  # type: ignore[override]
        return _visible(self.views[i])[self.part]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


@lru_cache(maxsize=CACHED_VIEWS)
def _visible(seen: _Seen) -> tuple[Tensor, Tensor]:
    frame, options = seen.frame, seen.cloud.options
    in_camera = transform(seen.cam_from_world, seen.cloud.points)
    xy = Camera(frame.K, frame.size_hw).project(in_camera)
    ids = inside(xy, frame.size_hw).nonzero()[:, 0]  # NaN, behind the camera, is not inside
    xy, z = xy[ids], in_camera[ids, 2]
    there = at_pixels(_read_depth(seen.depth), xy.float(), frame.size_hw) / seen.cloud.side
    keep = (there > 0) & ((there - z).abs() <= options.depth_tolerance)
    if frame.mask:
        keep &= at_pixels(read_mask(frame.mask), xy.float(), frame.size_hw) > 0.5
    return frame.to_view(xy[keep], options).float(), ids[keep]


def _read_depth(depth: _Depth) -> Float[Tensor, "h w"]:
    """z-depth in units of the capture, 0 where there is none."""
    try:
        with Image.open(depth.file) as image:
            if image.mode not in ("I;16", "I;16B", "I") or max(image.size) > MAX_SIDE:
                raise ImageError(f"{depth.file}: not a depth map of CO3D (16-bit PNG)")
            bits = np.asarray(image).astype(np.uint16)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{depth.file}: damaged depth map ({error}); get it again") from error
    z = torch.from_numpy(bits.view(np.float16).astype(np.float32)) * depth.scale
    z[~z.isfinite()] = 0.0
    if depth.mask:
        valid = read_mask(depth.mask)
        if valid.shape != z.shape:
            raise ImageError(f"{depth.mask}: its size differs from {depth.file}; get both again")
        z = z * (valid > 0)
    return z
