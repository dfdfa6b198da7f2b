from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from equifeat.data.views import open_views, reference_poses
from equifeat.errors import ImageError, ViewsError
from equifeat.geometry.camera import invert
from tests.synthetic import poses, render, write_reference_views, write_views


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_views(tmp_path / "set" / "box", "box", views=3, size=48)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "views.json"
    meta = json.loads(file.read_text())
    change(meta)
    file.write_text(json.dumps(meta))


def test_a_view_is_what_was_rendered(folder: Path) -> None:
    (views,) = open_views(folder)
    assert views.name == "box"
    assert len(views) == 3
    assert views.camera(1).size_hw == (48, 48)
    view = views.view(1)
    color, depth = render("box", type(view.camera)(view.camera.K.double(), (48, 48)), poses(3)[1])
    assert view.image.shape == (3, 48, 48)
    assert view.image.dtype == torch.float32
    assert torch.allclose(view.image.permute(1, 2, 0).double(), color, atol=0.5 / 255 + 1e-6)
    # Quantisation: half a step, and never more than 5e-5 of the object.
    assert float((view.depth - depth).abs().max()) <= views.depth_step / 2 + 1e-6 < 5e-5
    assert torch.equal(view.mask, depth > 0)
    assert torch.allclose(view.cam_from_world.double(), poses(3)[1], atol=1e-6)


def test_a_folder_of_objects_is_opened_in_order_and_temporary_ones_are_not(folder: Path) -> None:
    write_views(folder.parent / "deeper" / "ball", "sphere", views=2, size=32)
    write_views(folder.parent / ".tmp", "sphere", views=2, size=32, object_name="tmp")
    assert [views.name for views in open_views(folder.parent)] == ["box", "sphere"]
    assert [views.name for views in open_views(folder.parent, "equifeat")] == ["box", "sphere"]


def test_the_callers_tensors_do_not_reach_the_cache(folder: Path) -> None:
    (views,) = open_views(folder)
    first = views.view(0)
    first.image.zero_()
    first.cam_from_world.zero_()
    assert float(views.view(0).image.max()) > 0.1
    assert float(views.view(0).cam_from_world.abs().max()) > 0.1
    with pytest.raises(IndexError, match="3 views"):
        views.view(3)


def test_a_folder_rendered_anew_is_not_read_from_the_cache(folder: Path) -> None:
    before = open_views(folder)[0].view(0).mask
    (folder / "color_000000.png").unlink()
    write_views(folder, "sphere", views=3, size=48)
    assert not torch.equal(open_views(folder)[0].view(0).mask, before)


def set_item(*path: Any) -> Callable[[dict[str, Any]], object]:
    *keys, last, value = path

    def change(meta: dict[str, Any]) -> None:
        at: Any = meta
        for key in keys:
            at = at[key]
        at[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_item("format", "other"), "not an equifeat-views file"),
        (set_item("version", 2), "format version 2, this release reads 1"),
        (lambda m: m.pop("views"), "'views'"),
        (lambda m: m.pop("depth_step"), "'depth_step'"),
        (set_item("depth_step", -1), "depth_step is -1"),
        (set_item("depth_step", math.nan), "depth_step is nan"),
        (set_item("size_hw", [0, 48]), "size_hw"),
        (set_item("size_hw", [48]), "a field is missing or wrong"),
        (set_item("object", ""), "not a name"),
        (set_item("views", []), "views > 0|a K is not"),
        (set_item("views", 1, "K", [[1, 0], [0, 1]]), "a field is missing or wrong"),
        (set_item("views", 0, "K", [[0, 0, 24], [0, 50, 24], [0, 0, 1]]), "a K is not"),
        (set_item("views", 0, "K", 0, 0, math.inf), "a K is not"),
        (set_item("views", 0, "cam_from_world", 0, 0, 5.0), "not a rotation"),
        (set_item("views", 0, "cam_from_world", 0, 3, math.nan), "not a rotation"),
        (set_item("views", 0, "cam_from_world", [[0.0] * 4] * 4), "not a rotation"),
    ],
)
def test_wrong_metadata_is_one_sentence(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(folder, change)
    with pytest.raises(ViewsError, match=message) as caught:
        open_views(folder)
    assert "views.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_or_file_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ViewsError, match="no such folder"):
        open_views(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ViewsError, match=r"no folder with views\.json"):
        open_views(tmp_path / "empty")
    with pytest.raises(ViewsError, match="no folder with color_000000"):
        open_views(tmp_path / "empty", "reference")
    (folder / "mask_000002.png").unlink()
    with pytest.raises(ViewsError, match=r"mask_000002\.png missing"):
        open_views(folder)
    (folder / "views.json").write_text('{"format": ')
    with pytest.raises(ViewsError, match="not readable JSON"):
        open_views(folder, "equifeat")


def test_two_objects_of_one_name_are_refused(folder: Path) -> None:
    write_views(folder.parent / "again", "box", views=2, size=32)
    with pytest.raises(ViewsError, match="both named 'box'"):
        open_views(folder.parent)


def write_text(file: Path) -> None:
    file.write_text("not an image")


def write_truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


def write_small(file: Path) -> None:
    Image.new("RGB", (8, 9)).save(file)


def write_gray(file: Path) -> None:
    Image.new("L", (48, 48)).save(file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write_text, "not a readable image"),
        (write_truncated, "not a readable image"),
        (write_small, "9x8 pixels"),
        (write_gray, "mode L, expected RGB"),
        (Path.unlink, "no such image"),
    ],
)
def test_a_picture_that_is_none_is_named(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    (views,) = open_views(folder)
    damage(folder / "color_000001.png")
    views.view(0)
    with pytest.raises(ImageError, match=message) as caught:
        views.view(1)
    assert "color_000001.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_8_bit_depth_is_refused(folder: Path) -> None:
    write_gray(folder / "depth_000000.png")
    with pytest.raises(ImageError, match="mode L, expected I;16"):
        open_views(folder)[0].view(0)


def test_nothing_in_the_metadata_can_name_a_file(folder: Path) -> None:
    edit(folder, set_item("object", "../../etc/passwd"))
    edit(folder, set_item("views", 0, "file", "/etc/passwd"))
    (views,) = open_views(folder)
    assert views.where == str(folder)
    assert views.view(0).mask.any()


def test_reference_poses_are_the_icosphere_at_distance_two() -> None:
    found = reference_poses()
    assert found.shape == (42, 4, 4)
    eyes = invert(found)[:, :3, 3]
    assert torch.allclose(eyes.norm(dim=-1), torch.full((42,), 2.0))
    # The optical axis goes through the origin.
    assert torch.allclose(found[:, :3, 3], torch.tensor([0.0, 0.0, 2.0]).expand(42, 3), atol=1e-6)
    assert len(torch.unique(eyes.round(decimals=3), dim=0)) == 42
    trimesh = pytest.importorskip("trimesh")
    vertices = np.asarray(trimesh.creation.icosphere(subdivisions=1).vertices)
    assert np.abs(eyes.numpy() / 2 - vertices).max() < 1e-6


def test_the_reference_layout_is_read(tmp_path: Path) -> None:
    folder = write_reference_views(tmp_path / "set" / "000-151" / "uid", "box", views=3)
    (views,) = open_views(tmp_path / "set")
    assert views.name == "000-151/uid"
    assert views.where == str(folder)
    view = views.view(2)
    # BlenderProc's integer-centred 256 is 256.5 here.
    assert view.camera.K.tolist() == [[560.0, 0.0, 256.5], [0.0, 560.0, 256.5], [0.0, 0.0, 1.0]]
    exact = render("box", type(view.camera)(view.camera.K.double(), (512, 512)), poses_of(2))[1]
    assert float((view.depth - exact).abs().max()) <= 0.5e-3 + 1e-6
    assert open_views(folder, "reference")[0].name == "uid"


def poses_of(i: int) -> torch.Tensor:
    return reference_poses()[i].double()


def test_poses_that_do_not_fit_the_pictures_are_refused(tmp_path: Path) -> None:
    folder = write_reference_views(tmp_path / "set" / "uid", "box", views=3)
    right = reference_poses().numpy()
    np.save(tmp_path / "set" / "obj_poses.npy", right[::-1])
    with pytest.raises(ViewsError, match=r"poses do not fit the pictures.*obj_poses\.npy"):
        open_views(tmp_path / "set")
    np.save(folder / "obj_poses.npy", right)  # the nearest file counts
    assert len(open_views(tmp_path / "set")[0]) == 3
    np.save(folder / "obj_poses.npy", right[:2])
    with pytest.raises(ViewsError, match="3 views but 2 poses"):
        open_views(folder)
    np.save(folder / "obj_poses.npy", np.eye(4))
    with pytest.raises(ViewsError, match=r"poses of shape \(4, 4\)"):
        open_views(folder)
    (folder / "obj_poses.npy").write_bytes(b"no array")
    with pytest.raises(ViewsError, match="not a NumPy array"):
        open_views(folder)
    np.save(folder / "obj_poses.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ViewsError, match="not a NumPy array"):
        open_views(folder)
