"""Draws are pure, true matches are true."""

from __future__ import annotations

import copy
import random
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from equifeat.data.augment import Augment
from equifeat.data.folder_views import FolderViews
from equifeat.data.pairs import Pair, PairSource
from equifeat.data.tracks import Tracks
from equifeat.data.views import ObjectViews, View, open_views
from equifeat.errors import CorrespondenceError, RecipeError, ViewsError
from equifeat.geometry.camera import Camera, rotation_angle_deg, transform
from equifeat.geometry.covisibility import surface_depth
from equifeat.geometry.pixels import pixel_index
from tests.synthetic import rays, rays_at, shape_depth, write_reference_views, write_views


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[ObjectViews]:
    root = tmp_path_factory.mktemp("views")
    write_views(root / "sphere", "sphere", views=6, size=96)
    write_views(root / "box", "box", views=6, size=96)
    return open_views(root)


def poses_of(objects: list[ObjectViews], pair: Pair) -> tuple[Tensor, Tensor]:
    views = {found.name: found for found in objects}[pair.object_name]
    return views.cam_from_world[pair.key0[1]], views.cam_from_world[pair.key1[1]]


def camera64(camera: Camera) -> Camera:
    return Camera(camera.K.double(), camera.size_hw)


def same(a: Pair, b: Pair) -> bool:
    for name in vars(a):
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, Camera):
            x, y = x.K, y.K
        if not (torch.equal(x, y) if isinstance(x, Tensor) else x == y):
            return False
    return True


class ExactViews(FolderViews):
    """Depth in closed form instead of from a 16-bit picture."""

    def view(self, i: int) -> View:
        view = super().view(i)
        depth = shape_depth(self.name, *rays(view.camera, view.cam_from_world))
        return view._replace(depth=depth.reshape(self.size_hw).float())


@pytest.mark.parametrize("name", ["sphere", "box"])
@pytest.mark.parametrize("exact", [True, False])
def test_true_matches_are_true_on_shapes_known_in_closed_form(
    objects: list[ObjectViews], name: str, exact: bool
) -> None:
    only = [found for found in objects if found.name == name]
    step = only[0].depth_step
    if exact:
        f = only[0]
        assert isinstance(f, FolderViews)
        only = [ExactViews(name, f.folder, f.K, f.cam_from_world, f.size_hw, 1e-9)]
    source = PairSource(only, seed=3, num_keypoints=500, max_angle_deg=90.0)
    for i in range(12):
        pair = source.draw(i)
        assert 32 <= len(pair.keypoints0) == len(pair.keypoints1) <= 500
        pose0, pose1 = poses_of(only, pair)
        # Truth: the ray through the keypoint, where it meets the shape, seen by camera 1.
        eye, d = rays_at(pair.camera0, pose0, pair.keypoints0)
        point = eye + d * shape_depth(name, eye, d)[:, None]
        truth = camera64(pair.camera1).project(transform(pose1.double(), point))
        # A 16-bit depth picture is off by half a step; from the side that is focal * half a step
        # / depth in pixels, and the box's nearest corner is 1.4 away.
        rounding = 0.0 if exact else float(pair.camera0.K[0, 0]) * step / 2 / 1.4
        error = (pair.keypoints1 - truth).norm(dim=-1)
        assert float(error.max()) < (1e-3 if exact else rounding + 1e-3)
        assert float(error.median()) < 1e-3
        assert float((pair.points3d0 - point).norm(dim=-1).max()) < 5e-5
        assert torch.equal(pair.points3d0, pair.points3d1)
        # And it is the first surface that camera 1 meets there.
        eye1, d1 = rays_at(pair.camera1, pose1, pair.keypoints1)
        seen = eye1 + d1 * shape_depth(name, eye1, d1)[:, None]
        assert float((seen - point).norm(dim=-1).max()) < 3e-3
        # Keypoints of view 0 are pixel centres on the object.
        assert torch.equal(pair.keypoints0 % 1, torch.full_like(pair.keypoints0, 0.5))
        column, row = pixel_index(pair.keypoints0).unbind(-1)
        assert bool(pair.mask0[row, column].all())
        column, row = pixel_index(pair.keypoints1).unbind(-1)
        assert bool(pair.mask1[row, column].all())


@pytest.mark.parametrize("sampler", ["covisible", "reference"])
@pytest.mark.parametrize("augment", [None, Augment(affine_p=1.0)])
def test_points_project_to_keypoints_in_both_views(
    objects: list[ObjectViews],
    sampler: Literal["covisible", "reference"],
    augment: Augment | None,
) -> None:
    """K moves with the image: also after augmentation the cameras see what the keypoints say."""
    source = PairSource(objects, 1, sampler, num_keypoints=300, augment=augment)
    for i in range(8):
        pair = source.draw(i)
        pose0, pose1 = poses_of(objects, pair)
        for camera, pose, keypoints, points in (
            (pair.camera0, pose0, pair.keypoints0, pair.points3d0),
            (pair.camera1, pose1, pair.keypoints1, pair.points3d1),
        ):
            xy = camera64(camera).project(transform(pose.double(), points.double()))
            assert float((xy - keypoints).norm(dim=-1).max()) < 1e-3
        in_cam1 = transform(pair.cam1_from_cam0, transform(pose0, pair.points3d0))
        assert torch.allclose(in_cam1, transform(pose1, pair.points3d0), atol=1e-5)


def test_depth_moves_with_the_image(objects: list[ObjectViews]) -> None:
    source = PairSource(objects, 1, num_keypoints=300, augment=Augment(affine_p=1.0))
    for i in range(4):
        pair = source.draw(i)
        pose0, _ = poses_of(objects, pair)
        z = transform(pose0, pair.points3d0)[:, 2]
        found, solid = surface_depth(pair.depth0, pair.keypoints0)
        # Nearest-pixel warping moves a depth by up to a pixel: 0.02 of the object, at a slope.
        assert float((found - z)[solid].abs().median()) < 0.01
        assert torch.equal(pair.mask0, pair.depth0 > 0)


def test_a_draw_depends_on_seed_and_index_only(objects: list[ObjectViews]) -> None:
    def make(seed: int, **options: Any) -> PairSource:
        return PairSource(objects, seed, num_keypoints=64, augment=Augment(), **options)

    first, second = make(5), make(5, length=7)
    forwards = [first.draw(i) for i in range(6)]
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    random.seed(99)
    for i in reversed(range(6)):
        assert same(forwards[i], second[i])
    assert not same(forwards[0], make(6).draw(0))
    assert not same(forwards[0], make(5, stream=1).draw(0))
    assert not same(forwards[0], forwards[1])
    assert forwards[3].draw == 3
    assert len(second) == 7
    with pytest.raises(IndexError, match="draw -1"):
        first.draw(-1)


def random_state() -> tuple[Tensor, np.ndarray[Any, Any], Any]:
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state(), numpy_state[1], random.getstate()


def test_drawing_leaves_the_global_random_state_alone(objects: list[ObjectViews]) -> None:
    source = PairSource(
        objects, 5, augment=Augment(1.0, blur_p=1.0, noise_p=1.0, clahe_p=1.0, color_p=1.0)
    )
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    before = random_state()
    source.draw(0)
    after = random_state()
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert before[2] == after[2]


def test_the_range_of_view_change_is_kept(objects: list[ObjectViews]) -> None:
    source = PairSource(objects, 0, num_keypoints=64, min_angle_deg=45.0, max_angle_deg=85.0)
    changes = []
    for i in range(20):
        pair = source.draw(i)
        angle = float(rotation_angle_deg(pair.cam1_from_cam0[:3, :3]))
        assert pair.view_change_deg == pytest.approx(angle)
        assert pair.key0 != pair.key1
        changes.append(angle)
    assert 45.0 <= min(changes) < max(changes) <= 85.0


def test_fixed_versions_of_a_view_are_one_picture_each(objects: list[ObjectViews]) -> None:
    source = PairSource(objects, 0, num_keypoints=32, augment=Augment(versions=2))
    pictures: dict[tuple[str, int, int], Tensor] = {}
    for pair in map(source.draw, range(60)):
        for key, version, image, camera, xy, points in (
            (pair.key0, pair.version0, pair.image0, pair.camera0, pair.keypoints0, pair.points3d0),
            (pair.key1, pair.version1, pair.image1, pair.camera1, pair.keypoints1, pair.points3d1),
        ):
            assert version is not None
            first = pictures.setdefault((*key, version), image)
            assert torch.equal(image, first)
            # the keypoints, which are drawn anew, moved with the picture
            views = {found.name: found for found in objects}[key[0]]
            seen = transform(views.cam_from_world[key[1]], points)
            torch.testing.assert_close(camera.project(seen), xy, atol=0.06, rtol=0.0)
    versions = {version for *_, version in pictures}
    assert versions <= {0, 1, 2}  # 0: none of its changes was drawn
    assert versions >= {1, 2}
    assert len({picture.sum().item() for picture in pictures.values()}) == len(pictures)
    # another seed augments otherwise, another object of the same pose too
    again = PairSource(objects, 1, num_keypoints=32, augment=Augment(versions=2))
    others = [pair for pair in map(again.draw, range(60)) if pair.version0]
    theirs = [(*pair.key0, pair.version0) for pair in others]
    assert not any(
        torch.equal(pair.image0, pictures[key])
        for pair, key in zip(others, theirs, strict=True)
        if key in pictures
    )
    fresh = PairSource(objects, 0, num_keypoints=32, augment=Augment()).draw(0)
    assert {fresh.version0, fresh.version1} <= {None, 0}
    assert None in (fresh.version0, fresh.version1)


def test_objects_and_ordered_pairs_are_all_drawn(objects: list[ObjectViews]) -> None:
    source = PairSource(objects, 0, "reference", num_keypoints=32, max_angle_deg=180.0)
    pairs = [source.draw(i) for i in range(150)]
    names = Counter(pair.object_name for pair in pairs)
    # 150 draws of a fair coin: 75 ± 6.1; five standard deviations.
    assert abs(names["box"] - 75) < 31
    assert len({(pair.key0[1], pair.key1[1]) for pair in pairs}) == 30


def test_the_reference_sampler_draws_mask_pixels_of_each_view_on_its_own(
    objects: list[ObjectViews],
) -> None:
    n = 700
    source = PairSource(objects, 2, "reference", num_keypoints=n, max_angle_deg=120.0)
    matched = []
    for i in range(10):
        pair = source.draw(i)
        for keypoints, mask in (
            (pair.keypoints0, pair.mask0),
            (pair.keypoints1, pair.mask1),
        ):
            assert keypoints.shape == (n, 2)
            assert torch.equal(keypoints % 1, torch.full_like(keypoints, 0.5))
            column, row = pixel_index(keypoints).unbind(-1)
            assert bool(mask[row, column].all())
            # Without replacement as long as there are enough pixels.
            assert int(mask.sum()) >= n
            assert len(torch.unique(keypoints, dim=0)) == n
            # Uniform over the mask: means agree within five standard errors.
            rows, columns = mask.nonzero().double().unbind(-1)
            mean = torch.stack([columns.mean(), rows.mean()]) + 0.5
            spread = torch.stack([columns.std(), rows.std()])
            error = (keypoints.double().mean(0) - mean).abs()
            assert bool((error < 5 * spread / n**0.5).all())
        matched.append(float((pair.keypoints0 == pair.keypoints1).all(-1).double().mean()))
    assert max(matched) < 0.05
    few = PairSource(objects, 2, "reference", num_keypoints=20_000).draw(0)
    assert few.keypoints0.shape == (20_000, 2)


def test_a_coarse_depth_step_does_not_empty_the_reference_layout(tmp_path: Path) -> None:
    write_reference_views(tmp_path / "uid", "box", views=4)
    source = PairSource(open_views(tmp_path), 0, num_keypoints=2000, max_angle_deg=75.0)
    pair = source.draw(0)
    assert len(pair.keypoints0) == 2000
    (pose0, pose1) = poses_of(open_views(tmp_path), pair)
    eye, d = rays_at(pair.camera0, pose0, pair.keypoints0)
    point = eye + d * shape_depth("box", eye, d)[:, None]
    truth = camera64(pair.camera1).project(transform(pose1.double(), point))
    # Millimetres: half a step is 5e-4 of the object, 0.17 px at focal length 560.
    assert float((pair.keypoints1 - truth).norm(dim=-1).max()) < 0.2


def test_opposite_views_without_a_common_pixel_are_named(tmp_path: Path) -> None:
    folder = write_views(tmp_path / "box", "box", views=6, size=64)
    source = PairSource(open_views(folder), 0, min_angle_deg=150.0, max_angle_deg=180.0)
    with pytest.raises(CorrespondenceError, match=r"box: draw 0 .*20 attempts.*→.*lower") as caught:
        source.draw(0)
    assert "\n" not in str(caught.value)


def test_wrong_arguments_are_named(objects: list[ObjectViews]) -> None:
    with pytest.raises(ViewsError, match="no objects"):
        PairSource([])
    with pytest.raises(ViewsError, match=r"no two views are 0\.0 to 1\.0 degrees apart"):
        PairSource(objects, max_angle_deg=1.0)
    with pytest.raises(RecipeError, match="seed is -1"):
        PairSource(objects, seed=-1)
    with pytest.raises(RecipeError, match="at least 1"):
        PairSource(objects, num_keypoints=0)
    with pytest.raises(RecipeError, match=r"90\.0 to 10\.0 degrees"):
        PairSource(objects, min_angle_deg=90.0, max_angle_deg=10.0)
    with pytest.raises(RecipeError, match="background 'blue'"):
        PairSource(objects, background="blue")


def near_share(pair: Pair) -> float:
    """How many of the negatives lie just beyond neg_radius, of all pairs of keypoints."""
    distance = torch.cdist(pair.points3d0, pair.points3d1)
    negative = distance > 0.1
    return float((negative & (distance < 0.2)).sum() / negative.sum())


def test_the_hard_sampler_draws_true_matches_with_more_near_negatives(
    objects: list[ObjectViews],
) -> None:
    share: dict[str, list[float]] = {"covisible": [], "hard": []}
    sampler: Literal["covisible", "hard"]
    for sampler in ("covisible", "hard"):
        source = PairSource(objects, 3, sampler, num_keypoints=200, max_angle_deg=60.0)
        for i in range(10):
            pair = source.draw(i)
            assert pair.keypoints0.shape == pair.keypoints1.shape == (200, 2)
            assert torch.equal(pair.points3d0, pair.points3d1)
            assert len(torch.unique(pair.keypoints0, dim=0)) == 200
            pose1 = poses_of(objects, pair)[1]
            found = camera64(pair.camera1).project(
                transform(pose1.double(), pair.points3d0.double())
            )
            assert float((found - pair.keypoints1).norm(dim=-1).max()) < 1e-3
            share[sampler].append(near_share(pair))
        assert same(pair, PairSource(objects, 3, sampler, 200, max_angle_deg=60.0).draw(9))
    assert np.mean(share["hard"]) > 1.05 * np.mean(share["covisible"])
    # Fewer covisible pixels than keypoints: all of them, as without clusters.
    all_of, clusters = (
        PairSource(objects, 3, sampler, num_keypoints=20_000).draw(0)
        for sampler in ("covisible", "hard")
    )
    assert same(all_of, clusters)


def test_half_of_the_hard_keypoints_lie_in_clusters(
    objects: list[ObjectViews], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equifeat.data.pairs._CENTERS", 1)
    source = PairSource(objects, 0, "hard", num_keypoints=200, hard_radius=0.2)
    points = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    rows = source._clustered(points, np.random.default_rng(1))
    assert len(rows) == len(set(rows.tolist())) == 200
    drawn = torch.zeros(2000, dtype=torch.bool)
    drawn[rows] = True
    near = torch.cdist(points, points) < 0.2
    whole = (near & ~drawn).sum(dim=1) == 0
    # One ball, and it alone, was taken whole; the other half is spread over all.
    center = int(whole.nonzero())
    assert 20 < int(near[center].sum()) <= 100
    assert int((drawn & ~near[center]).sum()) >= 95
    assert len(source._clustered(points[:50], np.random.default_rng(1))) == 50


def test_the_hard_sampler_draws_from_tracks(objects: list[ObjectViews]) -> None:
    """Points that every view sees: what is drawn is a true match, and clustered."""
    box = next(found for found in objects if found.name == "box")
    points = 0.6 * torch.rand(3000, 3, generator=torch.Generator().manual_seed(0)) - 0.3

    seen = [
        camera64(box.view(i).camera).project(transform(pose.double(), points.double())).float()
        for i, pose in enumerate(box.cam_from_world)
    ]
    tracked = copy.copy(box)
    tracked.tracks = Tracks(seen, [torch.arange(len(points))] * len(seen), points)
    share = {}
    sampler: Literal["covisible", "hard"]
    for sampler in ("covisible", "hard"):
        source = PairSource([tracked], 0, sampler, num_keypoints=200, hard_radius=0.1)
        drawn = [source.draw(i) for i in range(4)]
        share[sampler] = np.mean([near_share(pair) for pair in drawn])
        for pair in drawn:
            assert len(pair.keypoints0) == 200
            assert torch.equal(pair.points3d0, pair.points3d1)
            pose1 = poses_of([tracked], pair)[1]
            found = camera64(pair.camera1).project(
                transform(pose1.double(), pair.points3d0.double())
            )
            assert float((found - pair.keypoints1).norm(dim=-1).max()) < 1e-3
    assert share["hard"] > 1.05 * share["covisible"]


def test_the_curriculum_widens_the_view_change(objects: list[ObjectViews]) -> None:
    def make(draws: int) -> PairSource:
        return PairSource(
            objects,
            4,
            num_keypoints=64,
            max_angle_deg=120.0,
            curriculum_draws=draws,
            curriculum_start_deg=45.0,
        )

    source, plain = make(40), make(0)
    changes = [source.draw(i).view_change_deg for i in range(48)]
    limits = [45.0 + min(i / 40, 1.0) * 75.0 for i in range(48)]
    assert all(change <= limit + 1e-3 for change, limit in zip(changes, limits, strict=True))
    assert max(changes[:8]) < 60.0 < 80.0 < max(changes[24:])
    # Any order, any process; and behind its end a draw is that of a run without it.
    assert same(make(40).draw(7), source.draw(7))
    assert all(same(source.draw(i), plain.draw(i)) for i in (40, 41, 200))
    assert not all(same(source.draw(i), plain.draw(i)) for i in range(8))


def test_a_curriculum_below_every_pair_begins_with_the_narrowest(
    objects: list[ObjectViews],
) -> None:
    least = min(float(pairs.angles_deg.min()) for pairs in PairSource(objects)._pairs)
    source = PairSource(
        objects, 0, num_keypoints=64, curriculum_draws=1000, curriculum_start_deg=1.0
    )
    assert least > 20.0
    assert [source.draw(i).view_change_deg for i in range(5)] == pytest.approx([least] * 5, abs=0.1)
    with pytest.raises(RecipeError, match=r"curriculum_start_deg is 130\.0: use 0 to .*\(120\.0\)"):
        PairSource(objects, curriculum_draws=1, curriculum_start_deg=130.0)
    with pytest.raises(RecipeError, match="curriculum_draws is -1"):
        PairSource(objects, curriculum_draws=-1)
    with pytest.raises(RecipeError, match=r"hard_radius is 0\.0"):
        PairSource(objects, hard_radius=0.0)
