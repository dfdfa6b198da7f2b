"""A capture in every convention is read as the same views, and can be written for training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.capture import CaptureOptions, open_captures
from data_prep.capture_conventions import AXES, Convention, axes_code, axes_matrix
from data_prep.capture_write import write_views
from data_prep.check import check_views_command
from equifeat.data.pairs import PairSource
from equifeat.data.views import open_views
from equifeat.errors import ImageError, ViewsError
from tests.data_prep.captures import (
    Scene,
    make_scene,
    opengl_world_from_cam,
    write_colmap,
    write_depth,
    write_nerf,
    write_plain,
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("object"))


def _ros(poses: Any) -> Any:
    return np.linalg.inv(np.block([[axes_matrix("ros"), np.zeros((3, 1))], [0, 0, 0, 1]])) @ poses


def _unity(poses: Any) -> Any:
    mirror = np.diag([1.0, -1.0, 1.0, 1.0])
    return np.linalg.inv(mirror @ poses @ np.diag([1.0, 1.0, -1.0, 1.0]))


CONVENTIONS: dict[str, tuple[Callable[[Path, Scene], Path], dict[str, Any]]] = {
    "plain": (lambda f, s: write_plain(f, s), {}),
    "npy poses": (lambda f, s: write_plain(f, s, pose_files="npy", masks=False), {}),
    "json poses": (lambda f, s: write_plain(f, s, pose_files="json"), {}),
    "npy depth": (lambda f, s: write_plain(f, s, encoding="npy", unit=1.0), {}),
    "npz in mm": (
        lambda f, s: write_plain(f, s, encoding="npz"),
        {"depth_unit": "mm"},
    ),
    "tiff": (lambda f, s: write_plain(f, s, encoding="tiff", unit=0.01), {"depth_unit": "cm"}),
    "a number": (lambda f, s: write_plain(f, s, unit=1 / 5000), {"depth_unit": "0.0002"}),
    "ray": (lambda f, s: write_plain(f, s, ray=True), {"depth": "ray"}),
    "cam2world": (
        lambda f, s: write_plain(f, s.replace(poses=np.linalg.inv(s.poses))),
        {"pose": "world_from_cam"},
    ),
    "opengl": (
        lambda f, s: write_plain(f, s.replace(poses=opengl_world_from_cam(s.poses))),
        {"axes": "opengl", "pose": "world_from_cam"},
    ),
    "columns": (
        lambda f, s: write_plain(f, s.replace(poses=s.poses.transpose(0, 2, 1))),
        {"columns": True},
    ),
    "ros": (lambda f, s: write_plain(f, s.replace(poses=_ros(s.poses))), {"axes": "FLU"}),
    "unity": (
        lambda f, s: write_plain(f, s.replace(poses=_unity(s.poses))),
        {"axes": "unity", "pose": "world_from_cam"},
    ),
    "integer centres": (
        lambda f, s: write_plain(f, s.replace(K=_shifted(s.K, -0.5))),
        {"pixels": "center"},
    ),
    "K of 4 times the size": (
        lambda f, s: write_plain(f, s.replace(K=s.K * np.array([[4.0], [4.0], [1.0]]))),
        {"k_size": "576x448"},
    ),
    "transforms.json": (lambda f, s: write_nerf(f, s), {}),
    "intrinsics a frame": (lambda f, s: write_nerf(f, s, flavour="frames"), {}),
    "blender synthetic": (lambda f, s: write_nerf(f, s, flavour="blender"), {}),
    "colmap": (lambda f, s: write_colmap(f, s), {}),
}


def _shifted(K: Any, by: float) -> Any:
    K = K.copy()
    K[:, :2, 2] += by
    return K


@pytest.mark.parametrize("name", CONVENTIONS)
def test_every_convention_is_the_same_capture(name: str, scene: Scene, tmp_path: Path) -> None:
    write, options = CONVENTIONS[name]
    folder = write(tmp_path / "thing", scene)
    (views,) = open_captures(folder, CaptureOptions(**options))
    assert len(views) == len(scene.poses)
    np.testing.assert_allclose(views.cam_from_world.numpy(), scene.poses, atol=1e-5)
    np.testing.assert_allclose(views.K_exact, scene.K, atol=1e-6)
    step = 1e-2 if name == "tiff" else 1e-3
    for i in (0, 11):
        view = views.view(i)
        np.testing.assert_allclose(view.depth.numpy(), scene.depth[i], atol=0.6 * step)
        np.testing.assert_array_equal(view.mask.numpy(), scene.mask[i])
        image = (view.image.permute(1, 2, 0) * 255).round().numpy()
        # pictures with an alpha channel are laid over black
        expected = scene.color[i] * (scene.mask[i][..., None] if name in NERF else 1)
        np.testing.assert_allclose(image, expected, atol=0.5)


NERF = ("transforms.json", "intrinsics a frame", "blender synthetic")


def test_blender_axes_turn_the_world_upright(scene: Scene, tmp_path: Path) -> None:
    folder = write_nerf(tmp_path / "thing", scene)
    (opengl,) = open_captures(folder, CaptureOptions())
    (blender,) = open_captures(folder, CaptureOptions(axes="blender"))
    up_in_blender = torch.tensor([0.0, 0.0, 1.0])
    up_in_ours = torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(
        opengl.cam_from_world[3, :3, :3] @ up_in_blender,
        blender.cam_from_world[3, :3, :3] @ up_in_ours,
    )


def test_a_capture_written_for_training_has_the_same_geometry(scene: Scene, tmp_path: Path) -> None:
    bigger = scene.replace(
        poses=scene.poses * np.array([[1, 1, 1, 3.0]] * 3 + [[1, 1, 1, 1]]),
        depth=[3.0 * d for d in scene.depth],
    )
    folder = write_plain(tmp_path / "mug", bigger, encoding="npy", unit=1.0)
    text = check_views_command([folder], out=tmp_path / "check", write=tmp_path / "views")
    assert "wrote 1 view folder" in text
    (written,) = open_views(tmp_path / "views")
    assert written.name == "mug"
    meta = json.loads((tmp_path / "views" / "mug" / "views.json").read_text())
    scale, center = meta["object_scale"], np.array(meta["object_center"])
    assert 1 / 3 * 0.95 < scale < 1 / 3 * 1.3  # the object's visible side is a little below 1
    low, high = [], []
    for i in range(len(written)):
        view = written.view(i)
        mask = scene.mask[i]
        np.testing.assert_array_equal(view.mask.numpy(), mask)
        np.testing.assert_allclose(view.depth.numpy(), bigger.depth[i] * scale, atol=1e-4)
        # a point of the capture lands where it belongs in the object's coordinates
        there = np.linalg.inv(bigger.poses[i])[:3, :3] @ (
            np.array([0.1, 0.2, 5.0]) - bigger.poses[i][:3, 3]
        )
        moved = (there - center) * scale
        pose = view.cam_from_world.double().numpy()
        np.testing.assert_allclose(
            pose[:3, :3] @ moved + pose[:3, 3], np.array([0.1, 0.2, 5.0]) * scale, atol=1e-5
        )
        row, column = np.nonzero(mask)
        z = view.depth.numpy()[row, column]
        K = view.camera.K.numpy()
        rays = np.stack(
            [(column + 0.5 - K[0, 2]) / K[0, 0], (row + 0.5 - K[1, 2]) / K[1, 1], np.ones(len(z))]
        )
        points = (rays * z).T @ pose[:3, :3] - pose[:3, 3] @ pose[:3, :3]
        low.append(points.min(0))
        high.append(points.max(0))
    sides = np.max(high, axis=0) - np.min(low, axis=0)
    assert sides.max() == pytest.approx(1.0, abs=0.03)
    source = PairSource([written], min_keypoints=16, max_angle_deg=90.0)
    pair = source.draw(0)
    assert len(pair.keypoints0) >= 16
    with pytest.raises(ViewsError, match="exists already"):
        write_views(open_captures(folder, CaptureOptions())[0], tmp_path / "views")


def test_draws_of_a_written_capture_are_those_of_the_original(scene: Scene, tmp_path: Path) -> None:
    """The same object through two conventions gives the same views, so the same draws."""
    for name in ("opengl", "ray"):
        write, options = CONVENTIONS[name]
        folder = write(tmp_path / name / "thing", scene)
        (capture,) = open_captures(folder, CaptureOptions(**options))
        write_views(capture, tmp_path / name / "out")
    sources = [PairSource(open_views(tmp_path / n / "out"), seed=4) for n in ("opengl", "ray")]
    for i in range(3):
        one, other = (source.draw(i) for source in sources)
        assert (one.key0, one.key1) == (other.key0, other.key1)
        common = {tuple(p) for p in one.keypoints0.tolist()} & {
            tuple(p) for p in other.keypoints0.tolist()
        }
        assert len(common) > 0.5 * len(one.keypoints0)
        torch.testing.assert_close(one.image0, other.image0)


def test_smaller_depth_decides_the_size(scene: Scene, tmp_path: Path) -> None:
    half = scene.replace(depth=[d[::2, ::2] for d in scene.depth])
    folder = write_plain(tmp_path / "thing", scene.replace(color=scene.color), masks=False)
    for i, depth in enumerate(half.depth):
        write_depth(folder / "depth" / str(i), depth / 1e-3, "png")
    (views,) = open_captures(folder, CaptureOptions())
    assert views.view(0).image.shape[1:] == half.depth[0].shape
    np.testing.assert_allclose(views.K_exact, scene.K * np.array([[0.5], [0.5], [1.0]]))


def test_views_of_several_sizes_are_refused(scene: Scene, tmp_path: Path) -> None:
    mixed = scene.replace(
        color=[scene.color[0][:-8], *scene.color[1:]],
        depth=[scene.depth[0][:-8], *scene.depth[1:]],
        mask=[scene.mask[0][:-8], *scene.mask[1:]],
    )
    folder = write_plain(tmp_path / "thing", mixed)
    (views,) = open_captures(folder, CaptureOptions())
    with pytest.raises(ViewsError, match="144x104, 144x112"):
        write_views(views, tmp_path / "out")
    assert not (tmp_path / "out" / "thing").exists()


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "transforms.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_bad_captures_are_named(scene: Scene, tmp_path: Path) -> None:
    small = Scene(scene.color[:3], scene.depth[:3], scene.mask[:3], scene.K[:3], scene.poses[:3])
    nerf = write_nerf(tmp_path / "nerf", small)
    plain = write_plain(tmp_path / "plain", small)

    def fails(folder: Path, error: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(error, match=match):
            open_captures(folder, CaptureOptions(**options))[0].view(0)

    _edit(nerf, k1=0.1)
    fails(nerf, ViewsError, "distorted.*undistort")
    _edit(nerf, k1=0.0, frames=[{"file_path": "../x.png", "transform_matrix": np.eye(4).tolist()}])
    fails(nerf, ViewsError, "lies outside")
    (nerf / "transforms.json").write_text("{")
    fails(nerf, ViewsError, "not readable JSON")

    fails(plain, ViewsError, "Did you mean opengl", axes="opngl")
    fails(plain, ViewsError, "twice", axes="RLF")
    fails(plain, ViewsError, "no unit", depth_unit="inch")
    fails(plain, ViewsError, "no size", k_size="100")
    np.savetxt(plain / "intrinsics.txt", small.K[0].T)
    fails(plain, ViewsError, "K are swapped.*transpose K")
    np.savetxt(plain / "intrinsics.txt", small.K[0] / [[144], [112], [1]])
    fails(plain, ViewsError, "normalised.*--k-size 1x1")
    (views,) = open_captures(plain, CaptureOptions(k_size="1x1"))
    np.testing.assert_allclose(views.K_exact, small.K, atol=1e-6)
    np.savetxt(plain / "intrinsics.txt", small.K[0])
    np.savetxt(plain / "pose" / "1.txt", small.poses[1] @ np.diag([1.0, 1, -1, 1]))
    fails(plain, ViewsError, "1 of 3 poses are mirrored")
    np.savetxt(plain / "pose" / "1.txt", small.poses[1] @ np.diag([1.7, 1.7, 1.7, 1]))
    fails(plain, ViewsError, "pose 1 is not a rotation.*length 1.7")
    (plain / "pose" / "1.txt").unlink()
    fails(plain, ViewsError, "1 of 3 pictures are missing: 1.png")
    np.savetxt(plain / "pose" / "1.txt", small.poses[1])
    Image.fromarray(small.color[0]).save(plain / "depth" / "0.png")
    fails(plain, ImageError, "no metric depth")
    for file in (plain / "depth").iterdir():
        file.unlink()
    fails(plain, ViewsError, "has no depth")


@pytest.mark.parametrize("name", [*AXES, "RFU", "BLU"])
def test_axes_have_one_meaning(name: str) -> None:
    matrix = axes_matrix(name)
    assert axes_matrix(axes_code(matrix)).tolist() == matrix.tolist()
    assert Convention(name).expects_mirror == (np.linalg.det(matrix) < 0)
