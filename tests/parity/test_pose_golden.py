"""Pose errors against numbers of the reference implementation (tests/golden)."""

from __future__ import annotations

import numpy as np
import torch

from equifeat.metrics.pose import rotation_error_deg, translation_error_cm
from tests.helpers import GOLDEN


def test_pose_errors_match_the_reference() -> None:
    with np.load(GOLDEN / "geometry.npz", allow_pickle=False) as file:
        names = ("pose_pred", "pose_gt", "pose_error_deg_cm")
        found, true, golden = (torch.from_numpy(file[name]) for name in names)
    ours = torch.stack([rotation_error_deg(found, true), translation_error_cm(found, true)], dim=1)
    # its arccos gives 1.7e-6 degrees for equal rotations
    assert torch.allclose(ours, golden, rtol=1e-5, atol=1e-5)
    assert golden[:, 0].max() > 100
    assert golden[0].max() < 1e-5
