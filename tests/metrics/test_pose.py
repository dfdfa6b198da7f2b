"""Pose errors against scipy and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from equifeat.metrics.pose import rotation_error_deg, translation_error_cm, within_cm_deg


def poses(count: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    out = np.tile(np.eye(4), (count, 1, 1))
    out[:, :3, :3] = Rotation.random(count, random_state=seed).as_matrix()
    out[:, :3, 3] = rng.normal(size=(count, 3))
    return torch.from_numpy(out)


def test_errors_match_scipy_and_loops() -> None:
    estimate, true = poses(40, 0), poses(40, 1)
    degrees, cm = rotation_error_deg(estimate, true), translation_error_cm(estimate, true)
    for i in range(40):
        a, b = estimate[i].numpy(), true[i].numpy()
        turn = Rotation.from_matrix(a[:3, :3]) * Rotation.from_matrix(b[:3, :3]).inv()
        assert degrees[i].item() == pytest.approx(math.degrees(turn.magnitude()), abs=1e-9)
        apart = math.sqrt(sum((a[k, 3] - b[k, 3]) ** 2 for k in range(3)))
        assert cm[i].item() == pytest.approx(100.0 * apart, rel=1e-12)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 0.5, 5.0, 90.0, 179.999999, 180.0])
def test_angles_are_exact_near_their_ends(angle: float) -> None:
    """Where arccos of the trace loses digits."""
    true = poses(1, 2)[0]
    estimate = true.clone()
    axis = np.array([0.36, -0.48, 0.8])
    turn = Rotation.from_rotvec(math.radians(angle) * axis).as_matrix()
    estimate[:3, :3] = torch.from_numpy(turn) @ true[:3, :3]
    assert rotation_error_deg(estimate, true).item() == pytest.approx(angle, abs=1e-7)


def test_both_errors_must_be_below() -> None:
    degrees = torch.tensor([0.9, 0.9, 1.0, 0.0, 5.0])
    cm = torch.tensor([0.9, 1.0, 0.9, 0.0, 0.0])
    assert within_cm_deg(degrees, cm, 1).tolist() == [True, False, False, True, False]
    assert within_cm_deg(degrees, cm, 5).tolist() == [True, True, True, True, False]
    assert not within_cm_deg(torch.tensor(float("nan")), torch.tensor(0.0), 5)
