"""Pose errors against loops that follow the definitions word by word."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from equifeat.metrics.bop import (
    FRACTIONS,
    PIXELS,
    add,
    adds,
    localized,
    mspd,
    mssd,
    symmetry_transforms,
    vsd,
)
from equifeat.seeding import torch_generator

K = torch.tensor([[110.0, 0, 20.3], [0, 112.0, 15.1], [0, 0, 1]], dtype=torch.float64)
POINTS = 40.0 * torch.randn(25, 3, generator=torch_generator(3), dtype=torch.float64)
NO_SYMMETRY = symmetry_transforms(torch.zeros(0, 4, 4), ())


def pose(seed: int, angle: float = 0.3) -> Tensor:
    generator = torch_generator(seed)
    axis = torch.nn.functional.normalize(
        torch.randn(3, generator=generator, dtype=torch.float64), dim=0
    )
    x, y, z = axis.tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    out = torch.eye(4, dtype=torch.float64)
    out[:3, :3] = torch.linalg.matrix_exp(angle * cross)
    shift = torch.randn(3, generator=generator, dtype=torch.float64) * 10
    out[:3, 3] = shift + torch.tensor([0, 0, 400.0])
    return out


def moved(T: Tensor, p: list[float]) -> list[float]:
    return [sum(T[i, j].item() * p[j] for j in range(3)) + T[i, 3].item() for i in range(3)]


def pixel(p: list[float]) -> tuple[float, float]:
    return (
        K[0, 0].item() * p[0] / p[2] + K[0, 2].item(),
        K[1, 1].item() * p[1] / p[2] + K[1, 2].item(),
    )


def test_thresholds_are_the_toolkits() -> None:
    assert list(FRACTIONS) == list(np.arange(0.05, 0.51, 0.05))
    assert list(PIXELS) == list(np.arange(5, 51, 5))
    assert len(FRACTIONS) == len(PIXELS) == 10


def test_surface_and_projection_distance_by_loops() -> None:
    flip = torch.diag(torch.tensor([-1.0, -1, 1, 1])).double()
    symmetries = symmetry_transforms(flip[None], ())
    estimate, true = pose(1), pose(2) @ flip
    surface, projection = [], []
    for S in symmetries:
        apart, pixels = [], []
        for p in POINTS.tolist():
            a, b = moved(estimate, p), moved(true @ S, p)
            apart.append(math.dist(a, b))
            pixels.append(math.dist(pixel(a), pixel(b)))
        surface.append(max(apart))
        projection.append(max(pixels))
    assert mssd(estimate, true, POINTS, symmetries) == pytest.approx(min(surface), rel=1e-12)
    assert mspd(estimate, true, POINTS, symmetries, K) == pytest.approx(min(projection), rel=1e-12)
    assert min(surface) < max(surface)


def test_average_distances_by_loops() -> None:
    estimate, true = pose(4), pose(5)
    a = [moved(estimate, p) for p in POINTS.tolist()]
    b = [moved(true, p) for p in POINTS.tolist()]
    mean = sum(map(math.dist, a, b)) / len(a)
    nearest = sum(min(math.dist(q, p) for p in a) for q in b) / len(b)
    assert add(estimate, true, POINTS) == pytest.approx(mean, rel=1e-12)
    assert adds(estimate, true, POINTS) == pytest.approx(nearest, rel=1e-9)
    assert nearest < mean


def test_a_continuous_symmetry_makes_turned_poses_equal() -> None:
    axis, point = [0.0, 2.0, 0.0], [5.0, 0.0, -3.0]
    flip = torch.diag(torch.tensor([1.0, -1, -1, 1])).double()
    symmetries = symmetry_transforms(flip[None], [(axis, point)])
    steps = math.ceil(math.pi / 0.01)
    assert len(symmetries) == 2 * steps
    assert torch.equal(symmetries[0], torch.eye(4).double())
    # rigid, and points on the axis stay where they are
    R = symmetries[:, :3, :3]
    assert torch.allclose(R @ R.mT, torch.eye(3).double().expand_as(R))
    on_axis = torch.tensor([5.0, 7.0, -3.0, 1.0]).double()
    assert torch.allclose(symmetries[:steps] @ on_axis, on_axis)
    # turning by a step is right-handed: x goes to -z
    turned = symmetries[1, :3, :3] @ torch.tensor([1.0, 0, 0]).double()
    angle = 2 * math.pi / steps
    assert torch.allclose(turned, torch.tensor([math.cos(angle), 0, -math.sin(angle)]).double())
    true = pose(6)
    assert mssd(true @ symmetries[100], true, POINTS, symmetries) < 1e-9
    assert mssd(true @ symmetries[100], true, POINTS, NO_SYMMETRY) > 1.0


def loop_vsd(
    estimate: Tensor, true: Tensor, scene: Tensor, diameter: float, delta: float
) -> list[float]:
    """The definition, a pixel at a time (bop_toolkit: pose_error.vsd, visibility, bop19)."""
    rows = []
    for y in range(estimate.shape[0]):
        for x in range(estimate.shape[1]):
            ray = ((x - K[0, 2].item()) / K[0, 0].item(), (y - K[1, 2].item()) / K[1, 1].item(), 1)
            e, t, s = (
                math.hypot(*(r * d[y, x].item() for r in ray)) for d in (estimate, true, scene)
            )
            see_t = t > 0 and (s == 0 or t - s <= delta)
            see_e = e > 0 and (s == 0 or e - s <= delta or see_t)
            rows.append((see_t, see_e, abs(t - e) / diameter))
    union = sum(a or b for a, b, _ in rows)
    return [
        1.0
        if not union
        else sum((a or b) and not (a and b and d < tau) for a, b, d in rows) / union
        for tau in FRACTIONS
    ]


def test_visible_surface_discrepancy_by_loops() -> None:
    generator = torch_generator(8)
    shape = (30, 40)

    def blob(x: float, y: float, r: float, z: float) -> Tensor:
        yy, xx = torch.meshgrid(torch.arange(30.0), torch.arange(40.0), indexing="ij")
        bumps = 6 * torch.randn(shape, generator=generator)
        return torch.where((xx - x) ** 2 + (yy - y) ** 2 < r * r, z + bumps, 0.0).double()

    true, estimate = blob(18, 14, 9, 400.0), blob(20, 15, 9, 404.0)
    occluder = blob(12, 12, 6, 300.0)
    scene = torch.where(occluder > 0, occluder, torch.where(true > 0, true, 470.0))
    scene[torch.rand(shape, generator=generator) < 0.1] = 0.0
    for delta in (15.0, 5.0):
        got = vsd(estimate, true, scene, K, 60.0, delta=delta)
        assert got.tolist() == pytest.approx(loop_vsd(estimate, true, scene, 60.0, delta))
        assert 0.1 < float(got.mean()) < 0.9
    assert vsd(true, true, scene, K, 60.0).tolist() == [0.0] * 10
    assert vsd(estimate * 0, true, scene, K, 60.0).tolist() == [1.0] * 10
    assert vsd(estimate * 0, true * 0, scene, K, 60.0).tolist() == [1.0] * 10


def test_matching_is_greedy_by_score() -> None:
    # the surest estimate takes the pose that is nearest to it; the other finds the rest
    errors = torch.tensor([[0.30, 0.20], [0.10, 0.04], [0.01, 0.02]])
    scores = torch.tensor([9.0, 5.0, 1.0])
    assert localized(errors, scores, 0.25).tolist() == [True, True]
    assert localized(errors, scores, 0.05).tolist() == [True, True]
    assert localized(errors[:1], scores[:1], 0.25).tolist() == [False, True]
    assert localized(errors[:1], scores[:1], 0.2).tolist() == [False, False], "strictly below"
    assert localized(errors[:0], scores[:0], 0.5).tolist() == [False, False]
    assert localized(torch.full((1, 1), math.inf), scores[:1], 0.5).tolist() == [False]


def test_a_pose_behind_the_camera_is_an_error_not_a_crash() -> None:
    behind = pose(1).clone()
    behind[2, 3] = 0.0
    assert mspd(behind, pose(1), POINTS, NO_SYMMETRY, K) > 50
