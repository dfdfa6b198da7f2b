"""One-shot poses: the oracle is exact, random features find nothing, DINOv2 is about right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_prep.fixtures.scene import paint
from equifeat.downstream.pose import ObjectPose, PoseFromTemplates, PoseOptions
from equifeat.downstream.posed_views import posed_views, views_of_folder
from equifeat.errors import ImageError, RecipeError, ViewsError
from equifeat.eval.controls import CoordinateOracle, RandomFeatures
from equifeat.geometry.camera import invert, transform
from equifeat.geometry.pixels import pixel_centers
from equifeat.metrics.pose import rotation_error_deg
from tests.downstream.scenes import dinov2, queries, templates
from tests.synthetic import write_views

SMALL = PoseOptions(crop=224, threshold_px=4.0)


def errors(
    model: Any, painted: bool, options: PoseOptions, count: int
) -> tuple[list[float], list[float]]:
    """Degrees and object units of queries between the first templates."""
    estimator = PoseFromTemplates(model, options).fit_views(templates(painted=painted)[:4])
    degrees, apart = [], []
    for view in queries(painted=painted)[:count]:
        found = estimator.estimate(view.image, view.camera.K, view.mask)
        degrees.append(float(rotation_error_deg(found.cam_from_world, view.cam_from_world)))
        apart.append(float((found.cam_from_world - view.cam_from_world)[:3, 3].norm()))
    return degrees, apart


@pytest.mark.parametrize("method", ["epnp", "poselib"])
def test_oracle_finds_the_pose(method: Any) -> None:
    options = PoseOptions(crop=224, stride=8, threshold_px=4.0, method=method)
    degrees, apart = errors(CoordinateOracle(), True, options, 1)
    assert max(degrees) < 1.5
    assert max(apart) < 0.02


def test_dinov2_is_about_right_and_random_features_are_not() -> None:
    degrees, _ = errors(dinov2(), False, SMALL, 2)
    assert max(degrees) < 25.0
    chance, _ = errors(RandomFeatures(), False, SMALL, 2)
    assert min(chance) > 40.0


def test_confidence_is_the_share_of_matches_that_agree() -> None:
    estimator = PoseFromTemplates(CoordinateOracle(), SMALL).fit_views(templates(painted=True)[:2])
    view = queries(painted=True)[0]
    good = estimator.estimate(view.image, view.camera.K)
    chance = PoseFromTemplates(RandomFeatures(), SMALL).fit_views(templates(painted=True)[:2])
    bad = chance.estimate(view.image, view.camera.K)
    assert good.ok
    assert good.confidence == good.inliers / good.matches > 0.6
    assert bad.confidence < 0.3


def test_arrays_and_views_are_the_same_and_units_are_the_templates() -> None:
    views = templates(painted=True)[:3]
    query = views[1]
    images = torch.stack([view.image for view in views])
    poses = torch.stack([view.cam_from_world for view in views])
    depths = [view.depth for view in views]
    options = PoseOptions(crop=128)

    def estimate(unit: float) -> ObjectPose:
        moved = poses.clone()
        moved[:, :3, 3] *= unit
        new = PoseFromTemplates(CoordinateOracle(), options)
        new.fit(images, [unit * depth for depth in depths], query.camera.K, moved)
        return new.estimate(query.image, query.camera.K, query.mask)

    by_views = PoseFromTemplates(CoordinateOracle(), options).fit_views(views)
    same = by_views.estimate(query.image, query.camera.K, query.mask)
    assert torch.equal(estimate(1.0).cam_from_world, same.cam_from_world)
    mm = estimate(1000.0).cam_from_world
    assert rotation_error_deg(mm, query.cam_from_world) < 1.0
    assert (mm - query.cam_from_world * 1.0)[:3, 3].norm() > 500.0
    torch.testing.assert_close(mm[:3, 3] / 1000.0, same.cam_from_world[:3, 3], atol=1e-3, rtol=0.0)


def test_half_a_pixel_in_the_intrinsics_is_seen() -> None:
    """The whole of the convention: K of OpenCV taken as it is moves the object sideways."""
    views = templates(painted=True)[:4]
    options = PoseOptions(crop=224, threshold_px=4.0)
    estimator = PoseFromTemplates(CoordinateOracle(), options).fit_views(views)
    view = views[2]
    shifted = view.camera.K.clone()
    shifted[:2, 2] -= 0.5
    middle = transform(view.cam_from_world, torch.zeros(1, 3, dtype=torch.float64))
    one, other = (
        transform(
            estimator.estimate(view.image, K, view.mask).cam_from_world,
            torch.zeros(1, 3, dtype=torch.float64),
        )
        for K in (view.camera.K, shifted)
    )
    half = 0.5 * float(middle[0, 2] / view.camera.K[0, 0])
    assert (one - middle)[0, :2].norm() < 0.5 * half
    torch.testing.assert_close(
        (other - one)[0, :2], torch.full((2,), half).double(), atol=half / 2, rtol=0.0
    )


def test_a_folder_in_the_layout_of_equifeat_render(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_views(tmp_path / name, views=4, object_name=name)
    for i, view in enumerate(views_of_folder(tmp_path / "one")):
        xy = pixel_centers(view.camera.size_hw).reshape(-1, 2)
        local = view.camera.unproject(xy, view.depth.reshape(-1))
        points = transform(invert(view.cam_from_world), local).reshape(*view.mask.shape, 3)
        color = paint(points.numpy(), view.mask.numpy().astype(int) - 1)
        Image.fromarray(color).save(tmp_path / "one" / f"color_{i:06d}.png")
    # the folder's time is the key of the cache of pictures
    (tmp_path / "one" / "new").touch()
    views = views_of_folder(tmp_path / "one", [0, 2])
    estimator = PoseFromTemplates(CoordinateOracle(), PoseOptions(crop=96, threshold_px=4.0))
    found = estimator.fit_views(views).estimate(views[1].image, views[1].camera.K)
    assert rotation_error_deg(found.cam_from_world, views[1].cam_from_world) < 3.0
    with pytest.raises(ViewsError, match="2 objects"):
        views_of_folder(tmp_path)
    with pytest.raises(ViewsError, match="views 0 to 3, not 4"):
        views_of_folder(tmp_path / "one", [0, 4])


def test_nothing_to_see_is_no_pose_and_bad_input_is_one_sentence(tmp_path: Path) -> None:
    view = templates(painted=True)[0]
    K, pose = view.camera.K, view.cam_from_world[None]
    estimator = PoseFromTemplates(CoordinateOracle(), PoseOptions(crop=64))
    with pytest.raises(ViewsError, match="fit"):
        estimator.estimate(view.image, K)
    image, depth = view.image[None], view.depth[None]
    for arguments, error, words in (
        ((255 * image, depth, K, pose), ImageError, "divide by 255"),
        ((image[:, :1], depth, K, pose), ImageError, "image 0: images must have the shape"),
        ((image, depth[:, ::2], K, pose), ViewsError, "image's size"),
        ((image, depth, K[:2], pose), ViewsError, "calibration"),
        ((image, depth, K, 2 * pose), ViewsError, "no scale"),
        ((image, depth, K, pose.expand(2, 4, 4)), ViewsError, "2 entries for 1 images"),
        ((image, 0 * depth, K, pose), ViewsError, "none of 1 views"),
    ):
        with pytest.raises(error, match=words):
            estimator.fit(*arguments)
    estimator.fit(image, depth, K, pose)
    with pytest.raises(ViewsError, match="mask"):
        estimator.estimate(view.image, K, view.mask[::2])
    with pytest.raises(ViewsError, match="calibration"):
        estimator.estimate(view.image, torch.eye(4))
    empty = estimator.estimate(view.image, K, torch.zeros_like(view.mask))
    assert (empty.ok, empty.inliers, empty.matches, empty.confidence) == (False, 0, 0, 0.0)
    with pytest.raises(RecipeError, match="margin"):
        PoseOptions(margin=0.5)


def test_views_without_depth_and_masks() -> None:
    image = torch.rand(2, 3, 8, 10)
    K = torch.tensor([[9.0, 0, 5], [0, 9, 4], [0, 0, 1]])
    pose = torch.eye(4).expand(2, 4, 4)
    plain = posed_views(image, None, K, pose)
    assert plain[0].mask.all()
    assert not plain[0].depth.any()
    depth = torch.ones(2, 8, 10)
    depth[:, 0], depth[:, 1], depth[:, 2] = 0.0, torch.nan, -1.0
    masked = posed_views(image, depth, K, pose, torch.ones(2, 8, 10))
    assert not masked[1].depth[:3].any()
    assert masked[1].depth.dtype == masked[1].camera.K.dtype == torch.float64
    assert posed_views(image, depth, K, pose)[0].mask[3:].all()
