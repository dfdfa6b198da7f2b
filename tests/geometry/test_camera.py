from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equifeat.geometry.camera import (
    Camera,
    invert,
    look_at,
    opencv_from_opengl,
    opengl_from_opencv,
    relative,
    rotation_angle_deg,
    transform,
)

finite = st.floats(-3.0, 3.0, allow_nan=False)


@settings(deadline=None, max_examples=50)
@given(st.tuples(finite, finite, st.floats(0.1, 9.0)), st.floats(50.0, 2000.0))
def test_project_then_unproject_is_the_identity(p: tuple[float, float, float], f: float) -> None:
    camera = Camera(Camera.from_focal(f, (480, 640)).K.double(), (480, 640))
    point = torch.tensor([p], dtype=torch.float64)
    back = camera.unproject(camera.project(point), point[:, 2])
    assert torch.allclose(back, point, atol=1e-9)


def test_projection_behind_the_camera_is_nan() -> None:
    camera = Camera.from_focal(100.0, (10, 10))
    assert camera.project(torch.tensor([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])).isnan().all()


def test_projection_has_gradients() -> None:
    camera = Camera(Camera.from_focal(100.0, (10, 10)).K.double(), (10, 10))
    points = torch.tensor([[0.1, -0.2, 2.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(camera.project, (points,))


def test_resized_camera_sees_the_same_point() -> None:
    camera = Camera.from_focal(560.0, (512, 384))
    point = torch.tensor([[0.1, 0.2, 2.0]])
    small = camera.resized((256, 96))
    assert torch.allclose(small.project(point), camera.project(point) * torch.tensor([0.25, 0.5]))


@pytest.mark.parametrize("up", [(0.0, 0.0, 1.0), (0.0, 1.0, 0.0)])
def test_look_at_puts_the_target_on_the_axis_and_up_upwards(up: tuple[float, ...]) -> None:
    eye = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 2.0], [0.0, 2.0, 0.0], [0.0, -3.0, 0.0]])
    pose = look_at(eye, torch.zeros(3), torch.tensor(up))
    at = transform(pose, torch.zeros(4, 1, 3))[:, 0]
    assert torch.allclose(at[:, :2], torch.zeros(4, 2), atol=1e-6)
    assert torch.allclose(at[:, 2], eye.norm(dim=-1))
    assert torch.allclose(torch.linalg.det(pose[:, :3, :3]), torch.ones(4))
    # A point a little along `up` appears higher, that is at smaller y.
    above = transform(pose, torch.tensor(up).mul(0.1).expand(4, 1, 3))[:, 0]
    assert (above[:, 1] <= 1e-6).all()
    assert above[0, 1] < -0.04


def test_opengl_round_trip_and_axes() -> None:
    pose = look_at(torch.tensor([1.0, 2.0, 0.5]), torch.zeros(3), torch.tensor([0.0, 0.0, 1.0]))
    gl = opengl_from_opencv(pose)
    assert torch.allclose(opencv_from_opengl(gl), pose, atol=1e-6)
    # The OpenGL pose's column 2 points backwards, away from what is seen; its origin is the eye.
    assert torch.allclose(gl[:3, 3], torch.tensor([1.0, 2.0, 0.5]), atol=1e-6)
    assert float(gl[:3, 2] @ gl[:3, 3]) > 0


@pytest.mark.parametrize("degrees", [0.0, 1e-3, 15.0, 90.0, 179.9, 180.0])
def test_rotation_angle(degrees: float) -> None:
    a = math.radians(degrees)
    R = torch.tensor(
        [[math.cos(a), -math.sin(a), 0.0], [math.sin(a), math.cos(a), 0.0], [0.0, 0.0, 1.0]],
        dtype=torch.float64,
    )
    assert float(rotation_angle_deg(R)) == pytest.approx(degrees, abs=1e-6)


def test_relative_transform_chains() -> None:
    eyes = torch.tensor([[1.0, 2.0, 0.5], [-1.0, 1.0, 0.3]])
    poses = look_at(eyes, torch.zeros(3), torch.tensor([0.0, 0.0, 1.0]))
    world = torch.rand(7, 3)
    cam0, cam1 = transform(poses[0], world), transform(poses[1], world)
    assert torch.allclose(transform(relative(poses[0], poses[1]), cam0), cam1, atol=1e-6)
    assert torch.allclose(invert(poses) @ poses, torch.eye(4).expand(2, 4, 4), atol=1e-6)
