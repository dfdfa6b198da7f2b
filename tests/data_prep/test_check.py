"""Every usual mistake in a capture is named; right captures pass; poor views are flagged."""

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
from data_prep.capture_conventions import axes_matrix
from data_prep.check import check_objects, check_views_command
from data_prep.check_object import Finding
from data_prep.check_reproject import choose_pairs
from data_prep.check_surface import BACKGROUND, UNKNOWN, make_surface
from equifeat.data.views import open_views
from equifeat.errors import ViewsError
from equifeat.files import atomic_folder
from tests.data_prep.captures import (
    Scene,
    make_scene,
    noisy,
    opengl_world_from_cam,
    ray_lengths,
    write_nerf,
    write_plain,
)
from tests.synthetic import write_reference_views, write_views

PAIRS = 10


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("object"))


def _turned(poses: Any, axes: str) -> Any:
    turn = np.eye(4)
    turn[:3, :3] = np.linalg.inv(axes_matrix(axes))
    return turn @ poses


def _poses(change: Callable[[Any], Any]) -> Callable[[Scene], Scene]:
    return lambda s: s.replace(poses=np.ascontiguousarray(change(s.poses)))


def _K(change: Callable[[Any], Any]) -> Callable[[Scene], Scene]:  # noqa: N802
    return lambda s: s.replace(K=change(s.K.copy()))


def _depth(factor: float) -> Callable[[Scene], Scene]:
    return lambda s: s.replace(depth=[d * factor for d in s.depth])


def _half_turned(poses: Any) -> Any:
    out = poses.copy()
    out[:, :3, :3] = out[:, :3, :3].transpose(0, 2, 1)
    return out


def _shift_c(by: float) -> Callable[[Any], Any]:
    def change(K: Any) -> Any:
        K[:, :2, 2] += by
        return K

    return change


def _swap(rows: tuple[int, int], column: int | None) -> Callable[[Any], Any]:
    def change(K: Any) -> Any:
        if column is None:
            K[:, [0, 1], [0, 1]] = K[:, [1, 0], [1, 0]]
        else:
            K[:, [0, 1], column] = K[:, [1, 0], column]
        return K

    return change


def _wide(s: Scene) -> Scene:
    """Pixels that are not square: every second row is left out."""
    return s.replace(
        color=[c[::2] for c in s.color],
        depth=[d[::2] for d in s.depth],
        mask=[m[::2] for m in s.mask],
        K=s.K * np.array([[1.0], [0.5], [1.0]]) + np.array([[0, 0, 0], [0, 0, 0.25], [0, 0, 0]]),
    )


def _mirror_world(poses: Any) -> Any:
    return poses @ np.diag([-1.0, 1.0, 1.0, 1.0])


def _unity(poses: Any) -> Any:
    return np.diag([1.0, -1, 1, 1]) @ poses @ np.diag([1.0, -1, 1, 1])


# what is wrong: how it is made, words of the sentence, the option it gives, its kind
MISTAKES: dict[str, tuple[Callable[[Scene], Scene], str, str, list[str]]] = {
    "metres as millimetres": (_depth(1e-3), "1,000 times too small", "--depth-unit 1000", ["unit"]),
    "millimetres as metres": (_depth(1e3), "1,000 times too large", "--depth-unit 0.001", ["unit"]),
    "centimetres as millimetres": (_depth(0.1), "10 times too small", "--depth-unit 10", ["unit"]),
    "some factor": (_depth(1.37), "times too large", "--depth-unit 0.7", ["unit"]),
    "ray distance": (
        lambda s: s.replace(depth=[d * ray_lengths(s, i) for i, d in enumerate(s.depth)]),
        "along the ray, not z",
        "--depth ray",
        ["ray"],
    ),
    "opengl": (_poses(lambda p: _turned(p, "opengl")), "OpenGL's", "--axes opengl", ["axes"]),
    "pytorch3d": (_poses(lambda p: _turned(p, "pytorch3d")), "left, y up", "pytorch3d", ["axes"]),
    "ros": (_poses(lambda p: _turned(p, "ros")), "robot's", "--axes ros", ["axes"]),
    "left-handed": (_poses(_unity), "left-handed", "--axes unity", ["handedness"]),
    "mirrored camera": (
        _poses(lambda p: _turned(p, "RUF")),
        "mirrored (their determinant is -1)",
        "--axes unity",
        ["handedness"],
    ),
    "inverse": (
        _poses(np.linalg.inv),
        "world_from_cam, not",
        "--pose world_from_cam",
        ["direction"],
    ),
    "rows": (_poses(_half_turned), "rotations are transposed", "transpose", ["rows"]),
    "cx and cy": (_K(_swap((0, 1), 2)), "cx and cy are swapped", "swap cx", ["K"]),
    "K of twice the size": (
        _K(lambda K: K * np.array([[2.0], [2.0], [1.0]])),
        "another resolution, about 288x224",
        "--k-size 288x224",
        ["K"],
    ),
    "half a pixel": (_K(_shift_c(-0.5)), "half a pixel", "--pixels center", ["K"]),
    "focal length": (
        _K(lambda K: K * np.array([[1.06, 1, 1], [1, 1.06, 1], [1, 1, 1]])),
        "focal length is wrong",
        "multiply fx and fy by 0.94",
        ["K"],
    ),
    "one late": (_poses(lambda p: np.roll(p, 1, axis=0)), "1 picture too", "reorder", ["order"]),
    "reversed": (_poses(lambda p: p[::-1]), "reversed", "reorder", ["order"]),
    "as text": (
        _poses(lambda p: p[sorted(range(len(p)), key=str)]),
        "sorted as text",
        "reorder",
        ["order"],
    ),
    "opengl inverse in mm": (
        lambda s: s.replace(
            poses=opengl_world_from_cam(s.poses), depth=[d * 1000 for d in s.depth]
        ),
        "1,000 times too large",
        "--axes opengl",
        ["unit", "axes", "direction"],
    ),
}


def diagnose(folder: Path, **options: Any) -> Finding:
    (finding,) = check_objects(open_captures(folder, CaptureOptions(**options)), PAIRS)
    return finding


@pytest.mark.parametrize("sensor", ["clean", "noisy"])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str, sensor: str, scene: Scene, tmp_path: Path) -> None:
    make, words, remedy, kinds = MISTAKES[name]
    start = noisy(scene) if sensor == "noisy" else scene
    folder = write_plain(
        tmp_path / "thing", make(start), encoding="npy", unit=1.0, masks=sensor == "clean"
    )
    finding = diagnose(folder)
    assert [fix.kind for fix in finding.fixes] == kinds, finding.problem
    assert words in finding.problem
    assert any(remedy in fix.remedy for fix in finding.fixes), finding.fixes
    assert finding.before is not None
    assert finding.after is not None
    assert finding.after.consistency > 0.9
    assert finding.after.cost < finding.before.cost - 0.1


@pytest.mark.parametrize("sensor", ["clean", "noisy"])
def test_swapped_focal_lengths_are_named(sensor: str, scene: Scene, tmp_path: Path) -> None:
    wide = _wide(noisy(scene, 1e-3, 0.03) if sensor == "noisy" else scene)
    folder = write_plain(tmp_path / "thing", wide, encoding="npy", unit=1.0)
    assert diagnose(folder).problem == ""
    np.savetxt(folder / "intrinsics.txt", _swap((0, 1), None)(wide.K.copy())[0])
    finding = diagnose(folder)
    assert finding.problem.startswith("fx and fy are swapped; swap fx and fy in K")


@pytest.mark.parametrize("sensor", ["clean", "noisy"])
def test_shuffled_poses_are_put_in_order(sensor: str, scene: Scene, tmp_path: Path) -> None:
    start = noisy(scene) if sensor == "noisy" else scene
    order = np.random.default_rng(3).permutation(len(scene.poses))
    folder = write_plain(
        tmp_path / "thing", start.replace(poses=scene.poses[order]), encoding="npy", unit=1.0
    )
    finding = diagnose(folder)
    assert "shuffled" in finding.problem
    assert finding.order is not None
    np.testing.assert_array_equal(order[finding.order], np.arange(len(order)))


@pytest.mark.parametrize("sensor", ["clean", "noisy"])
def test_right_captures_pass(sensor: str, scene: Scene, tmp_path: Path) -> None:
    start = noisy(scene) if sensor == "noisy" else scene
    folder = write_plain(tmp_path / "thing", start, masks=sensor == "clean")
    finding = diagnose(folder)
    assert finding.problem == ""
    assert finding.before is not None
    assert finding.before.consistency > 0.95
    assert not finding.fixes


def test_a_mirrored_world_is_named_and_can_be_allowed(scene: Scene, tmp_path: Path) -> None:
    mirrored = scene.replace(poses=_mirror_world(scene.poses))
    folder = write_plain(tmp_path / "thing", mirrored)
    assert "world of the poses is mirrored" in diagnose(folder).problem
    assert diagnose(folder, left_handed=True).problem == ""


def test_what_no_convention_mends_is_said(scene: Scene, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    poses = scene.poses.copy()
    for i in range(len(poses)):
        q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        poses[i, :3, :3] = q * np.sign(np.linalg.det(q))
    few = Scene(scene.color[:8], scene.depth[:8], scene.mask[:8], scene.K[:8], poses[:8])
    finding = diagnose(write_plain(tmp_path / "thing", few))
    assert "no single convention mends it" in finding.problem
    assert not finding.fixes


def test_one_wrong_pose_is_a_flag_not_a_convention(scene: Scene, tmp_path: Path) -> None:
    poses = scene.poses.copy()
    poses[4] = poses[9]
    finding = diagnose(write_plain(tmp_path / "thing", scene.replace(poses=poses)))
    assert "does not fit the other views" in finding.flags[4] or finding.order is not None
    assert 7 not in finding.flags


@pytest.mark.parametrize("shape", ["equifeat", "reference"])
def test_view_folders_pass(shape: str, tmp_path: Path) -> None:
    if shape == "equifeat":
        write_views(tmp_path / "views" / "box", "box", views=5)
    else:
        write_reference_views(tmp_path / "views" / "box", views=3)
    text = check_views_command([tmp_path / "views"], out=tmp_path / "out", pairs=4)
    assert text.startswith("1 of 1 objects fit together")


def test_the_command_stops_with_the_first_fault(scene: Scene, tmp_path: Path) -> None:
    inverse = scene.replace(poses=np.linalg.inv(scene.poses))
    folder = write_plain(tmp_path / "mug", inverse)
    with pytest.raises(ViewsError) as failed:
        check_views_command([folder], pairs=PAIRS, write=tmp_path / "views")
    sentence = str(failed.value)
    assert f"{folder}: the poses are world_from_cam, not cam_from_world" in sentence
    assert "give --pose world_from_cam" in sentence
    assert not (tmp_path / "views").exists()
    report = json.loads((tmp_path / "mug_check" / "report.json").read_text())
    (found,) = report["findings"]
    assert report["format"] == "equifeat-check"
    assert report["sound"] == 0
    assert found["fixes"][0]["kind"] == "direction"
    assert found["before"]["consistency"] < 0.5 < found["after"]["consistency"]
    for name in ("contact.png", "reprojection.png"):
        with Image.open(tmp_path / "mug_check" / name) as picture:
            assert picture.width > 400
    # the option it gave is the right one
    text = check_views_command([folder], pairs=PAIRS, pose="world_from_cam")
    assert "1 of 1 objects fit together" in text


def test_poor_views_are_flagged(scene: Scene, tmp_path: Path) -> None:
    color = [c.copy() for c in scene.color]
    depth = [d.copy() for d in scene.depth]
    mask = [m.copy() for m in scene.mask]
    poses = scene.poses.copy()
    mask[1][:] = False
    row, column = np.argwhere(mask[2])[len(np.argwhere(mask[2])) // 2]
    mask[2][:] = False
    mask[2][row : row + 10, column : column + 10] = scene.mask[2][
        row : row + 10, column : column + 10
    ]
    for kind in (color, depth, mask):
        kind[3] = np.concatenate([np.zeros_like(kind[3][:56]), kind[3][:-56]])
    color[4][:] = 0
    color[5][mask[5]] = 120
    color[5][mask[5]] += (np.arange(mask[5].sum()) // 400)[:, None].astype(np.uint8)
    color[7], depth[7], mask[7], poses[7] = color[6], depth[6], mask[6], poses[6]
    depth[8][
        :, scene.mask[8].nonzero()[1].min() : int(np.median(scene.mask[8].nonzero()[1])) + 4
    ] = 0
    poor = scene.replace(color=color, depth=depth, mask=mask, poses=poses)
    folder = write_plain(tmp_path / "thing", poor)
    (folder / "intrinsics.txt").unlink()
    (folder / "intrinsics").mkdir()
    for i, K in enumerate(scene.K):  # one file a picture: view 3 looks higher
        np.savetxt(
            folder / "intrinsics" / f"{i}.txt",
            K + np.array([[0], [56 * (i == 3)], [0]]) * [0, 0, 1],
        )
    text = check_views_command([folder], out=tmp_path / "out", pairs=PAIRS)
    flags = json.loads((tmp_path / "out" / "report.json").read_text())["findings"][0]["flags"]
    assert "empty mask" in flags["1"]
    assert "tiny object" in flags["2"]
    assert "cropped object" in flags["3"]
    assert "blank colour" in flags["4"]
    assert "flat texture" in flags["5"]
    assert {"same pose as another view", "same picture as another view"} <= set(flags["7"])
    assert "depth missing in mask" in flags["8"]
    assert not {"0", "6", "9", "10", "11"} & set(flags)
    assert "flag: empty mask: 1 views" in text
    with pytest.raises(ViewsError, match="view 1: empty mask"):
        check_views_command([folder], out=tmp_path / "out", pairs=PAIRS, strict=True)


def test_object_scale_is_noted(tmp_path: Path) -> None:
    folder = write_views(tmp_path / "views" / "box", "box", views=5)
    meta = json.loads((folder / "views.json").read_text())
    meta["depth_step"] *= 4
    for view in meta["views"]:
        for row in view["cam_from_world"][:3]:
            row[3] *= 4
    with atomic_folder(tmp_path / "other") as temporary:
        for file in folder.iterdir():
            (temporary / file.name).write_bytes(file.read_bytes())
        (temporary / "views.json").write_text(json.dumps(meta))
    (found,) = check_objects(open_views(tmp_path / "other"), 4)
    assert any("longest side is 4" in note or "longest side is 3.9" in note for note in found.notes)


def test_planes_are_exact_for_planes_and_holes_are_no_background(tmp_path: Path) -> None:
    write_views(tmp_path / "box", "box", views=2)
    (views,) = open_views(tmp_path / "box")
    view = views.view(0)
    surface = make_surface(view, background_known=True)
    assert surface is not None
    sound = surface.kind == 0
    error = np.abs(1 / surface.inverse[sound] - view.depth.numpy()[sound])
    assert np.median(error) < 3e-5
    assert (surface.kind[~view.mask.numpy()] != 0).all()
    assert (surface.kind == BACKGROUND).any()
    holes = view._replace(depth=view.depth.clone(), mask=view.mask.clone())
    holes.depth[40:44, 40:44] = 0
    unsure = make_surface(holes._replace(mask=holes.depth > 0), background_known=False)
    assert unsure is not None
    assert not (unsure.kind == BACKGROUND).any()
    assert (unsure.kind[40:44, 40:44] == UNKNOWN).all()


def test_large_pictures_are_thinned_without_a_shift(scene: Scene, tmp_path: Path) -> None:
    write_views(tmp_path / "box", "box", views=2, size=1400)
    (views,) = open_views(tmp_path / "box")
    view = views.view(0)
    surface = make_surface(view, background_known=True)
    assert surface is not None
    assert surface.step == 3
    h, w = surface.kind.shape
    assert max(h, w) <= 640
    # one point through both pictures
    at = torch.tensor([[701.5, 649.5]])
    z = float(view.depth[649, 701])
    point = view.camera.unproject(at, torch.tensor([z])).double().numpy()[0]
    x = surface.K[0, 0] * point[0] / point[2] + surface.K[0, 2]
    y = surface.K[1, 1] * point[1] / point[2] + surface.K[1, 2]
    plane = surface.inverse[int(y), int(x)]
    gx, gy = surface.slope_xy[:, int(y), int(x)]
    plane += gx * (x - int(x) - 0.5) + gy * (y - int(y) - 0.5)
    assert 1 / plane == pytest.approx(z, abs=2e-4)


def test_pairs_are_spread_and_bounded(scene: Scene) -> None:
    pairs = choose_pairs(scene.poses, range(len(scene.poses)), 12)
    assert len(pairs) == 12
    assert len(set(pairs)) == 12
    assert all(i < j for i, j in pairs)
    assert len({i for pair in pairs for i in pair}) >= 10
    assert choose_pairs(scene.poses, [0], 5) == []
    assert choose_pairs(np.linalg.inv(scene.poses), range(14), 12) == pairs


def test_views_and_captures_are_told_apart(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(ViewsError, match="no such folder"):
        check_views_command([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ViewsError, match=r"nor is it a capture: docs/captures\.md"):
        check_views_command([tmp_path / "empty"])
    write_views(tmp_path / "views" / "box", "box", views=2)
    with pytest.raises(ViewsError, match="--write is for captures"):
        check_views_command([tmp_path / "views"], write=tmp_path / "out")
    # several captures in one folder
    few = Scene(scene.color[:4], scene.depth[:4], scene.mask[:4], scene.K[:4], scene.poses[:4])
    for name in ("a", "b"):
        write_nerf(tmp_path / "many" / name, few)
    assert [v.name for v in open_captures(tmp_path / "many", CaptureOptions())] == ["a", "b"]
