"""Descriptors on points: visibility, weights, the field, and the clouds themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.data.object_views import View
from equifeat.downstream.point_cloud import (
    FuseOptions,
    PointDescriptors,
    cloud_of_views,
)
from equifeat.downstream.posed_views import posed_views
from equifeat.errors import RecipeError, ViewsError
from equifeat.eval.controls import CoordinateOracle
from equifeat.geometry.camera import Camera, look_at
from equifeat.model.feature_map import FeatureMap
from tests.downstream.scenes import templates


class Colors:
    """Features that are the picture itself, so that what is fused can be told."""

    def dense(self, images: Tensor, resolution: int | None = None) -> FeatureMap:
        return FeatureMap(images, (int(images.shape[-2]), int(images.shape[-1])))


def plane_view(eye: tuple[float, float, float], color: tuple[float, float, float]) -> View:
    """A camera that looks at the plane z = 0 around the origin, in one colour."""
    pose = look_at(
        torch.tensor(eye).double(), torch.zeros(3).double(), torch.tensor([0.0, 1.0, 0.0]).double()
    )
    camera = Camera.from_focal(100.0, (64, 64))
    camera = Camera(camera.K.double(), camera.size_hw)
    y, x = torch.meshgrid(*[torch.arange(64).double() + 0.5] * 2, indexing="ij")
    rays = camera.unproject(torch.stack([x, y], -1).reshape(-1, 2), torch.ones(64 * 64).double())
    world = rays @ pose[:3, :3]
    depth = (-torch.tensor(eye).double()[2] / world[:, 2]).reshape(64, 64)
    image = torch.tensor(color)[:, None, None].expand(3, 64, 64)
    mask = torch.ones(64, 64, dtype=torch.bool)
    return View(image, depth, mask, camera, pose)


def grid(side: float = 0.4, count: int = 15) -> Tensor:
    x = torch.linspace(-side / 2, side / 2, count).double()
    return F.pad(torch.cartesian_prod(x, x), (0, 1))


RED, GREEN = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)


def test_views_are_weighted_by_their_angle() -> None:
    front, slanted = plane_view((0.0, 0.0, 2.0), RED), plane_view((0.0, 3.0**0.5, 1.0), GREEN)
    points = grid(0.02)
    middle = len(points) // 2
    for power, share in ((0.0, 1.0), (1.0, 0.5), (2.0, 0.25)):
        options = FuseOptions(angle_power=power, depth_tol=0.01)
        found = PointDescriptors.from_views(Colors(), points, [front, slanted], options)
        expected = F.normalize(torch.tensor([1.0, share, 0.0]), dim=0)
        torch.testing.assert_close(found.descriptors[middle], expected, atol=0.01, rtol=0.0)
        assert (found.seen == 2).all()


def test_what_a_view_does_not_see_takes_nothing_from_it() -> None:
    points = grid()
    behind = points + torch.tensor([0.0, 0.0, -0.2]).double()
    above = plane_view((0.0, 0.0, 2.0), RED)
    found = PointDescriptors.from_views(Colors(), torch.cat([points, behind]), [above])
    assert torch.equal(found.points, points)
    masked = above._replace(mask=above.mask & (torch.arange(64) < 32))
    half = PointDescriptors.from_views(Colors(), points, [masked])
    assert 0.3 < len(half.points) / len(points) < 0.6
    with pytest.raises(ViewsError, match="none of 1 views sees"):
        PointDescriptors.from_views(Colors(), behind, [above])


def test_without_depth_the_cloud_hides_itself() -> None:
    points = grid(0.4, 41)
    behind = points + torch.tensor([0.0, 0.0, -0.2]).double()
    view = plane_view((0.0, 0.0, 2.0), RED)
    blind = posed_views(view.image[None], None, view.camera.K, view.cam_from_world[None])
    both = torch.cat([points, behind])
    found = PointDescriptors.from_views(Colors(), both, blind)
    assert len(found.points) < 1.2 * len(points)
    assert (found.points[: len(points)] == points).all()


def test_the_oracle_describes_points_by_where_they_are() -> None:
    """Points near each other in space are near in descriptors, whatever view showed them."""
    views = templates(painted=True)
    points = cloud_of_views(views, 0.04)
    found = PointDescriptors.from_views(CoordinateOracle(width=0.2), points, views)
    assert len(found.points) > 0.8 * len(points)
    one = PointDescriptors.from_views(CoordinateOracle(width=0.2), points, views[:1])
    other = PointDescriptors.from_views(CoordinateOracle(width=0.2), points, views[2:3])
    assert len(one.points) < len(found.points)
    similar = one.descriptors @ other.descriptors.T
    apart = torch.cdist(one.points, other.points)
    assert similar[apart < 0.02].mean() > 0.9
    assert similar[apart > 0.4].mean() < 0.5


def test_the_field_is_the_points_there_and_smooth_between() -> None:
    points = grid(1.0, 11)
    values = F.normalize(torch.randn(121, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    field = PointDescriptors(points, values, torch.ones(121), neighbors=4)
    torch.testing.assert_close(field.query(points), values, atol=1e-4, rtol=0.0)
    assert field.distance(points).max() < 1e-6
    up = points + torch.tensor([0.0, 0.0, 0.03]).double()
    torch.testing.assert_close(field.distance(up), torch.full((121,), 0.03).double())
    middle = points[:1] + torch.tensor([0.05, 0.05, 0.0]).double()
    mean = F.normalize(values[[0, 1, 11, 12]].mean(dim=0), dim=0)
    torch.testing.assert_close(field.query(middle)[0], mean, atol=1e-4, rtol=0.0)
    index, weight = field.weights(torch.rand(2, 5, 3))
    assert index.shape == weight.shape == (2, 5, 4)
    torch.testing.assert_close(weight.sum(dim=-1), torch.ones(2, 5).double())


def test_gradients_reach_the_places() -> None:
    points = grid(1.0, 11)
    field = PointDescriptors(points, torch.randn(121, 8), torch.ones(121))
    places = (0.5 * torch.rand(6, 3).double() + 0.01).requires_grad_()
    target = field.descriptors[60]

    def value(at: Tensor) -> Tensor:
        index, weight = field.weights(at)
        cosines = (field.descriptors @ target).double()
        return (weight * cosines[index]).sum() + field.distance(at).sum()

    assert torch.autograd.gradcheck(value, places, atol=1e-5)
    assert field.query(places).requires_grad


def test_a_cloud_keeps_one_point_a_cube() -> None:
    view = plane_view((0.0, 0.0, 2.0), RED)
    points = cloud_of_views([view], 0.1)
    assert points[:, 2].abs().max() < 1e-9
    # 64 px at f = 100 px and z = 2 are 1.28 long
    assert 13**2 <= len(points) <= 15**2
    assert torch.unique(torch.floor(points / 0.1), dim=0).shape[0] == len(points)
    with pytest.raises(RecipeError, match="spacing=0"):
        cloud_of_views([view], 0.0)
    with pytest.raises(ViewsError, match="depth"):
        cloud_of_views([view._replace(mask=torch.zeros(64, 64, dtype=torch.bool))], 0.1)


def test_bad_input_is_one_sentence() -> None:
    view = plane_view((0.0, 0.0, 2.0), RED)
    with pytest.raises(ViewsError, match=r"\(P, 3\)"):
        PointDescriptors.from_views(Colors(), torch.zeros(3, 2), [view])
    with pytest.raises(ViewsError, match="finite"):
        PointDescriptors.from_views(Colors(), torch.full((3, 3), torch.nan), [view])
    with pytest.raises(ViewsError, match="0 points and 0"):
        PointDescriptors(torch.zeros(0, 3), torch.zeros(0, 4), torch.zeros(0))
    kinds: list[dict[str, Any]] = [{"neighbors": 0}, {"angle_power": -1.0}, {"depth_tol": 0.0}]
    for bad in kinds:
        with pytest.raises(RecipeError, match=next(iter(bad))):
            FuseOptions(**bad)
