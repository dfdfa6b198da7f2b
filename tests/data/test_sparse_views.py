"""Captures as views: geometry, lenses, sizes, masks, and what must not be read."""

from __future__ import annotations

import gzip
import json
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from equifeat.data.co3d_views import open_co3d
from equifeat.data.point_cloud import read_points
from equifeat.data.sparse_views import CaptureOptions, SparseViews
from equifeat.data.views import open_views
from equifeat.errors import ImageError, RecipeError, ViewsError
from equifeat.geometry.camera import Camera, transform
from tests.data.sparse_fixtures import SCALE, SHIFT, TURN, Truth, write_co3d, write_colmap
from tests.synthetic import HALF, texture, write_views

pytest.importorskip("pycolmap")


def opened(folder: Path, **options: Any) -> SparseViews:
    (found,) = open_views(folder, captures=CaptureOptions(**options))
    assert isinstance(found, SparseViews)
    return found


@pytest.fixture(scope="module")
def mvimgnet(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """<root>/7/0a1b2c3d with masks in the sister tree <root>/mask/7/0a1b2c3d."""
    root = tmp_path_factory.mktemp("mvimgnet")
    masks = root / "mask/7/0a1b2c3d"
    return write_colmap(root / "7/0a1b2c3d", mixed=True, masks=masks)


@pytest.fixture(scope="module")
def co3d(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return write_co3d(tmp_path_factory.mktemp("co3d"), depth_noise=0.002)


def reprojection_px(views: SparseViews) -> float:
    """Largest distance between an observation and its point in our own cameras."""
    assert views.tracks is not None
    worst = 0.0
    for i in range(len(views)):
        points = views.tracks.points3d[views.tracks.point_ids[i]].double()
        camera = Camera(views.K[i].double(), views.camera(i).size_hw)
        at = camera.project(transform(views.cam_from_world[i].double(), points))
        assert len(at) > 20
        worst = max(worst, float((at - views.tracks.xy[i]).norm(dim=-1).max()))
    return worst


@pytest.mark.parametrize("lens", ["PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV"])
@pytest.mark.parametrize("max_side", [None, 80])
def test_points_project_to_their_observations(
    tmp_path: Path, lens: str, max_side: int | None
) -> None:
    write_colmap(tmp_path / "object", lens=lens, views=4)
    assert reprojection_px(opened(tmp_path / "object", max_side=max_side)) < 1e-3


def test_noise_stays_what_it_was(tmp_path: Path) -> None:
    write_colmap(tmp_path / "object", noise=0.3)
    assert 0.3 < reprojection_px(opened(tmp_path / "object")) < 3.0


def test_object_coordinates(mvimgnet: Truth) -> None:
    """The capture's scale, place and turn are gone, up to the turn: side 1, centred."""
    views = opened(mvimgnet.folder, min_track_length=2)
    assert views.tracks is not None
    low, high = np.quantile(views.tracks.points3d.numpy(), (0.02, 0.98), axis=0)
    assert float((high - low).max()) == pytest.approx(1.0, abs=1e-5)
    assert np.abs((high + low) / 2).max() < 1e-5
    assert float(views.tracks.points3d.abs().max()) < 0.7  # no background point is left
    # Distances between cameras keep their proportion to the object.
    ours = -(views.cam_from_world[:, :3, :3].mT @ views.cam_from_world[:, :3, 3:])[..., 0]
    true = -(mvimgnet.poses[:, :3, :3].mT @ mvimgnet.poses[:, :3, 3:])[..., 0]
    ratio = torch.pdist(ours.double()) / torch.pdist(true)
    assert float(ratio.std() / ratio.mean()) < 1e-5
    # The box is 1 by 0.7 by 0.5: turned, its longest axis-parallel side is between 1 and 1.32.
    assert 1 / 1.4 < float(ratio.mean()) < 1.1


def test_pictures_are_undistorted(mvimgnet: Truth) -> None:
    """Every pixel of the object has the colour of the point that a pinhole sees there."""
    views = opened(mvimgnet.folder, max_side=None)
    for i in (0, 1):
        view = views.view(i)
        points = mvimgnet.object_points(i, Camera(view.camera.K.double(), view.camera.size_hw))
        on = ~points[..., 0].isnan()
        assert view.image.shape[1:] == mvimgnet.cameras[i].size_hw
        # Silhouettes agree but for pixels on the edge.
        assert float((view.mask == on).float().mean()) > 0.99
        both = on & view.mask
        error = (view.image.permute(1, 2, 0)[both] - texture(points[both])).abs()
        assert float(error.mean()) < 0.02
        assert float(view.image[:, ~view.mask].abs().max()) == 0.0
        assert not view.depth.any()


def test_a_lens_matters(tmp_path: Path) -> None:
    """The test above can fail: the photograph as it is stored has its colours elsewhere."""
    truth = write_colmap(tmp_path / "object", k=-0.35)
    view = opened(tmp_path / "object").view(0)
    with Image.open(truth.folder / "images/001.jpg") as photo:
        raw = torch.from_numpy(np.array(photo)).float() / 255
    points = truth.object_points(0, Camera(view.camera.K.double(), view.camera.size_hw))
    both = ~points[..., 0].isnan()
    wrong = (raw[both] - texture(points[both])).abs().mean()
    right = (view.image.permute(1, 2, 0)[both] - texture(points[both])).abs().mean()
    assert float(wrong) > 2 * float(right)


def test_sizes_and_padding(mvimgnet: Truth) -> None:
    small = opened(mvimgnet.folder, max_side=80)
    assert [small.camera(i).size_hw for i in range(3)] == [(60, 80), (80, 60), (60, 80)]
    assert small.view(1).image.shape == (3, 80, 60)
    padded = opened(mvimgnet.folder, max_side=80, pad=True)
    for i in range(2):
        view = padded.view(i)
        h, w = small.camera(i).size_hw
        assert view.image.shape == (3, 80, 80)
        assert view.camera.size_hw == (80, 80)
        assert torch.equal(view.image[:, :h, :w], small.view(i).image)
        assert not view.mask[h:].any()
        assert not view.mask[:, w:].any()
    assert torch.equal(padded.K, small.K)


def test_masks_choose_the_points_and_the_background(mvimgnet: Truth, tmp_path: Path) -> None:
    with_masks = opened(mvimgnet.folder)
    assert with_masks.has_masks
    assert with_masks.tracks is not None
    shown = opened(mvimgnet.folder, use_masks=False)
    assert not shown.has_masks
    assert shown.tracks is not None
    assert len(shown.tracks.points3d) == len(with_masks.tracks.points3d)
    view = shown.view(1)
    assert view.mask.all()
    assert float(view.image[2, 2, 2]) > 0.5  # the wall
    write_colmap(tmp_path / "bare")
    bare = opened(tmp_path / "bare")
    assert bare.tracks is not None
    assert len(bare.tracks.points3d) > len(with_masks.tracks.points3d)
    assert not bare.has_masks


def test_short_and_inexact_tracks_are_dropped(tmp_path: Path) -> None:
    write_colmap(tmp_path / "object")
    strict = opened(tmp_path / "object").tracks
    loose = opened(tmp_path / "object", max_reprojection_px=10.0).tracks
    pairs = opened(tmp_path / "object", min_track_length=2).tracks
    assert strict is not None
    assert loose is not None
    assert pairs is not None
    assert len(loose.points3d) == len(strict.points3d) + 10
    assert len(pairs.points3d) >= len(strict.points3d) + 10
    assert int(torch.bincount(torch.cat(list(strict.point_ids))).min()) >= 3
    with pytest.raises(ViewsError, match="0 points are left"):
        opened(tmp_path / "object", max_reprojection_px=0.4)


@pytest.mark.parametrize("place", ["masks", "mask"])
def test_masks_beside_the_images(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "object"
    write_colmap(folder, masks=folder / place)
    assert opened(folder).has_masks
    (folder / place / "003.jpg.png").unlink()
    assert len(opened(folder)) == 4


def test_missing_photographs_are_left_out(tmp_path: Path) -> None:
    write_colmap(tmp_path / "object")
    (tmp_path / "object/images/002.jpg").unlink()
    views = opened(tmp_path / "object", min_track_length=2)
    assert len(views) == 4
    assert reprojection_px(views) < 1e-3
    for name in ("001.jpg", "003.jpg", "004.jpg"):
        (tmp_path / "object/images" / name).unlink()
    with pytest.raises(ViewsError, match=r"1 of the 5 photographs"):
        opened(tmp_path / "object")


def test_one_bad_object_costs_itself(
    mvimgnet: Truth, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_colmap(tmp_path / "7/good")
    write_colmap(tmp_path / "7/bad")
    (tmp_path / "7/bad/sparse/0/points3D.bin").write_bytes(b"\xff" * 8)
    (tmp_path / "7/unreconstructed/images").mkdir(parents=True)
    (tmp_path / "7/unreconstructed/sparse").mkdir()
    with caplog.at_level(logging.WARNING):
        assert [views.name for views in open_views(tmp_path, "mvimgnet")] == ["7/good"]
    assert "bad" in caplog.text
    with pytest.raises(ViewsError, match="not a COLMAP file"):
        open_views(tmp_path / "7/bad")


def test_wrong_photograph_is_refused(tmp_path: Path) -> None:
    write_colmap(tmp_path / "object")
    Image.new("RGB", (80, 60)).save(tmp_path / "object/images/001.jpg")
    with pytest.raises(ImageError, match=r"60x80 pixels .* 120x160"):
        opened(tmp_path / "object").view(0)
    (tmp_path / "object/images/001.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"001\.jpg: not a readable picture"):
        opened(tmp_path / "object").view(0)


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    """COLMAP's pixels are the stored ones."""
    write_colmap(tmp_path / "object")
    file = tmp_path / "object/images/001.jpg"
    before = opened(tmp_path / "object").view(0).image
    with Image.open(file) as image:
        exif = image.getexif()
        exif[274] = 6
        image.save(file, exif=exif, quality=97, subsampling=0)
    assert float((opened(tmp_path / "object").view(0).image - before).abs().mean()) < 0.02


def test_layouts_are_found_by_what_is_there(mvimgnet: Truth, co3d: Truth, tmp_path: Path) -> None:
    root = mvimgnet.folder.parents[1]
    assert [v.name for v in open_views(root)] == ["7/0a1b2c3d"]
    assert [v.name for v in open_views(mvimgnet.folder, "colmap")] == ["0a1b2c3d"]
    name = "toybox/110_13051_23361"
    for folder in (co3d.folder.parents[1], co3d.folder.parent, co3d.folder):
        assert [v.name for v in open_views(folder)] == [name]
        assert [v.name for v in open_views(folder, "co3d")] == [name]
    write_views(tmp_path / "rendered")
    with pytest.raises(ViewsError, match="frame_annotations"):
        open_views(tmp_path, "co3d")


def test_options_are_checked() -> None:
    for wrong in (
        {"max_side": 3},
        {"max_side": None, "pad": True},
        {"max_reprojection_px": 0.0},
        {"min_track_length": 1},
        {"max_points": 2},
    ):
        with pytest.raises(RecipeError, match="captures"):
            CaptureOptions(**wrong)


def test_views_travel_to_workers(mvimgnet: Truth, co3d: Truth) -> None:
    for folder in (mvimgnet.folder, co3d.folder):
        views = opened(folder)
        again = pickle.loads(pickle.dumps(views))
        assert torch.equal(again.view(0).image, views.view(0).image)
        assert torch.equal(again.tracks.xy[1], views.tracks.xy[1])  # type: ignore[union-attr]


@pytest.mark.parametrize("intrinsics", ["ndc_isotropic", "ndc_norm_image_bounds"])
@pytest.mark.parametrize("size_hw", [(120, 90), (70, 110)])
def test_co3d_camera_is_pytorch3ds(
    tmp_path: Path, intrinsics: str, size_hw: tuple[int, int]
) -> None:
    """Against PyTorch3D's documented projection, one point at a time."""
    truth = write_co3d(tmp_path, intrinsics=intrinsics, size_hw=size_hw, views=3)
    views = opened(truth.folder, max_side=None)
    assert views.tracks is not None
    text = gzip.decompress((truth.folder.parent / "frame_annotations.jgz").read_bytes())
    world = (truth.points @ (SCALE * TURN).T + SHIFT).float().double()
    h, w = size_hw
    for i, entry in enumerate(json.loads(text)):
        at = entry["viewpoint"]
        (fx, fy), (px, py) = at["focal_length"], at["principal_point"]
        for xy, row in list(zip(views.tracks.xy[i], views.tracks.point_ids[i], strict=True))[:30]:
            p = world[int(row)].tolist()
            x, y, z = (sum(p[r] * at["R"][r][c] for r in range(3)) + at["T"][c] for c in range(3))
            ndc = (fx * x / z + px, fy * y / z + py)
            short = min(h, w)
            halves = (short / 2, short / 2) if intrinsics == "ndc_isotropic" else (w / 2, h / 2)
            # NDC (+1, +1) is the top left corner.
            screen = (w / 2 - ndc[0] * halves[0], h / 2 - ndc[1] * halves[1])
            assert math.dist(screen, xy.tolist()) < 1e-3


def test_co3d_sees_only_what_is_visible(co3d: Truth) -> None:
    views = opened(co3d.folder)
    assert views.tracks is not None
    assert reprojection_px(views) < 1e-3
    for i in range(len(views)):
        true, found = set(co3d.seen[i].tolist()), set(views.tracks.point_ids[i].tolist())
        assert len(found & true) > 0.99 * len(found)  # nothing from the far side
        assert len(found) > 0.6 * len(true)  # a tenth of the depth map are holes
    assert views.name == "toybox/110_13051_23361"
    side = float((views.tracks.points3d.amax(0) - views.tracks.points3d.amin(0)).max())
    assert 0.95 < side < 1.2
    assert float(HALF.max()) == 0.5
    thin = opened(co3d.folder, max_points=100)
    assert thin.tracks is not None
    assert len(thin.tracks.points3d) == 100


def test_co3d_hides_the_far_side_by_depth(co3d: Truth) -> None:
    """Without a tight depth test points of the far side would count as seen: it does the work."""
    loose = opened(co3d.folder, depth_tolerance=10.0)
    assert loose.tracks is not None
    true, found = set(co3d.seen[0].tolist()), set(loose.tracks.point_ids[0].tolist())
    assert len(found - true) > 0.3 * len(found)


def test_co3d_category_with_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = write_co3d(tmp_path, views=3)
    bad = write_co3d(tmp_path, sequence="2_3_4", views=3)
    gone = write_co3d(tmp_path, sequence="5_6_7", views=3)
    (bad.folder / "pointcloud.ply").write_bytes(b"ply\nformat ascii 1.0\n")
    (good.folder / "images/frame000002.jpg").unlink()
    gone.folder.rename(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        (views,) = open_views(tmp_path / "toybox")
    assert views.name == "toybox/110_13051_23361"
    assert len(views) == 2
    assert "2_3_4" in caplog.text
    with pytest.raises(ViewsError, match="not a PLY file"):
        open_views(bad.folder)


def edited(truth: Truth, change: Any) -> Path:
    file = truth.folder.parent / "frame_annotations.jgz"
    entries = json.loads(gzip.decompress(file.read_bytes()))
    change(entries[1])
    file.write_bytes(gzip.compress(json.dumps(entries).encode()))
    return truth.folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda e: e["image"].update(path="../../secret.jpg"), "leaves the data set"),
        (lambda e: e["mask"].update(path="/etc/passwd"), "leaves the data set"),
        (lambda e: e.update(viewpoint=None), "frame 1 of 110_13051_23361"),
        (lambda e: e["viewpoint"].update(intrinsics_format="pixels"), "pixels"),
        (lambda e: e["viewpoint"].update(R=[[1, 0, 0]] * 3), "not a rotation"),
        (lambda e: e["viewpoint"].update(T=[1, 2]), "viewpoint.R"),
        (lambda e: e["viewpoint"].update(focal_length=[-1, 1]), "focal_length"),
        (lambda e: e["image"].update(size=[0, 10**9]), "image.size"),
        (lambda e: e["depth"].update(scale_adjustment="x"), "ValueError"),
    ],
)
def test_co3d_annotations_are_not_trusted(tmp_path: Path, change: Any, says: str) -> None:
    folder = edited(write_co3d(tmp_path, views=3), change)
    with pytest.raises(ViewsError, match=says):
        open_views(folder)


def test_co3d_annotations_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = write_co3d(tmp_path, views=2)
    file = truth.folder.parent / "frame_annotations.jgz"
    monkeypatch.setattr("equifeat.data.co3d_views._MAX_JSON", 1000)
    file.write_bytes(gzip.compress(b"[" + b" " * 1_000_000 + b"]"))
    with pytest.raises(ViewsError, match="unpacks to more than 1000 bytes"):
        open_views(truth.folder)
    whole = gzip.compress(b"[]" * 400)
    damaged = [b"no gzip", whole[:-12], whole[:10] + b"\xff" * 8 + whole[18:]]
    for bad in (*damaged, *map(gzip.compress, (b"{}", b"[1]", b"[" * 999))):
        file.write_bytes(bad)
        with pytest.raises(ViewsError, match="frame_annotations"):
            open_co3d(truth.folder.parent, CaptureOptions(), print)


def test_ascii_and_hostile_point_clouds(tmp_path: Path) -> None:
    file = tmp_path / "cloud.ply"
    head = "ply\nformat ascii 1.0\nelement vertex {n}\nproperty uchar red\n"
    head += "".join(f"property double {axis}\n" for axis in "xyz") + "end_header\n"
    file.write_text(head.format(n=2) + "9 1 2 3\n8 4 5 6.5\n")
    assert read_points(file).tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.5]]
    file.write_text(head.format(n=10**10) + "9 1 2 3\n")
    with pytest.raises(ViewsError, match="ends before"):
        read_points(file)
    file.write_text(head.format(n=1) + "9 1 2 nan\n")
    with pytest.raises(ViewsError, match="not a number"):
        read_points(file)
    binary = head.replace("ascii", "binary_little_endian").format(n=10**10)
    file.write_text(binary + "12345678")
    with pytest.raises(ViewsError, match="ends before"):
        read_points(file)
    file.write_text(head.replace("double x", "list uchar int x").format(n=1))
    with pytest.raises(ViewsError, match="list uchar int x"):
        read_points(file)
