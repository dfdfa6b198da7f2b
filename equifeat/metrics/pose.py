"""Errors of estimated object poses: degrees, centimetres, and the share of poses within both.

As OnePose++ (query_pose_error in src/utils/metric_utils.py of github.com/zju3dv/OnePose_Plus_Plus)
and the reference count them.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from equifeat.geometry.camera import rotation_angle_deg

_CM_PER_M = 100.0


def rotation_error_deg(
    cam_from_estimate: Float[Tensor, "*b 4 4"], cam_from_object: Float[Tensor, "*b 4 4"]
) -> Float[Tensor, "*b"]:
    """Return the angle between two rotations: that of R_estimate R_objectᵀ.

    Args:
        cam_from_estimate: (..., 4, 4) estimated poses.
        cam_from_object: (..., 4, 4) true poses.

    Returns:
        Degrees, 0 to 180, float64.
    """
    estimate, true = cam_from_estimate[..., :3, :3].double(), cam_from_object[..., :3, :3].double()
    return rotation_angle_deg(estimate @ true.mT)


def translation_error_cm(
    cam_from_estimate: Float[Tensor, "*b 4 4"], cam_from_object: Float[Tensor, "*b 4 4"]
) -> Float[Tensor, "*b"]:
    """Return the distance of two positions of the object's origin in the camera.

    Args:
        cam_from_estimate: (..., 4, 4) estimated poses in metres.
        cam_from_object: (..., 4, 4) true poses in metres.

    Returns:
        Centimetres, float64.
    """
    apart = cam_from_estimate[..., :3, 3].double() - cam_from_object[..., :3, 3].double()
    cm: Tensor = _CM_PER_M * apart.norm(dim=-1)
    return cm


def within_cm_deg(
    rotation_deg: Float[Tensor, "*b"], translation_cm: Float[Tensor, "*b"], k: float
) -> Bool[Tensor, "*b"]:
    """Return which poses are off by less than k degrees and less than k centimetres.

    Args:
        rotation_deg: Rotation errors, degrees.
        translation_cm: Translation errors, centimetres.
        k: The threshold of both.

    Returns:
        Booleans; their mean is the accuracy "k cm k deg".
    """
    return (rotation_deg < k) & (translation_cm < k)
