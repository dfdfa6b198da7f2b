"""Files in the format of BOP: what is read from them, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from equifeat.data.bop import read_models_info, read_scene, read_targets, scene_folders
from equifeat.data.bop_images import read_depth, read_mask
from equifeat.data.triangles import read_triangles
from equifeat.errors import EvalDataError

CAMERA = {"cam_K": [500.0, 0, 20.5, 0, 501.0, 15.5, 0, 0, 1], "depth_scale": 0.5}
TRUTH = {"obj_id": 4, "cam_R_m2c": [0, -1, 0, 1, 0, 0, 0, 0, 1], "cam_t_m2c": [1, 2, 300.5]}
INFO = {"bbox_visib": [3, 4, 10, 11], "visib_fract": 0.25}
HIDDEN = {"bbox_visib": [-1, -1, -1, -1], "visib_fract": 0.0}


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def scene(root: Path, **changes: Any) -> Path:
    folder = root / "test" / "000007"
    write(folder / "scene_camera.json", changes.get("camera", {"12": CAMERA, "3": CAMERA}))
    write(folder / "scene_gt.json", changes.get("gt", {"12": [TRUTH, TRUTH], "3": []}))
    write(folder / "scene_gt_info.json", changes.get("info", {"12": [INFO, HIDDEN], "3": []}))
    return folder


def test_a_scene_is_read(tmp_path: Path) -> None:
    folder = scene(tmp_path)
    (tmp_path / "test" / "readme").mkdir()
    assert scene_folders(tmp_path / "test") == [folder]
    assert scene_folders(tmp_path / "none") == []
    empty, image = read_scene(folder)
    assert (empty.im_id, image.im_id, image.scene_id) == (3, 12, "000007")
    assert image.K.tolist() == [[500, 0, 20.5], [0, 501, 15.5], [0, 0, 1]]
    one, other = image.objects
    assert (one.obj_id, one.visib_fract, one.bbox_visib) == (4, 0.25, (3, 4, 10, 11))
    assert other.bbox_visib is None
    pose = one.cam_from_object
    assert pose.tolist() == [[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 300.5], [0, 0, 0, 1]]


def test_without_info_everything_is_visible(tmp_path: Path) -> None:
    folder = scene(tmp_path)
    (folder / "scene_gt_info.json").unlink()
    (image,) = (image for image in read_scene(folder) if image.objects)
    assert image.objects[0].visib_fract == 1.0
    assert image.objects[0].bbox_visib is None


def test_pictures_are_found_and_depth_is_in_mm(tmp_path: Path) -> None:
    folder = scene(tmp_path)
    *_, image = read_scene(folder)
    with pytest.raises(EvalDataError, match=r"no rgb/000012\.png"):
        image.picture()
    assert image.depth() is None
    assert read_depth(image) is None
    for name in ("gray", "depth", "mask_visib"):
        (folder / name).mkdir()
    Image.new("L", (4, 3)).save(folder / "gray" / "000012.tif")
    assert image.picture().name == "000012.tif"
    depth = np.array([[0, 1000, 65535]], np.uint16)
    Image.fromarray(depth).save(folder / "depth" / "000012.png")
    read = read_depth(image)
    assert read is not None
    assert read.tolist() == [[0.0, 500.0, 32767.5]]
    assert image.mask_visib(1) is None
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(folder / "mask_visib/000012_000001.png")
    mask = image.mask_visib(1)
    assert mask is not None
    assert read_mask(mask).tolist() == [[False, True]]
    (folder / "depth" / "000012.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(EvalDataError, match="damaged image"):
        read_depth(image)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gt": {"12": [{**TRUTH, "cam_R_m2c": [1, 2]}]}}, "cam_R_m2c is not a list of 9"),
        ({"gt": {"12": [{**TRUTH, "cam_t_m2c": [1, None, 2]}]}}, "cam_t_m2c is None"),
        ({"gt": {"12": [{**TRUTH, "obj_id": "4"}]}}, "obj_id is '4'"),
        ({"gt": {"12": TRUTH}}, "not a list of instances"),
        ({"gt": {"x": []}}, "not a table by number"),
        ({"camera": {"3": CAMERA}}, "image 12 is missing"),
        ({"camera": {"3": CAMERA, "12": {"cam_K": [1]}}}, "cam_K is not a list of 9"),
        ({"camera": {"3": {"cam_K": [0] * 9}, "12": CAMERA}}, "no focal length"),
        ({"info": {"12": [INFO]}}, "has not the 2 rows"),
    ],
)
def test_a_damaged_scene_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    changes.setdefault("info", {})
    folder = scene(tmp_path, **changes)
    with pytest.raises(EvalDataError, match=said):
        list(read_scene(folder))


def test_damaged_json_is_refused(tmp_path: Path) -> None:
    folder = scene(tmp_path)
    (folder / "scene_gt.json").write_text("[" * 100_000)
    with pytest.raises(EvalDataError, match="damaged JSON"):
        list(read_scene(folder))
    (folder / "scene_gt.json").unlink()
    with pytest.raises(EvalDataError, match="no such file"):
        list(read_scene(folder))


def test_models_info_and_targets(tmp_path: Path) -> None:
    row = {
        "diameter": 120.5,
        "symmetries_discrete": [[-1, 0, 0, 0, 0, -1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]],
        "symmetries_continuous": [{"axis": [0, 0, 1], "offset": [1, 2, 3]}],
    }
    write(tmp_path / "models_info.json", {"2": row, "5": {"diameter": 3}})
    infos = read_models_info(tmp_path)
    assert infos[2].diameter == 120.5
    assert infos[2].discrete.shape == (1, 4, 4)
    assert infos[2].continuous == (((0.0, 0.0, 1.0), (1.0, 2.0, 3.0)),)
    assert infos[2].symmetric
    assert not infos[5].symmetric
    write(tmp_path / "models_info.json", {"2": {**row, "diameter": 0}})
    with pytest.raises(EvalDataError, match="diameter 0"):
        read_models_info(tmp_path)
    target = {"scene_id": 1, "im_id": 2, "obj_id": 3, "inst_count": 4}
    assert read_targets(write(tmp_path / "t.json", [target])) == [(1, 2, 3, 4)]
    with pytest.raises(EvalDataError, match="row 0: inst_count is None"):
        read_targets(write(tmp_path / "t.json", [{**target, "inst_count": None}]))


HEADER = """ply
format {} 1.0
comment TextureFile obj.png
element vertex 4
property float x
property float y
property float z
property uchar red
element face 2
property list uchar int vertex_indices
property list uchar float texcoord
end_header
"""
VERTICES = [(0, 0, 0, 9), (1, 0, 0, 9), (0, 2.5, 0, 9), (0, 0, -3, 9)]
FACES = [(0, 1, 2), (3, 2, 1)]


def ply(file: Path, kind: str) -> Path:
    if kind == "ascii":
        rows = [" ".join(map(str, v)) for v in VERTICES]
        rows += [f"3 {a} {b} {c} 6 0 0 1 0 0 1" for a, b, c in FACES]
        file.write_text(HEADER.format(kind) + "\n".join(rows) + "\n")
        return file
    order = "<" if "little" in kind else ">"
    body = b"".join(struct.pack(order + "fffB", *v) for v in VERTICES)
    body += b"".join(struct.pack(order + "B3iB6f", 3, *f, 6, *[0.0] * 6) for f in FACES)
    file.write_bytes(HEADER.format(kind).encode() + body)
    return file


@pytest.mark.parametrize("kind", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_triangles_of_every_kind_of_ply(tmp_path: Path, kind: str) -> None:
    surface = read_triangles(ply(tmp_path / "a.ply", kind))
    assert surface.vertices.tolist() == [[float(x) for x in v[:3]] for v in VERTICES]
    assert surface.vertices.dtype == torch.float64
    assert surface.faces.tolist() == [list(f) for f in FACES]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ply\n", "obj\n", "no PLY header"),
        ("element face 2", "element face 3", "ends before its 3"),
        ("element face 2", "element face 999999999", "ends before"),
        ("element vertex 4", "element vertex 999999999", "ends before"),
        ("3 3 2 1 6", "3 3 2 4 6", "vertex beyond its 4"),
        ("3 3 2 1 6", "4 3 2 1 6", "not 3 corners"),
        ("0 2.5 0 9", "0 nan 0 9", "not a number"),
        ("vertex_indices", "strips", "no vertex_indices"),
        ("property float x", "property float w", "x, y or z are missing"),
        ("uchar int vertex", "uchar long vertex", "is no property"),
    ],
)
def test_other_ply_files_are_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    file = ply(tmp_path / "a.ply", "ascii")
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(EvalDataError, match=said):
        read_triangles(file)


def test_a_cut_off_binary_model_is_refused(tmp_path: Path) -> None:
    file = ply(tmp_path / "a.ply", "binary_little_endian")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(EvalDataError, match="ends before"):
        read_triangles(file)
    with pytest.raises(EvalDataError, match="no such model"):
        read_triangles(tmp_path / "b.ply")
