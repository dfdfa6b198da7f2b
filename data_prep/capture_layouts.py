"""Find the pictures, depth, intrinsics and poses of the usual capture layouts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.capture_files import (
    DEPTH_SUFFIXES,
    IMAGE_SUFFIXES,
    MATRIX_SUFFIXES,
    image_size_wh,
    inside_folder,
    key_of,
    read_json,
)
from data_prep.capture_matrices import matrix44, per_view
from equifeat.data.colmap import is_colmap, read_colmap
from equifeat.errors import ViewsError

Array = NDArray[Any]
IMAGES = ("images", "image", "rgb", "color", "colour")
DEPTHS = ("depth", "depths", "depth_maps", "stereo/depth_maps")
MASKS = ("mask", "masks", "matte")
POSES = ("pose", "poses", "cam_from_world", "cam2world", "extrinsics")
INTRINSICS = (
    "intrinsics",
    "intrinsic",
    "K",
    "camera-intrinsics",
    "intrinsic/intrinsic_depth",
    "intrinsic/intrinsic_color",
)
_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")


class Shot(NamedTuple):
    """One posed picture, as the capture's files say.

    Attributes:
        image: The picture.
        depth: Its depth, or None.
        mask: Its mask, or None.
        K: (3, 3) intrinsics as written.
        K_size_wh: Size of the picture that K is for.
        pose: (4, 4) as written.
    """

    image: Path
    depth: Path | None
    mask: Path | None
    K: Array
    K_size_wh: tuple[float, float]
    pose: Array


class Layout(NamedTuple):
    """A capture's shots and what its format says of them.

    Attributes:
        shots: The views.
        axes: The format's axes.
        pose: The direction of its poses.
        unit: Units of the poses a step of the depth, None where the format does not say.
    """

    shots: list[Shot]
    axes: str
    pose: str
    unit: float | None


def find_kind(folder: Path) -> str | None:
    """Tell which layout a folder has.

    Args:
        folder: Any folder.

    Returns:
        "nerf", "colmap", "plain" or None.
    """
    if nerf_file(folder):
        return "nerf"
    if colmap_model(folder):
        return "colmap"
    return "plain" if _files(folder, IMAGES, IMAGE_SUFFIXES) and _pose_source(folder) else None


def nerf_file(folder: Path) -> Path | None:
    """Return transforms.json, or the training split of Blender's synthetic sets.

    Args:
        folder: Any folder.
    """
    names = ("transforms.json", "transforms_train.json")
    return next((folder / n for n in names if (folder / n).is_file()), None)


def colmap_model(folder: Path) -> Path | None:
    """Return the folder of a sparse COLMAP model.

    Args:
        folder: Any folder.
    """
    places = ("sparse/0", "sparse", "colmap/sparse/0", ".")
    return next((folder / p for p in places if is_colmap(folder / p)), None)


def read_nerf(folder: Path) -> Layout:
    """Read transforms.json of Instant-NGP, nerfstudio or Blender's synthetic sets.

    Args:
        folder: The capture.

    Returns:
        Its shots; OpenGL axes, world_from_cam.

    Raises:
        ViewsError: A field is missing, the lens is distorted, or a file is not there.
    """
    file = nerf_file(folder)
    if file is None:
        raise ViewsError(f"{folder}: holds no transforms.json")
    data = read_json(file)
    frames = data.get("frames")
    if not isinstance(frames, list) or not frames:
        raise ViewsError(f"{file}: has no frames; export it again")
    depths, masks = _files(folder, DEPTHS, DEPTH_SUFFIXES), _files(folder, MASKS, IMAGE_SUFFIXES)
    shots = []
    for number, frame in enumerate(frames):
        try:
            image = _with_suffix(inside_folder(folder, str(frame["file_path"])))
            pose = np.asarray(frame["transform_matrix"], dtype=np.float64)
            K, size = _nerf_K({**data, **frame}, image, file)
        except (KeyError, TypeError, ValueError) as error:
            raise ViewsError(f"{file}: frame {number} lacks a field ({error!r})") from error
        depth = frame.get("depth_file_path") or frame.get("depth_path")
        mask = frame.get("mask_path")
        shots.append(
            Shot(
                image,
                _present(folder, depth, file) if depth else depths.get(key_of(image)),
                _present(folder, mask, file) if mask else masks.get(key_of(image)),
                K,
                size,
                matrix44(pose, f"{file}: frame {number}"),
            )
        )
    unit = data.get("integer_depth_scale") or data.get("depth_unit_scale_factor")
    return Layout(shots, "opengl", "world_from_cam", float(unit) if unit else None)


def read_colmap_layout(folder: Path) -> Layout:
    """Read a COLMAP model with depth beside its pictures.

    Args:
        folder: The capture.

    Returns:
        Its shots; OpenCV axes, cam_from_world.

    Raises:
        ViewsError: There is no model, a lens is distorted or a picture is missing.
    """
    place = colmap_model(folder)
    if place is None:
        raise ViewsError(f"{folder}: holds no COLMAP model (sparse/0)")
    model = read_colmap(place)
    depths, masks = _files(folder, DEPTHS, DEPTH_SUFFIXES), _files(folder, MASKS, IMAGE_SUFFIXES)
    images = next((folder / n for n in IMAGES if (folder / n).is_dir()), folder)
    shots = []
    for image in model.images:
        camera = model.cameras[image.camera_id]
        if camera.distorted:
            raise ViewsError(
                f"{place}: camera {image.camera_id} has lens distortion ({camera.model}); run "
                "`colmap image_undistorter` and give its result"
            )
        picture = inside_folder(images, image.name)
        _need(picture)
        h, w = camera.size_hw
        shots.append(
            Shot(
                picture,
                depths.get(key_of(picture)),
                masks.get(key_of(picture)),
                camera.K.numpy().astype(np.float64),
                (float(w), float(h)),
                image.cam_from_world.numpy().astype(np.float64),
            )
        )
    return Layout(shots, "opencv", "cam_from_world", None)


def read_plain(folder: Path) -> Layout:
    """Read pictures, depth, poses and intrinsics that lie side by side.

    Args:
        folder: The capture.

    Returns:
        Its shots, by the numbers in the pictures' names.

    Raises:
        ViewsError: Poses or intrinsics are missing or of another number than the pictures.
    """
    images = _files(folder, IMAGES, IMAGE_SUFFIXES)
    if not images:
        raise ViewsError(f"{folder}: no pictures in {', '.join(IMAGES)} or beside each other")
    depths, masks = _files(folder, DEPTHS, DEPTH_SUFFIXES), _files(folder, MASKS, IMAGE_SUFFIXES)
    poses = per_view(_pose_source(folder), images, (4, 4), f"{folder}: poses")
    source = _source(folder, INTRINSICS)
    if source is None:
        raise ViewsError(f"{folder}: no intrinsics; write K (3x3) or fx fy cx cy to intrinsics.txt")
    Ks = per_view(source, images, (3, 3), f"{folder}: intrinsics")
    shots = []
    for i, (key, image) in enumerate(images.items()):
        w, h = image_size_wh(image)[0]
        shots.append(Shot(image, depths.get(key), masks.get(key), Ks[i], (w, h), poses[i]))
    return Layout(shots, "opencv", "cam_from_world", None)


def _files(folder: Path, names: tuple[str, ...], suffixes: tuple[str, ...]) -> dict[Any, Path]:
    """Files of one kind by key: in a folder of that name, or with the word in their own names."""
    place = next((folder / n for n in names if (folder / n).is_dir()), None)
    if place:
        found = [f for f in place.rglob("*") if f.suffix.lower() in suffixes]
    else:
        words = (*names, "frame") if names is IMAGES and not _marked(folder) else names
        found = [
            f
            for f in folder.glob("*")
            if f.suffix.lower() in suffixes and any(w in f.name.lower() for w in words)
        ]
    return {key_of(f): f for f in sorted(found, key=key_of) if f.name[0] != "."}


def _marked(folder: Path) -> bool:
    return any(word in f.name.lower() for f in folder.glob("*.*") for word in ("color", "rgb"))


def _source(folder: Path, names: tuple[str, ...]) -> Path | None:
    for name in names:
        for suffix in MATRIX_SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
        if (folder / name).is_dir() and name not in ("intrinsic",):
            return folder / name
    return None


def _pose_source(folder: Path) -> Path | dict[Any, Path] | None:
    return _source(folder, POSES) or _files(folder, POSES, MATRIX_SUFFIXES) or None


def _nerf_K(data: dict[str, Any], image: Path, file: Path) -> tuple[Array, tuple[float, float]]:  # noqa: N802
    bent = [name for name in _DISTORTION if abs(float(data.get(name) or 0)) > 1e-6]
    if bent:
        raise ViewsError(
            f"{file}: the lens is distorted ({bent[0]} = {data[bent[0]]}) and there is no lens "
            "model here; undistort the pictures first (`colmap image_undistorter`)"
        )
    w, h = float(data.get("w") or 0), float(data.get("h") or 0)
    if not (w and h):
        (w, h), _ = image_size_wh(image)
    if data.get("fl_x"):
        fx = float(data["fl_x"])
        fy = float(data.get("fl_y") or fx)
    else:
        fx = fy = 0.5 * w / math.tan(0.5 * float(data["camera_angle_x"]))
        if data.get("camera_angle_y"):
            fy = 0.5 * h / math.tan(0.5 * float(data["camera_angle_y"]))
    cx, cy = float(data.get("cx", w / 2)), float(data.get("cy", h / 2))
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]]), (w, h)


def _with_suffix(path: Path) -> Path:
    tries = [path, *(path.with_name(path.name + s) for s in IMAGE_SUFFIXES)]
    found = next((p for p in tries if p.is_file()), None)
    if found is None:
        raise ViewsError(f"{path}: the picture is missing; copy it there")
    return found


def _present(folder: Path, name: str, file: Path) -> Path:
    path = inside_folder(folder, name)
    return _need(path)


def _need(path: Path) -> Path:
    if not path.is_file():
        raise ViewsError(f"{path}: the file is missing; copy it there")
    return path
