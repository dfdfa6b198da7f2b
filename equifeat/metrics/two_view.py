"""Errors of two-view geometry: relative poses and homographies."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.geometry.camera import rotation_angle_deg
from equifeat.geometry.pixels import SizeHW

Sign = Literal["either", "signed"]


def relative_pose_error(
    estimate: Float[Tensor, "4 4"], truth: Float[Tensor, "4 4"], sign: Sign = "either"
) -> tuple[float, float]:
    """Return the errors of a relative pose that is known up to the length of its translation.

    As SuperGlue's compute_pose_error (github.com/magicleap/SuperGluePretrainedNetwork,
    models/utils.py), with angles by atan2, so that small ones stay exact.

    Args:
        estimate: (4, 4) cam1_from_cam0.
        truth: (4, 4) cam1_from_cam0.
        sign: "either" takes the smaller angle of t and -t, as published numbers do, because an
            essential matrix leaves the sign open; "signed" does not.

    Returns:
        Angle between the rotations and angle between the directions of translation, in degrees.
        Where the truth has no translation there is no direction: the second is 0.
    """
    R = estimate[:3, :3].double() @ truth[:3, :3].double().mT
    rotation = float(rotation_angle_deg(R))
    t0, t1 = estimate[:3, 3].double(), truth[:3, 3].double()
    if float(t1.norm()) == 0.0:
        return rotation, 0.0
    cross = torch.linalg.cross(t0, t1).norm()
    angle = float(torch.rad2deg(torch.atan2(cross, t0 @ t1)))
    return rotation, min(angle, 180.0 - angle) if sign == "either" else angle


def warp(H: Float[Tensor, "3 3"], xy: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
    """Carry points by a homography.

    Args:
        H: (3, 3), for points in the corner convention.
        xy: (N, 2) points.

    Returns:
        (N, 2) points; infinite where the homography sends them to infinity or behind it.
    """
    out = torch.cat([xy, torch.ones_like(xy[:, :1])], dim=1) @ H.to(xy).mT
    # H is known up to its sign: in front is where the middle of the points lies
    middle = torch.cat([xy.mean(dim=0), xy.new_ones(1)]) @ H.to(xy).mT
    w = out[:, 2:] * torch.sign(middle[2])
    return torch.where(w > 0, out[:, :2] / out[:, 2:], torch.inf)


def homography_corner_error(
    estimate: Float[Tensor, "3 3"], truth: Float[Tensor, "3 3"], size_hw: SizeHW
) -> float:
    """Return the mean distance of an image's four corners under two homographies.

    As in DeTone et al., SuperPoint, CVPRW 2018, section 7.3, and glue-factory
    (github.com/cvg/glue-factory, geometry/homography.py); here the corners are the image's own,
    (0, 0) to (W, H).

    Args:
        estimate: (3, 3).
        truth: (3, 3).
        size_hw: Height and width of image 0.

    Returns:
        Pixels of image 1; infinite when the estimate sends a corner to infinity.
    """
    h, w = size_hw
    corners = torch.tensor([[0, 0], [w, 0], [w, h], [0, h]], dtype=torch.float64)
    error = (warp(estimate.double(), corners) - warp(truth.double(), corners)).norm(dim=1)
    return float(error.nan_to_num(torch.inf).mean())
