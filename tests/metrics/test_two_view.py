"""Errors of poses and homographies against SciPy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from equifeat.metrics.two_view import homography_corner_error, relative_pose_error, warp


def pose(rotation: Rotation, t: list[float]) -> torch.Tensor:
    out = torch.eye(4, dtype=torch.float64)
    out[:3, :3], out[:3, 3] = torch.tensor(rotation.as_matrix()), torch.tensor(t)
    return out


@pytest.mark.parametrize("degrees", [0.0, 1e-6, 3.0, 90.0, 179.0])
def test_rotation_error_is_the_angle(degrees: float) -> None:
    base = Rotation.random(random_state=1)
    turn = Rotation.from_rotvec(math.radians(degrees) * np.array([0.6, 0.0, 0.8]))
    found = relative_pose_error(pose(turn * base, [0, 0, 1]), pose(base, [0, 0, 5]))
    assert found[0] == pytest.approx(degrees, abs=1e-9)
    assert found[1] == 0.0


def test_sign_of_the_translation() -> None:
    none = Rotation.identity()
    angle = math.radians(170.0)
    t = [math.sin(angle), 0.0, math.cos(angle)]
    estimate, truth = pose(none, t), pose(none, [0, 0, 2])
    assert relative_pose_error(estimate, truth)[1] == pytest.approx(10.0)
    assert relative_pose_error(estimate, truth, "signed")[1] == pytest.approx(170.0)
    assert relative_pose_error(estimate, pose(none, [0, 0, 0])) == (0.0, 0.0)


def test_corner_error_of_a_shift_and_of_any_scale() -> None:
    shift = torch.eye(3, dtype=torch.float64)
    shift[:2, 2] = torch.tensor([3.0, 4.0])
    same = torch.eye(3, dtype=torch.float64)
    assert homography_corner_error(-7.0 * shift, same, (20, 30)) == pytest.approx(5.0)


def test_warp_against_a_loop_and_behind_the_horizon() -> None:
    H = torch.tensor([[1.0, 0.2, 3.0], [-0.1, 0.9, 2.0], [1e-3, 2e-3, 1.0]], dtype=torch.float64)
    xy = torch.rand(9, 2, dtype=torch.float64) * 50
    for (x, y), (u, v) in zip(xy.tolist(), warp(H, xy).tolist(), strict=True):
        w = H[2, 0] * x + H[2, 1] * y + H[2, 2]
        assert u == pytest.approx(float((H[0, 0] * x + H[0, 1] * y + H[0, 2]) / w))
        assert v == pytest.approx(float((H[1, 0] * x + H[1, 1] * y + H[1, 2]) / w))
    horizon = torch.eye(3, dtype=torch.float64)
    horizon[2, 0] = -0.06
    # x = 20 lies behind the horizon x = 16.7
    found = warp(horizon, torch.tensor([[0.0, 0.0], [20.0, 0.0]], dtype=torch.float64))
    assert bool(found[0].isfinite().all())
    assert bool(found[1].isinf().all())
    assert homography_corner_error(horizon, torch.eye(3).double(), (20, 30)) == math.inf
