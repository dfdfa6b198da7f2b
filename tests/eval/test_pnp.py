"""PnP in RANSAC: wrong matches, degenerate ones, seeds."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch

from equifeat.errors import RecipeError
from equifeat.eval.pnp import estimate_pose
from equifeat.geometry.camera import Camera, look_at, transform
from equifeat.metrics.pose import rotation_error_deg


def scene(wrong: float, unit: float = 1.0) -> tuple[Any, Any, Camera, Any]:
    """Points, pixels of which a share is wrong, camera, pose."""
    rng = np.random.default_rng(5)
    points = torch.from_numpy(rng.uniform(-0.1, 0.1, (300, 3))) * unit + 3.0 * unit
    middle = torch.full((3,), 3.0 * unit, dtype=torch.float64)
    eye = middle + unit * torch.tensor([0.3, 0.2, 0.4]).double()
    pose = look_at(eye, middle, torch.tensor([0.0, 0.0, 1.0]).double())
    K = torch.tensor([[600.0, 0, 330], [0, 610, 235], [0, 0, 1]]).double()
    camera = Camera(K, (480, 640))
    xy = camera.project(transform(pose, points))
    bad = torch.from_numpy(rng.random(300) < wrong)
    xy[bad] = torch.from_numpy(rng.uniform(0, 480, (int(bad.sum()), 2)))
    return points, xy, camera, pose


@pytest.mark.parametrize("method", ["epnp", "poselib"])
@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_pnp_finds_the_pose_among_wrong_matches(
    method: Literal["epnp", "poselib"], unit: float
) -> None:
    """In metres and millimetres alike."""
    points, xy, camera, pose = scene(0.5, unit)
    found = estimate_pose(points, xy, camera, threshold_px=2.0, seed=0, method=method)
    assert found.ok
    assert found.cam_from_object.dtype == torch.float64
    assert rotation_error_deg(found.cam_from_object, pose) < 0.3
    assert (found.cam_from_object - pose)[:3, 3].norm() < 3e-3 * unit
    right = (camera.project(transform(pose, points)) - xy).norm(dim=1) < 1e-6
    assert bool(found.inliers[right].all())
    assert int(found.inliers.sum()) < 1.05 * int(right.sum())
    same = estimate_pose(points, xy, camera, threshold_px=2.0, seed=0, method=method)
    assert torch.equal(same.cam_from_object, found.cam_from_object)


@pytest.mark.parametrize("method", ["epnp", "poselib"])
def test_pnp_without_a_pose_is_the_identity(method: Literal["epnp", "poselib"]) -> None:
    points, xy, camera, _ = scene(0.0)
    wrong = xy[torch.randperm(len(xy), generator=torch.Generator().manual_seed(0))]
    line = torch.linspace(0, 1, 20).double()[:, None] * torch.ones(3).double()
    for world, pixels in (
        (points[:5], xy[:5]),
        (points[:0], xy[:0]),
        (points[:1].expand(10, 3), xy[:10]),
        (points[:8], wrong[:8]),
        (line, xy[:20]),
    ):
        found = estimate_pose(
            world, pixels, camera, threshold_px=0.5, iterations=50, seed=0, method=method
        )
        assert not found.ok
        assert torch.equal(found.cam_from_object, torch.eye(4, dtype=torch.float64))
        assert found.inliers.shape == (len(world),)
        assert not found.inliers.any()


def test_pnp_uses_its_seed_and_refuses_nonsense() -> None:
    points, xy, camera, _ = scene(0.7)
    noisy = xy + 2.0 * torch.sin(points[:, :2] * 997)
    found = [estimate_pose(points, noisy, camera, iterations=300, seed=s) for s in range(3)]
    assert len({tuple(one.cam_from_object.flatten().tolist()) for one in found}) > 1
    for bad in ({"threshold_px": 0.0}, {"iterations": 0}, {"min_inliers": 3}):
        options: dict[str, Any] = dict(bad)
        with pytest.raises(RecipeError, match="must be"):
            estimate_pose(points, xy, camera, seed=0, **options)
