"""Readers of pair lists, homographies, NAVI and ScanNet: formats, conventions, bad files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from equifeat.data.hpatches import corner_homography, read_planes
from equifeat.data.image_pairs import (
    find_list,
    read_pair_list,
    read_picture,
    turned_camera,
    turned_K,
)
from equifeat.data.navi import navi_pairs, read_16_bits, read_navi, read_navi_depth
from equifeat.data.scannet_pairs import depth_of, read_scannet_pairs
from equifeat.errors import EvalDataError
from equifeat.geometry.camera import Camera, transform

# The first line of SuperGlue's scannet_test_pairs_with_gt.txt.
SCANNET = (
    "scene0707_00_frame-000015.jpg scene0707_00_frame-000585.jpg 0 0 1165.72     0.     649.095    "
    "0.    1165.74   484.765    0.       0.       1.    1165.72     0.     649.095    0.    "
    "1165.74   484.765    0.       0.       1.     0.97598  0.05925  0.20966 -0.03968 -0.08203  "
    "0.99143  0.10171  0.00746 -0.20184 -0.11647  0.97247  0.54255  0.       0.       0.       1."
)


def test_a_published_line(tmp_path: Path) -> None:
    file = tmp_path / "scannet_test_pairs_with_gt.txt"
    file.write_text(f"{SCANNET}\n\n{SCANNET}\n")
    first, second = read_pair_list(find_list(tmp_path))
    assert first.name == "scene0707_00_frame-000015 scene0707_00_frame-000585"
    assert second.name == f"{first.name} (2)"
    assert first.scene == "scene0707_00"
    assert first.turns == (0, 0)
    # half a pixel from the list's convention to the project's
    assert first.K0[:2, 2].tolist() == [649.595, 485.265]
    assert read_pair_list(file, "corner")[0].K0[:2, 2].tolist() == [649.095, 484.765]
    assert first.cam1_from_cam0[:3, 3].tolist() == [-0.03968, 0.00746, 0.54255]
    R = first.cam1_from_cam0[:3, :3]
    torch.testing.assert_close(R @ R.T, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(R[0, 2]) == pytest.approx(0.20966, abs=1e-4)
    # LoFTR's archive names the same frame otherwise
    (tmp_path / "scene0707_00" / "color").mkdir(parents=True)
    (tmp_path / "scene0707_00" / "color" / "15.jpg").touch()
    assert read_pair_list(file)[0].image0 == tmp_path / "scene0707_00" / "color" / "15.jpg"
    assert depth_of(read_pair_list(file)[0].image0).parts[-2:] == ("depth", "15.png")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("0 0 1165.72", "0 1165.72"), "line 1 has 37 columns instead of 38"),
        (("0.97598", "nan"), "is no rigid transform"),
        (("0.97598", "0.5"), "is no rigid transform"),
        (("1165.74", "-1165.74"), "is no matrix of intrinsics"),
        (("649.095", "six"), "could not convert"),
        (("scene0707_00_frame-000015.jpg", "../x.jpg"), "lies outside"),
        (("scene0707_00_frame-000015.jpg", "/etc/hostname"), "lies outside"),
    ],
)
def test_bad_lines(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    file = tmp_path / "pairs.txt"
    file.write_text(SCANNET.replace(*change))
    with pytest.raises(EvalDataError, match=said):
        read_pair_list(file)


def test_which_list(tmp_path: Path) -> None:
    with pytest.raises(EvalDataError, match="found none"):
        find_list(tmp_path)
    (tmp_path / "a_pairs.txt").write_text("\n")
    with pytest.raises(EvalDataError, match="has no pairs"):
        read_pair_list(find_list(tmp_path))
    (tmp_path / "b_pairs.txt").touch()
    with pytest.raises(EvalDataError, match=r"found a_pairs\.txt, b_pairs\.txt"):
        find_list(tmp_path)
    assert find_list(tmp_path, "b_pairs.txt").name == "b_pairs.txt"
    with pytest.raises(EvalDataError, match="has no list"):
        find_list(tmp_path / "other", "../a_pairs.txt")


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_turned_pictures(tmp_path: Path, turns: int) -> None:
    """A pixel of the turned picture is where the turned camera projects its point."""
    h, w = 4, 6
    values = np.random.default_rng(0).integers(0, 255, (h, w, 3)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png", turns)
    K = torch.tensor([[50.0, 0, 2.7], [0, 40.0, 2.2], [0, 0, 1]], dtype=torch.float64)
    rows, columns = np.mgrid[:h, :w]
    xy = torch.from_numpy(np.stack([columns, rows], -1).reshape(-1, 2) + 0.5)
    points = Camera(K, (h, w)).unproject(xy, torch.full((h * w,), 3.0, dtype=torch.float64))
    size = (int(picture.shape[1]), int(picture.shape[2]))
    camera = Camera(turned_K(K, (h, w), turns), size)
    found = camera.project(transform(turned_camera(turns), points))
    for (x, y), pixel in zip(found.tolist(), values.reshape(-1, 3), strict=True):
        seen = picture[:, int(y), int(x)] * 255
        assert [x % 1, y % 1] == pytest.approx([0.5, 0.5])
        assert seen.round().tolist() == pixel.tolist()


def test_homographies_of_integer_centres(tmp_path: Path) -> None:
    H = torch.tensor([[2.0, 0.1, 5.0], [0.0, 1.5, -3.0], [1e-3, 0.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([7.0, 9.0, 1.0], dtype=torch.float64)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    there, found = H @ x, corner_homography(H) @ torch.cat([x[:2] + half, x[2:]])
    torch.testing.assert_close(found[:2] / found[2], there[:2] / there[2] + half)
    for name, change in (("v_a", "viewpoint"), ("i_dc", "illumination")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.ppm").touch()
        for k in range(2, 7):
            # as in the release: leading spaces and blank lines
            text = "\n".join("  " + "  ".join(map(str, row)) + " " for row in H.tolist())
            (tmp_path / name / f"H_1_{k}").write_text(text + "\n\n")
        pairs = [p for p in read_planes(tmp_path, "hpatches") if p.sequence == name]
        assert len(pairs) == 5
        assert pairs[0].change == change
        torch.testing.assert_close(pairs[2].H, corner_homography(H))
    assert {p.sequence for p in read_planes(tmp_path, "hpatches", large=False)} == {"v_a"}
    (tmp_path / "v_a" / "H_1_4").write_text("1 0 0 0 1 0 0 0")
    with pytest.raises(EvalDataError, match=r"H_1_4: is not nine numbers"):
        read_planes(tmp_path, "hpatches")
    (tmp_path / "v_a" / "H_1_4").write_text("0 0 0 0 1 0 0 0 1")
    with pytest.raises(EvalDataError, match="is no homography"):
        read_planes(tmp_path, "hpatches")
    with pytest.raises(EvalDataError, match="no folder in it"):
        read_planes(tmp_path, "oxford")


def navi_set(folder: Path, rotations: list[Rotation]) -> None:
    folder.mkdir(parents=True)
    annotations = []
    for i, rotation in enumerate(rotations):
        x, y, z, w = rotation.as_quat().tolist()
        camera = {
            "q": [2 * w, 2 * x, 2 * y, 2 * z],
            "t": [10.0, 20.0, 300.0],
            "focal_length": 900.0,
        }
        one = {"filename": f"{i:03d}.jpg", "image_size": [480, 640], "camera": camera}
        annotations.append(one)
    (folder / "annotations.json").write_text(json.dumps(annotations[::-1]))


def test_navi(tmp_path: Path) -> None:
    rotations = [Rotation.from_euler("y", 40.0 * i, degrees=True) for i in range(5)]
    navi_set(tmp_path / "duck" / "wild_set", rotations)
    with pytest.raises(EvalDataError, match="both a wild_set and a multiview"):
        read_navi(tmp_path)
    navi_set(tmp_path / "duck" / "multiview_00_cam", rotations[:2])
    ((key, views),) = read_navi(tmp_path).items()
    assert key == ("duck", "wild_set")
    assert [view.name for view in views] == ["000", "001", "002", "003", "004"]
    for view, rotation in zip(views, rotations, strict=True):
        np.testing.assert_allclose(view.cam_from_object[:3, :3], rotation.as_matrix(), atol=1e-12)
        assert view.cam_from_object[:3, 3].tolist() == [0.01, 0.02, 0.3]
    assert list(read_navi(tmp_path, "multiview")) == [("duck", "multiview_00_cam")]
    pairs = navi_pairs({key: views}, 90.0, 1, 8)
    assert [pair.view0.name for pair in pairs] == ["000", "001", "002", "003", "004"]
    for pair in pairs:
        assert 0 < abs(int(pair.view0.name) - int(pair.view1.name)) <= 2
    assert navi_pairs({key: views}, 90.0, 2, 8) == pairs[::2]
    assert not navi_pairs({key: views}, 10.0, 1, 8)
    values = np.array([[0, 655], [1310, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "d.png")
    expected = [[0.0, 655.35 / 655], [655.35 / 1310, 0.01]]
    np.testing.assert_allclose(read_navi_depth(tmp_path / "d.png"), expected)
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "c.png")
    with pytest.raises(EvalDataError, match="several channels"):
        read_16_bits(tmp_path / "c.png")
    with pytest.raises(EvalDataError, match="cannot be read"):
        read_16_bits(tmp_path / "duck" / "wild_set" / "annotations.json")
    (tmp_path / "duck" / "wild_set" / "annotations.json").write_text("{")
    with pytest.raises(EvalDataError, match="is no JSON"):
        read_navi(tmp_path)


def test_scannet_arrays(tmp_path: Path) -> None:
    K = np.array([[577.0, 0, 319.5], [0, 578.0, 239.5], [0, 0, 1]])
    np.savez(tmp_path / "test.npz", name=np.array([[707, 0, 15, 585]], np.uint16))
    np.savez(tmp_path / "intrinsics.npz", scene0707_00=K)
    with pytest.raises(EvalDataError, match=r"15\.txt"):
        read_scannet_pairs(tmp_path)
    (tmp_path / "scene0707_00" / "pose").mkdir(parents=True)
    poses = []
    for frame in (15, 585):
        pose = np.eye(4)
        pose[:3, :3] = Rotation.from_euler("x", frame, degrees=True).as_matrix()
        pose[:3, 3] = [frame, 1, 2]
        poses.append(pose)
        np.savetxt(tmp_path / "scene0707_00" / "pose" / f"{frame}.txt", pose, fmt="%.12f")
    (pair,), files = read_scannet_pairs(tmp_path)
    assert pair.images[1].parts[-3:] == ("scene0707_00", "color", "585.jpg")
    assert pair.K_hw == (480, 640)
    assert pair.K[0, :2, 2].tolist() == [319.5, 239.5]
    np.testing.assert_allclose(pair.cam1_from_cam0, np.linalg.inv(poses[1]) @ poses[0], atol=1e-9)
    assert len(files) == 4
    np.savez(tmp_path / "intrinsics.npz", scene0001_00=K)
    with pytest.raises(EvalDataError, match="has no K of scene0707_00"):
        read_scannet_pairs(tmp_path)
    # objects would run code when they are read
    np.savez(tmp_path / "test.npz", name=np.array([{}], object))
    with pytest.raises(EvalDataError, match="cannot be read"):
        read_scannet_pairs(tmp_path)
