from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.viewpoints import ViewpointOptions, make_viewpoints
from equifeat.errors import RenderError
from equifeat.geometry.camera import invert, rotation_angle_deg

SIZE = (512, 512)


def eyes(poses: Tensor) -> Tensor:
    return invert(poses)[:, :3, 3]


def test_default_is_the_icosphere_of_the_reference() -> None:
    K, poses = make_viewpoints(ViewpointOptions(), SIZE)
    assert poses.shape == (42, 4, 4)
    torch.testing.assert_close(eyes(poses).norm(dim=-1), torch.full((42,), 2.0).double())
    assert float(torch.cdist(eyes(poses), eyes(poses)).fill_diagonal_(9).min()) > 1.0
    expected = torch.tensor([[560.0, 0, 256], [0, 560, 256], [0, 0, 1]]).double()
    torch.testing.assert_close(K, expected.expand(42, 3, 3))
    # every camera looks at the origin, which is in the image's middle
    torch.testing.assert_close(poses[:, :3, 3], torch.tensor([0.0, 0, 2]).double().expand(42, 3))
    torch.testing.assert_close(torch.linalg.det(poses[:, :3, :3]), torch.ones(42).double())


def test_up_is_plus_y_and_upwards_in_the_image() -> None:
    _, poses = make_viewpoints(ViewpointOptions(), SIZE)
    up_in_camera = poses[:, :3, 1]
    sideways = eyes(poses)[:, 1].abs() < 1.9
    assert (up_in_camera[sideways, 1] < 0).all()
    torch.testing.assert_close(
        up_in_camera[sideways, 0], torch.zeros(int(sideways.sum())).double(), atol=1e-9, rtol=0
    )


def test_focal_scales_with_the_image_and_fov_replaces_it() -> None:
    K, _ = make_viewpoints(ViewpointOptions(), (256, 256))
    assert float(K[0, 0, 0]) == pytest.approx(280.0)
    K, _ = make_viewpoints(ViewpointOptions(fov=90.0), (256, 256))
    assert float(K[0, 0, 0]) == pytest.approx(128.0)
    assert float(K[0, 0, 2]) == 128.0


@pytest.mark.parametrize("count", [1, 7, 100])
def test_elevation_range_and_count(count: int) -> None:
    options = ViewpointOptions(count=count, elevation=(10.0, 40.0), distance=3.0)
    _, poses = make_viewpoints(options, SIZE)
    at = eyes(poses)
    elevation = torch.rad2deg(torch.asin(at[:, 1] / 3.0))
    assert len(at) == count
    assert float(elevation.min()) >= 10.0 - 1e-6
    assert float(elevation.max()) <= 40.0 + 1e-6


def test_whole_sphere_of_any_count_is_even() -> None:
    _, poses = make_viewpoints(ViewpointOptions(count=100), SIZE)
    at = eyes(poses)
    nearest = torch.cdist(at, at).fill_diagonal_(9).min(dim=1).values
    assert float(nearest.min()) > 0.4 * float(nearest.max())
    assert float(at.mean(dim=0).norm()) < 0.05


def test_jitters_stay_in_their_range_and_depend_on_the_seed_only() -> None:
    plain = make_viewpoints(ViewpointOptions(), SIZE)
    options = ViewpointOptions(roll_jitter=30.0, look_at_jitter=0.1, focal_jitter=0.2, seed=5)
    first, again = (make_viewpoints(options, SIZE) for _ in range(2))
    torch.testing.assert_close(first.cam_from_world, again.cam_from_world, rtol=0, atol=0)
    torch.testing.assert_close(first.K, again.K, rtol=0, atol=0)
    other = make_viewpoints(dataclasses.replace(options, seed=6), SIZE)
    assert not torch.equal(first.K, other.K)
    ratio = first.K[:, 0, 0] / 560.0
    assert float((ratio - 1).abs().max()) <= 0.2
    assert float((ratio - 1).abs().max()) > 0.1
    # positions stay
    torch.testing.assert_close(eyes(first.cam_from_world), eyes(plain.cam_from_world))
    # the point looked at is near the origin
    axis = first.cam_from_world[:, 2, :3]
    miss = torch.linalg.cross(axis, eyes(first.cam_from_world)).norm(dim=-1)
    assert 0.05 < float(miss.max()) <= 0.1 * 3**0.5
    rolled = make_viewpoints(ViewpointOptions(roll_jitter=30.0), SIZE).cam_from_world
    turn = rotation_angle_deg(rolled[:, :3, :3] @ plain.cam_from_world[:, :3, :3].mT)
    assert 20.0 < float(turn.max()) <= 30.0 + 1e-6


def test_distance_and_angle_jitter_move_the_camera_and_nothing_else() -> None:
    plain = make_viewpoints(ViewpointOptions(roll_jitter=5.0), SIZE)
    options = ViewpointOptions(roll_jitter=5.0, distance_jitter=0.3, angle_jitter=10.0, seed=0)
    K, poses = make_viewpoints(options, SIZE)
    torch.testing.assert_close(K, plain.K, rtol=0, atol=0)
    before, after = eyes(plain.cam_from_world), eyes(poses)
    ratio = after.norm(dim=-1) / 2.0
    assert 0.7 <= float(ratio.min()) < 0.8
    assert 1.2 < float(ratio.max()) <= 1.3
    cosine = torch.nn.functional.cosine_similarity(before, after)
    angle = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
    assert 8.0 < float(angle.max()) <= 10.0 + 1e-6
    # in every direction: up and down, and to both sides
    moved = (after / after.norm(dim=-1, keepdim=True) - before / 2.0)[:, 1]
    assert 10 < int((moved > 0).sum()) < 32
    # still looking at the origin, with the same roll as before
    torch.testing.assert_close(poses[:, :2, 3], torch.zeros(42, 2).double())
    one = make_viewpoints(dataclasses.replace(options, angle_jitter=0.0), SIZE)
    torch.testing.assert_close(eyes(one.cam_from_world).norm(dim=-1), after.norm(dim=-1))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"count": 0}, "views"),
        ({"distance": 0.5}, "distance"),
        ({"distance_jitter": 1.0}, "distance_jitter"),
        ({"distance_jitter": 0.6}, "distance_jitter = 0.6 at distance = 2.0"),
        ({"angle_jitter": 50.0}, "angle_jitter"),
        ({"distance": float("nan")}, "distance"),
        ({"elevation": (50.0, 10.0)}, "elevation"),
        ({"fov": 200.0}, "fov"),
        ({"focal_jitter": 1.0}, "focal_jitter"),
        ({"look_at_jitter": 2.0}, "look_at_jitter"),
        ({"roll_jitter": -1.0}, "roll_jitter"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_options_are_named(wrong: dict[str, Any], name: str) -> None:
    with pytest.raises(RenderError, match=name):
        ViewpointOptions(**wrong)
