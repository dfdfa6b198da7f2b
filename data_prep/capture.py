"""Open a user's own capture: pictures, depth, intrinsics and poses in any usual convention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.capture_conventions import Convention, PoseKind, unmirrored
from data_prep.capture_files import depth_size_hw, image_size_wh, read_depth, read_mask
from data_prep.capture_layouts import (
    Layout,
    Shot,
    find_kind,
    read_colmap_layout,
    read_nerf,
    read_plain,
)
from equifeat.data.object_views import ObjectViews
from equifeat.errors import ImageError, ViewsError
from equifeat.geometry.pixels import pixel_centers, resize
from equifeat.image_files import read_image

Array = NDArray[Any]
CaptureKind = Literal["auto", "views", "nerf", "colmap", "plain"]
_READERS = {"nerf": read_nerf, "colmap": read_colmap_layout, "plain": read_plain}
_UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}


@dataclass(frozen=True)
class CaptureOptions:
    """What the numbers of a capture mean; an empty value is what its format says.

    Args:
        kind: The layout, "auto" to look.
        axes: Camera axes of the poses.
        pose: Direction of the poses.
        columns: Whether matrices are stored column after column.
        left_handed: Whether the world is left-handed.
        depth_unit: m, cm, mm or units of the poses a step of the depth files; "auto" is mm for
            integers and 1 for floats where the format says nothing.
        depth: "z" or "ray".
        pixels: "corner" where K counts from the picture's corner, "center" where it counts from
            the first pixel's centre, as OpenCV does.
        k_size: WIDTHxHEIGHT of the pictures that K is for, the pictures' own when empty.
    """

    kind: CaptureKind = "auto"
    axes: str = ""
    pose: PoseKind | None = None
    columns: bool = False
    left_handed: bool = False
    depth_unit: str = "auto"
    depth: Literal["z", "ray"] = "z"
    pixels: Literal["corner", "center"] = "corner"
    k_size: str = ""

    def __post_init__(self) -> None:
        if self.axes:
            Convention(self.axes)
        self.unit(False)
        self.size_wh()

    def unit(self, integer: bool) -> float:
        """Return the units of the poses a step of the depth files.

        Args:
            integer: Whether the files hold integers.

        Raises:
            ViewsError: The option is no unit.
        """
        if self.depth_unit == "auto":
            return 0.001 if integer else 1.0
        try:
            unit = _UNITS.get(self.depth_unit) or float(self.depth_unit)
        except ValueError:
            unit = 0.0
        if not 0 < unit < 1e9:
            raise ViewsError(
                f"depth-unit {self.depth_unit!r} is no unit: give m, cm, mm or how many units of "
                "the poses one step of the depth is"
            )
        return unit

    def size_wh(self) -> tuple[float, float] | None:
        """Return the size that K is for, or None for the pictures' own.

        Raises:
            ViewsError: The option is no size.
        """
        if not self.k_size:
            return None
        try:
            w, h = (float(side) for side in self.k_size.lower().split("x"))
        except ValueError:
            w = h = 0.0
        if w <= 0 or h <= 0:
            raise ViewsError(f"k-size {self.k_size!r} is no size: give WIDTHxHEIGHT")
        return w, h


class CaptureViews(ObjectViews):
    """A capture as views: OpenCV axes, corner pixels, z-depth in the units of its poses.

    Where the depth is smaller than the pictures, its size is the views'.

    Args:
        name: Identity of the object.
        folder: The capture.
        layout: What its files say.
        options: What its numbers mean.
    """

    def __init__(self, name: str, folder: Path, layout: Layout, options: CaptureOptions) -> None:
        if not layout.shots:
            raise ViewsError(f"{folder}: holds no posed pictures")
        self.folder = Path(folder)
        self.shots = layout.shots
        self.options = options
        self.given = np.stack([shot.pose for shot in layout.shots])
        _check_matrices(self.given, options.columns, folder)
        pose = options.pose or layout.pose
        assert pose in ("cam_from_world", "world_from_cam")
        self.convention = Convention(
            options.axes or layout.axes,
            "cam_from_world" if pose == "cam_from_world" else "world_from_cam",
            options.columns,
            options.left_handed,
        )
        first = next((shot.depth for shot in layout.shots if shot.depth), None)
        if first is None:
            raise ViewsError(
                f"{folder}: has no depth, so nothing can be carried from view to view; put one "
                "file a picture into depth/ (16-bit PNG, npy, TIFF or EXR)"
            )
        integer = read_depth(first)[1]
        self.unit = options.unit(integer)
        if options.depth_unit == "auto" and layout.unit is not None:
            self.unit = layout.unit
        self.masked = all(shot.mask or image_size_wh(shot.image)[1] for shot in layout.shots)
        sizes = [_size_hw(shot) for shot in layout.shots]
        K = np.stack(
            [_scaled_K(s, hw, options, folder) for s, hw in zip(layout.shots, sizes, strict=True)]
        )
        poses = unmirrored(self.convention.cam_from_world(self.given))
        super().__init__(
            name,
            str(folder),
            torch.from_numpy(K).float(),
            torch.from_numpy(poses).float(),
            sizes,
            self.unit if integer else 0.0,
        )
        self.K_exact = K

    @property
    def names(self) -> list[str]:
        """Names of the pictures."""
        return [shot.image.name for shot in self.shots]

    def _pictures(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        shot, size_hw = self.shots[i], self.camera(i).size_hw
        image = resize(read_image(shot.image)[None], size_hw)[0].clamp(0, 1)
        depth = torch.zeros(size_hw)
        if shot.depth:
            depth = torch.from_numpy(read_depth(shot.depth)[0])
            if tuple(depth.shape) != tuple(size_hw):
                depth = resize(depth[None, None], size_hw, "nearest")[0, 0]
        depth = depth * self.unit
        if self.options.depth == "ray":
            across = (pixel_centers(size_hw) - self.K[i, :2, 2]) / self.K[i, [0, 1], [0, 1]]
            depth = depth / (across.square().sum(-1) + 1.0).sqrt()
        return image, depth, self._mask(shot, depth, size_hw)

    def _mask(self, shot: Shot, depth: Tensor, size_hw: tuple[int, int]) -> Tensor:
        file = shot.mask or (shot.image if image_size_wh(shot.image)[1] else None)
        if file is None:
            return depth > 0
        mask = torch.from_numpy(read_mask(file)).float()[None, None]
        return resize(mask, size_hw, "nearest")[0, 0] > 0.5


def open_captures(root: Path, options: CaptureOptions) -> list[CaptureViews]:
    """Open one capture, or every capture in a folder of them.

    Args:
        root: The folder.
        options: What its numbers mean.

    Returns:
        The captures, sorted by name; empty where there is none and the kind is "auto".

    Raises:
        ViewsError: A capture is incomplete or of another layout than the options say.
    """
    kind = None if options.kind == "auto" else options.kind
    folders = [root]
    if find_kind(root) is None:
        below = sorted(f for f in root.iterdir() if f.is_dir() and f.name[0] != ".")
        folders = [f for f in below if find_kind(f)] or ([root] if kind else [])
    out = []
    for folder in folders:
        reader = _READERS[kind or str(find_kind(folder))]
        out.append(CaptureViews(folder.resolve().name, folder, reader(folder), options))
    return out


def _check_matrices(given: Array, columns: bool, folder: Path) -> None:
    """Name what can be seen in the numbers alone."""
    matrices = given.transpose(0, 2, 1) if columns else given
    bottom = np.array([0.0, 0.0, 0.0, 1.0])
    if not np.isfinite(matrices).all():
        raise ViewsError(f"{folder}: a pose is not finite; leave that picture out")
    if np.abs(matrices[:, 3] - bottom).max() > 1e-6:
        if np.abs(matrices[:, :, 3] - bottom).max() < 1e-6:
            other = "leave out --columns" if columns else "give --columns"
            raise ViewsError(
                f"{folder}: rows and columns of the poses are swapped (the translation is in the "
                f"last row); {other}"
            )
        raise ViewsError(f"{folder}: the last row of a pose is not 0 0 0 1; write it again")
    R = matrices[:, :3, :3]
    error = np.abs(R @ R.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
    if error.max() > 1e-2:
        worst = int(error.argmax())
        length = float(np.linalg.norm(R[worst], axis=1).mean())
        raise ViewsError(
            f"{folder}: pose {worst} is not a rotation with a translation (its rows have length "
            f"{length:.3g}); remove scale and shear from the poses"
        )
    signs = np.sign(np.linalg.det(R))
    if len(set(signs.tolist())) > 1:
        raise ViewsError(
            f"{folder}: {int((signs < 0).sum())} of {len(signs)} poses are mirrored (determinant "
            "-1) and the others are not; write them all in one convention"
        )


def _size_hw(shot: Shot) -> tuple[int, int]:
    (w, h), _ = image_size_wh(shot.image)
    if shot.depth is None:
        return h, w
    depth_hw = depth_size_hw(shot.depth)
    if (h, w) == depth_hw:
        return h, w
    if abs(depth_hw[1] * h / (depth_hw[0] * w) - 1) > 0.02:
        raise ImageError(
            f"{shot.depth}: depth of {depth_hw[1]}x{depth_hw[0]} px and a picture of {w}x{h} px "
            "have different shapes; bring them to one camera first"
        )
    return depth_hw if depth_hw[0] < h else (h, w)


def _scaled_K(  # noqa: N802
    shot: Shot, size_hw: tuple[int, int], options: CaptureOptions, folder: Path
) -> Array:
    K = shot.K.copy()
    if abs(K[2, 2] - 1) > 1e-6 or np.abs(K[2, :2]).max() > 1e-6:
        if np.abs(K[:2, 2]).max() < 1e-6 and np.abs(K[2, :2]).max() > 1e-6:
            raise ViewsError(
                f"{folder}: rows and columns of K are swapped (cx and cy are in its last row); "
                "transpose K"
            )
        raise ViewsError(f"{folder}: the last row of a K is not 0 0 1; write it again")
    if abs(K[0, 1]) > 1e-3 * abs(K[0, 0]) or abs(K[1, 0]) > 1e-6:
        raise ViewsError(f"{folder}: K has skew ({K[0, 1]:.4g}); only pinhole cameras are read")
    if K[0, 0] <= 0 or K[1, 1] <= 0:
        raise ViewsError(
            f"{folder}: a focal length of K is {min(K[0, 0], K[1, 1]):.4g}, not above 0; give it "
            "positive and say by --axes which way the camera looks"
        )
    if options.k_size == "" and K[0, 0] < 10 and size_hw[1] > 30:
        raise ViewsError(
            f"{folder}: K is normalised (fx = {K[0, 0]:.4g}), not in pixels; give --k-size 1x1 "
            "when it is in parts of the width and height"
        )
    if options.pixels == "center":
        K[:2, 2] += 0.5
    w, h = options.size_wh() or shot.K_size_wh
    K[0] *= size_hw[1] / w
    K[1] *= size_hw[0] / h
    K[0, 1] = K[1, 0] = 0.0
    return K


def background_known(views: ObjectViews) -> bool:
    """Whether pixels outside the mask are known to be empty.

    Args:
        views: Any views; a capture without masks takes its depth for one, holes and all.

    Returns:
        False for such a capture.
    """
    return views.masked if isinstance(views, CaptureViews) else True


def names_of(views: ObjectViews) -> Sequence[str]:
    """Return what pictures are called in messages.

    Args:
        views: Any views.
    """
    if isinstance(views, CaptureViews):
        return views.names
    return [f"{i:06d}" for i in range(len(views))]
