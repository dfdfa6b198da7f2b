"""Data sets in the format of BOP: scenes of RGB-D images with object models and their 6D poses.

Written from docs/bop_datasets_format.md of https://github.com/thodan/bop_toolkit (the scene-wise
format). Lengths are millimetres. A K is returned as the file has it: which pixel convention it
follows depends on who made the images (docs/bop.md), so callers convert it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from equifeat.errors import EvalDataError

_MAX_JSON = 2**29
_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif")


class BopObject(NamedTuple):
    """What models_info.json says of an object.

    Attributes:
        diameter: Largest distance of two vertices, mm.
        discrete: (D, 4, 4) float64 rigid transforms of the model that leave it as it is.
        continuous: Axes and points on them, about which any rotation leaves it as it is.
    """

    diameter: float
    discrete: Tensor
    continuous: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]

    @property
    def symmetric(self) -> bool:
        """Whether there is any symmetry."""
        return len(self.discrete) > 0 or len(self.continuous) > 0


class BopAnnotation(NamedTuple):
    """One object instance in an image.

    Attributes:
        obj_id: Which object.
        rotation: 9 numbers row by row, camera from object.
        translation: 3 numbers, mm.
        visib_fract: Visible part of its silhouette; 1 without scene_gt_info.json.
        bbox_visib: First column, first row, last minus first column, last minus first row of its
            visible pixels, as the toolkit's calc_2d_bbox; None where unknown.
    """

    obj_id: int
    rotation: tuple[float, ...]
    translation: tuple[float, ...]
    visib_fract: float
    bbox_visib: tuple[float, ...] | None

    @property
    def cam_from_object(self) -> Tensor:
        """(4, 4) float64 pose, mm."""
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3] = torch.tensor(self.rotation, dtype=torch.float64).reshape(3, 3)
        pose[:3, 3] = torch.tensor(self.translation, dtype=torch.float64)
        return pose


class BopImage(NamedTuple):
    """One image of a scene.

    Attributes:
        folder: Folder of the scene.
        im_id: Its number.
        K: (3, 3) float64 intrinsics as in the file.
        depth_scale: What stored depth is multiplied with to get mm.
        objects: Its annotated instances, in the file's order.
    """

    folder: Path
    im_id: int
    K: Tensor
    depth_scale: float
    objects: tuple[BopAnnotation, ...]

    @property
    def scene_id(self) -> str:
        """Name of the scene's folder."""
        return self.folder.name

    def picture(self) -> Path:
        """Return the file of the colour image, or of the gray one where there is no colour."""
        found = self._file("rgb") or self._file("gray")
        if found is None:
            raise EvalDataError(
                f"{self.folder}: has no rgb/{self.im_id:06d}.png (or .jpg, or gray/): unpack the "
                "images of this split too."
            )
        return found

    def depth(self) -> Path | None:
        """Return the file of the depth image, if there is one."""
        return self._file("depth")

    def mask_visib(self, index: int) -> Path | None:
        """Return the file of the mask of an instance's visible pixels, if there is one."""
        path = self.folder / "mask_visib" / f"{self.im_id:06d}_{index:06d}.png"
        return path if path.is_file() else None

    def _file(self, kind: str) -> Path | None:
        for suffix in _SUFFIXES:
            path = self.folder / kind / f"{self.im_id:06d}{suffix}"
            if path.is_file():
                return path
        return None


class BopTarget(NamedTuple):
    """What is to be localised in an image: so many instances of an object."""

    scene_id: int
    im_id: int
    obj_id: int
    inst_count: int


def scene_folders(split: Path) -> list[Path]:
    """Return the folders of a split that hold annotated images, sorted by name.

    Args:
        split: Such as `root/test`.

    Returns:
        Folders with scene_gt.json.
    """
    if not split.is_dir():
        return []
    return sorted(p for p in split.iterdir() if (p / "scene_gt.json").is_file())


def read_scene(folder: Path) -> Iterator[BopImage]:
    """Read the annotations of a scene.

    Args:
        folder: Its folder, with scene_camera.json, scene_gt.json and perhaps scene_gt_info.json.

    Yields:
        Its annotated images by ascending number.

    Raises:
        EvalDataError: A file is missing, damaged, or not in the format.
    """
    cameras = _table(folder / "scene_camera.json")
    truths = _table(folder / "scene_gt.json")
    info_file = folder / "scene_gt_info.json"
    infos = _table(info_file) if info_file.is_file() else {}
    for im_id in sorted(truths):
        where = f"{folder / 'scene_gt.json'}: image {im_id}"
        camera = cameras.get(im_id)
        if not isinstance(camera, dict):
            _refuse(f"{folder / 'scene_camera.json'}: image {im_id}", "is missing")
        K = torch.tensor(_numbers(camera.get("cam_K"), 9, f"{where}: cam_K")).double()
        if not (K[0] > 0 and K[4] > 0):
            _refuse(f"{where}: cam_K", "has no focal length")
        scale = _number(camera.get("depth_scale", 1.0), f"{where}: depth_scale")
        rows, info = truths[im_id], infos.get(im_id)
        if not isinstance(rows, list):
            _refuse(where, "is not a list of instances")
        if info is not None and (not isinstance(info, list) or len(info) != len(rows)):
            _refuse(f"{info_file}: image {im_id}", f"has not the {len(rows)} rows of scene_gt.json")
        objects = tuple(
            _annotation(row, info[i] if info is not None else {}, f"{where}, instance {i}")
            for i, row in enumerate(rows)
        )
        yield BopImage(folder, im_id, K.reshape(3, 3), scale, objects)


def read_models_info(folder: Path) -> dict[int, BopObject]:
    """Read diameters and symmetries.

    Args:
        folder: Of the models, with models_info.json.

    Returns:
        By object's number.

    Raises:
        EvalDataError: The file is missing, damaged, or not in the format.
    """
    file = folder / "models_info.json"
    out = {}
    for obj_id, row in _table(file).items():
        where = f"{file}: object {obj_id}"
        if not isinstance(row, dict):
            _refuse(where, "is not a table")
        diameter = _number(row.get("diameter"), f"{where}: diameter")
        if diameter <= 0:
            _refuse(where, f"has the diameter {diameter:g}")
        discrete = [
            _numbers(s, 16, f"{where}: symmetries_discrete")
            for s in _list(row.get("symmetries_discrete", []), where)
        ]
        continuous = tuple(
            (
                _numbers(s.get("axis"), 3, f"{where}: axis"),
                _numbers(s.get("offset"), 3, f"{where}: offset"),
            )
            for s in _list(row.get("symmetries_continuous", []), where)
            if isinstance(s, dict)
        )
        if any(math.hypot(*axis) == 0 for axis, _ in continuous):
            _refuse(where, "has a continuous symmetry without an axis")
        table = torch.tensor(discrete, dtype=torch.float64).reshape(-1, 4, 4)
        out[obj_id] = BopObject(diameter, table, continuous)
    return out


def read_targets(file: Path) -> list[BopTarget]:
    """Read test_targets_bop19.json.

    Args:
        file: The file.

    Returns:
        Its targets, in its order.

    Raises:
        EvalDataError: The file is missing, damaged, or not in the format.
    """
    out = []
    for i, row in enumerate(_list(read_json(file), str(file))):
        where = f"{file}: row {i}"
        if not isinstance(row, dict):
            _refuse(where, "is not a table")
        names = ("scene_id", "im_id", "obj_id", "inst_count")
        out.append(BopTarget(*(_whole(row.get(name), f"{where}: {name}") for name in names)))
    return out


def read_json(file: Path) -> Any:
    """Read a JSON file of a stranger.

    Args:
        file: The file.

    Returns:
        Its content.

    Raises:
        EvalDataError: It is missing, too large or damaged.
    """
    if not file.is_file():
        raise EvalDataError(f"{file}: no such file; unpack this part of the data set too.")
    if (size := file.stat().st_size) > _MAX_JSON:
        raise EvalDataError(f"{file}: {size} bytes are more than {_MAX_JSON}; split the scene.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise EvalDataError(
            f"{file}: damaged JSON ({' '.join(str(error).split())[:200]}); unpack it again."
        ) from error


def _annotation(row: Any, info: Any, where: str) -> BopAnnotation:
    if not isinstance(row, dict) or not isinstance(info, dict):
        _refuse(where, "is not a table")
    box = info.get("bbox_visib")
    known = box is not None and not (isinstance(box, list) and box[:1] == [-1])
    return BopAnnotation(
        _whole(row.get("obj_id"), f"{where}: obj_id"),
        _numbers(row.get("cam_R_m2c"), 9, f"{where}: cam_R_m2c"),
        _numbers(row.get("cam_t_m2c"), 3, f"{where}: cam_t_m2c"),
        _number(info.get("visib_fract", 1.0), f"{where}: visib_fract"),
        _numbers(box, 4, f"{where}: bbox_visib") if known else None,
    )


def _table(file: Path) -> dict[int, Any]:
    content = read_json(file)
    if not isinstance(content, dict) or not all(k.isdecimal() for k in content):
        _refuse(str(file), "is not a table by number")
    return {int(key): value for key, value in content.items()}


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        _refuse(where, "is not a list")
    return list(value)


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(where, f"is {value!r:.60}, not a whole number")
    return int(value)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _refuse(where, f"is {value!r:.60}, not a number")
    return float(value)


def _numbers(value: Any, count: int, where: str) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count:
        _refuse(where, f"is not a list of {count} numbers")
    return tuple(_number(v, where) for v in value)


def _refuse(where: str, why: str) -> NoReturn:
    raise EvalDataError(f"{where} {why}: not the format of BOP; unpack the data set again.")
