"""Grasps carried to the same object in another pose, and to one of its family."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.procedural import make_object
from equifeat.data.object_views import View
from equifeat.downstream.grasp import GraspOptions, GraspTransfer, gripper_points
from equifeat.downstream.point_cloud import FuseOptions, PointDescriptors, cloud_of_views
from equifeat.errors import RecipeError, ViewsError
from equifeat.eval.controls import CoordinateOracle, RandomFeatures
from equifeat.geometry.camera import invert, transform
from equifeat.metrics.pose import rotation_error_deg
from tests.downstream.scenes import dinov2, render, ring, stretched

STRETCH = (0.9, 1.1, 1.0)
FEW = GraspOptions(candidates=400, starts=6, steps=60)


def moved() -> Tensor:
    """world1_from_world0: the object was turned by 100 degrees and moved."""
    out, angle = torch.eye(4, dtype=torch.float64), math.radians(100.0)
    out[0, 0], out[0, 2] = math.cos(angle), math.sin(angle)
    out[2, 0], out[2, 2] = -math.sin(angle), math.cos(angle)
    out[:3, 3] = torch.tensor([0.1, 0.05, -0.2])
    return out


@cache
def scene(painted: bool, target: bool, other: bool = False) -> list[View]:
    """Five views of the demonstration, or of the target in its own pose and from elsewhere."""
    mesh = make_object(5)
    if not target:
        return render(mesh, ring(range(0, 360, 72), 30.0), painted)
    mesh = stretched(mesh, STRETCH) if other else mesh
    views = render(mesh, ring(range(25, 385, 72), 36.0), painted)
    to_world1 = invert(moved())
    return [v._replace(cam_from_world=v.cam_from_world @ to_world1) for v in views]


def described(model: Any, views: list[View]) -> PointDescriptors:
    points = cloud_of_views(views, 0.025)
    return PointDescriptors.from_views(model, points, views, FuseOptions(resolution=16))


def grasp(points: Tensor) -> Tensor:
    """world_from_gripper at the object's rightmost point, approaching its middle."""
    anchor = points[points[:, 0].argmax()]
    z = -anchor / anchor.norm()
    x = torch.linalg.cross(z, torch.tensor([0.3, 0.1, 0.9]).double())
    x = x / x.norm()
    out = torch.eye(4, dtype=torch.float64)
    out[:3, :3] = torch.stack([x, torch.linalg.cross(z, x), z], dim=1)
    out[:3, 3] = anchor
    return out


def errors(model: Any, painted: bool, other: bool = False) -> tuple[float, float]:
    """Degrees and object units between the found pose and the true one."""
    demo = described(model, scene(painted, False))
    target = described(model, scene(painted, True, other))
    cloud = cloud_of_views(scene(True, False), 0.025)
    pose = grasp(cloud)
    found = GraspTransfer(demo, pose, gripper_points((0.4, 0.2, 0.3), 80)).to(target, FEW)
    true = moved() @ pose
    if other:
        true[:3, 3] = transform(moved(), (pose[:3, 3] * torch.tensor(STRETCH).double())[None])[0]
    pose = found.world_from_gripper
    return float(rotation_error_deg(pose, true)), float((pose - true)[:3, 3].norm())


def test_oracle_finds_the_grasp_again() -> None:
    degrees, apart = errors(CoordinateOracle(width=0.2), True)
    assert degrees < 5.0
    assert apart < 0.02


def test_dinov2_finds_it_and_random_features_do_not() -> None:
    degrees, apart = errors(dinov2(), False)
    assert degrees < 12.0
    assert apart < 0.06
    degrees, apart = errors(RandomFeatures(), False)
    assert degrees > 30.0 or apart > 0.2


def test_dinov2_finds_it_on_another_object_of_the_family() -> None:
    degrees, apart = errors(dinov2(), False, True)
    assert degrees < 25.0
    assert apart < 0.12


@cache
def ball(seed: int = 0) -> PointDescriptors:
    """A bumpy ball whose descriptors say where each point is; a seed draws other points."""
    points = torch.randn(1500, 3, generator=torch.Generator().manual_seed(seed)).double()
    points = points / points.norm(dim=1, keepdim=True)
    points = points * (0.4 + 0.1 * torch.sin(4 * points[:, :1]) * torch.cos(3 * points[:, 1:2]))
    phase = points @ (5 * torch.randn(3, 32, generator=torch.Generator().manual_seed(9)).double())
    return PointDescriptors(points, torch.cat([phase.cos(), phase.sin()], 1), torch.ones(1500))


def test_the_energy_is_low_where_the_demonstration_was() -> None:
    pose = grasp(ball().points)
    carried = GraspTransfer(ball(), pose, gripper_points((0.4, 0.2, 0.3), 60))
    offsets = torch.tensor([0.0, 0.02, 0.1, 0.3])
    poses = pose.repeat(4, 1, 1)
    poses[:, 1, 3] += offsets
    energies = carried.energy(ball(), poses)
    assert (energies.diff() > 0).all()
    assert energies[0] < 0.1
    poses.requires_grad_()
    carried.energy(ball(), poses).sum().backward()  # type: ignore[no-untyped-call]
    assert poses.grad is not None
    assert poses.grad[1:, 1, 3].min() > 0
    # without the weight of distances, floating away costs less
    away = pose.clone()
    away[:3, 3] -= 0.5 * pose[:3, 2]
    with_distance = carried.energy(ball(), away[None])
    assert with_distance > carried.energy(ball(), away[None], 0.0) + 0.5


def test_steps_improve_starts_and_a_seed_repeats() -> None:
    pose = grasp(ball().points)
    carried = GraspTransfer(ball(), pose, gripper_points((0.4, 0.2, 0.3), 60))
    options = GraspOptions(candidates=60, starts=8, steps=40)
    start = carried.to(ball(1), replace(options, steps=0))
    end = carried.to(ball(1), options)
    assert end.energy < start.energy
    assert end.all_energies.shape == (8,)
    assert (end.all_energies.diff() >= 0).all()
    assert torch.equal(end.all_poses[0], end.world_from_gripper)
    R = end.all_poses[:, :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).double().expand(8, 3, 3))
    assert (torch.linalg.det(R) > 0).all()
    again = carried.to(ball(1), options)
    assert torch.equal(again.world_from_gripper, end.world_from_gripper)


def test_gripper_points_fill_their_box() -> None:
    points = gripper_points((0.2, 0.1, 0.4), 256)
    assert points.shape == (256, 3)
    assert (points.abs() <= torch.tensor([0.1, 0.05, 0.2])).all()
    assert (points.abs().amax(dim=0) > torch.tensor([0.095, 0.047, 0.19])).all()
    assert points.mean(dim=0).abs().max() < 0.01


def test_bad_input_is_one_sentence() -> None:
    pose, points = grasp(ball().points), gripper_points((0.4, 0.2, 0.3), 10)
    with pytest.raises(ViewsError, match="world_from_gripper must be"):
        GraspTransfer(ball(), 2 * pose, points)
    with pytest.raises(ViewsError, match=r"\(P, 3\)"):
        GraspTransfer(ball(), pose, points[:, :2])
    other = PointDescriptors(ball().points, torch.ones(1500, 5), torch.ones(1500))
    with pytest.raises(ViewsError, match="64 channels, the target of 5"):
        GraspTransfer(ball(), pose, points).to(other)
    with pytest.raises(RecipeError, match="starts=9"):
        GraspOptions(candidates=5, starts=9)
    with pytest.raises(RecipeError, match="size_xyz"):
        gripper_points((0.1, 0.0, 0.1))
