"""Errors of 6D object poses as BOP scores them: VSD, MSSD, MSPD, average recall; ADD and ADD-S.

Definitions: Hodan et al., "BOP Challenge 2020 on 6D Object Localization", section 2.2; constants
and details (strict "<", float32 visibility test, missing depth counts as visible, greedy matching)
as in https://github.com/thodan/bop_toolkit, scripts/eval_bop19_pose.py. ADD, ADD-S: Hinterstoisser
et al., ACCV 2012. The unit of length is that of the points, millimetres in BOP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from equifeat.geometry.camera import transform

# 5 % to 50 %: of the diameter for MSSD and VSD's tau, of pixels for VSD itself.
FRACTIONS: tuple[float, ...] = tuple(np.arange(0.05, 0.51, 0.05).tolist())
# MSPD, in pixels of an image 640 px wide.
PIXELS: tuple[float, ...] = tuple(np.arange(5.0, 51.0, 5.0).tolist())
# Points of all symmetries held at once.
_POINTS_AT_ONCE = 2**20
_DISTANCES_AT_ONCE = 2**24


def symmetry_transforms(
    discrete: Float[Tensor, "d 4 4"],
    continuous: Sequence[tuple[Sequence[float], Sequence[float]]],
    max_step: float = 0.01,
) -> Float[Tensor, "s 4 4"]:
    """Return the rigid transforms that leave a model as it is, rotations about axes in steps.

    Args:
        discrete: (D, 4, 4) without the identity.
        continuous: Direction of each axis and a point on it.
        max_step: A step moves the farthest vertex by at most this share of the diameter.

    Returns:
        (S, 4, 4) float64, the identity first.
    """
    identity = torch.eye(4, dtype=torch.float64)
    fixed = torch.cat([identity[None], discrete.double()])
    if not continuous:
        return fixed
    steps = math.ceil(math.pi / max_step)
    angles = torch.arange(steps, dtype=torch.float64) * (2.0 * math.pi / steps)
    turns = torch.cat([_about(axis, point, angles) for axis, point in continuous])
    return (turns[None] @ fixed[:, None]).reshape(-1, 4, 4)


def mssd(
    cam_from_estimate: Float[Tensor, "4 4"],
    cam_from_object: Float[Tensor, "4 4"],
    points: Float[Tensor, "v 3"],
    symmetries: Float[Tensor, "s 4 4"],
) -> float:
    """Maximum symmetry-aware surface distance: the least over symmetries of the largest distance.

    Args:
        cam_from_estimate: Estimated pose.
        cam_from_object: True pose.
        points: Vertices of the model.
        symmetries: See `symmetry_transforms`.

    Returns:
        The distance, in the points' unit.
    """
    estimate = transform(cam_from_estimate.double(), points.double())
    best = math.inf
    for block in _blocks(symmetries, len(points)):
        true = transform(cam_from_object.double() @ block, points.double())
        best = min(best, float((estimate - true).norm(dim=-1).amax(dim=-1).min()))
    return best


def mspd(
    cam_from_estimate: Float[Tensor, "4 4"],
    cam_from_object: Float[Tensor, "4 4"],
    points: Float[Tensor, "v 3"],
    symmetries: Float[Tensor, "s 4 4"],
    K: Float[Tensor, "3 3"],
) -> float:
    """Maximum symmetry-aware projection distance.

    Args:
        cam_from_estimate: Estimated pose.
        cam_from_object: True pose.
        points: Vertices of the model.
        symmetries: See `symmetry_transforms`.
        K: Intrinsics; the pixel convention cancels.

    Returns:
        The distance in pixels; infinite when a projection is.
    """
    estimate = _project(transform(cam_from_estimate.double(), points.double()), K)
    best = math.inf
    for block in _blocks(symmetries, len(points)):
        true = _project(transform(cam_from_object.double() @ block, points.double()), K)
        largest = (estimate - true).norm(dim=-1).nan_to_num(math.inf).amax(dim=-1)
        best = min(best, float(largest.min()))
    return best


def add(
    cam_from_estimate: Float[Tensor, "4 4"],
    cam_from_object: Float[Tensor, "4 4"],
    points: Float[Tensor, "v 3"],
) -> float:
    """Average distance of the model's points (ADD).

    Args:
        cam_from_estimate: Estimated pose.
        cam_from_object: True pose.
        points: Vertices of the model.

    Returns:
        The mean distance, in the points' unit.
    """
    estimate = transform(cam_from_estimate.double(), points.double())
    true = transform(cam_from_object.double(), points.double())
    return float((estimate - true).norm(dim=-1).mean())


def adds(
    cam_from_estimate: Float[Tensor, "4 4"],
    cam_from_object: Float[Tensor, "4 4"],
    points: Float[Tensor, "v 3"],
) -> float:
    """Average distance to the nearest point (ADD-S, ADI), for symmetric objects.

    Args:
        cam_from_estimate: Estimated pose.
        cam_from_object: True pose.
        points: Vertices of the model.

    Returns:
        The mean over the true pose's points of the distance to the estimate's nearest.
    """
    estimate = transform(cam_from_estimate.double(), points.double())
    true = transform(cam_from_object.double(), points.double())
    rows = max(1, _DISTANCES_AT_ONCE // max(len(points), 1))
    # the matrix product's way of computing distances is off by far more than poses are
    nearest = [
        torch.cdist(true[i : i + rows], estimate, compute_mode="donot_use_mm_for_euclid_dist").amin(
            dim=1
        )
        for i in range(0, len(true), rows)
    ]
    return float(torch.cat(nearest).mean())


def vsd(
    depth_estimate: Float[Tensor, "h w"],
    depth_object: Float[Tensor, "h w"],
    depth_scene: Float[Tensor, "h w"],
    K: Float[Tensor, "3 3"],
    diameter: float,
    *,
    delta: float = 15.0,
    taus: Sequence[float] = FRACTIONS,
) -> Float[Tensor, "t"]:
    """Visible surface discrepancy, for several misalignment tolerances.

    Args:
        depth_estimate: (H, W) z-depth of the model in the estimated pose, 0 = nothing.
        depth_object: (H, W) of the model in the true pose.
        depth_scene: (H, W) of the scene, measured; 0 = unknown, and then the model is visible.
        K: Intrinsics as in the file. The toolkit turns depth into distance with whole numbers at
            pixel centres, and so does this; distances change by far less than delta.
        diameter: Of the model.
        delta: Tolerance of the visibility test, in the depth's unit.
        taus: Tolerances of the distance, as shares of the diameter.

    Returns:
        (T,) float64 errors in [0, 1].
    """
    seen = ((depth_estimate > 0) | (depth_object > 0)).nonzero()
    if not len(seen):
        return torch.ones(len(taus), dtype=torch.float64)
    y, x = seen.unbind(1)
    ray_x = (x.double() - K[0, 2].double()) / K[0, 0].double()
    ray_y = (y.double() - K[1, 2].double()) / K[1, 1].double()
    slant = (ray_x.square() + ray_y.square() + 1.0).sqrt()
    estimate, true, scene = (
        depth[y, x].double() * slant for depth in (depth_estimate, depth_object, depth_scene)
    )
    visible_true = _visible(scene, true, delta)
    visible_estimate = _visible(scene, estimate, delta) | (visible_true & (estimate > 0))
    both = visible_true & visible_estimate
    union = int((visible_true | visible_estimate).sum())
    if not union:
        return torch.ones(len(taus), dtype=torch.float64)
    apart = (true - estimate).abs()[both] / diameter
    wrong = (apart[:, None] >= torch.tensor(taus, dtype=torch.float64)).sum(dim=0)
    return (wrong + (union - int(both.sum()))).double() / union


def localized(
    errors: Float[Tensor, "e g"], scores: Float[Tensor, "e"], threshold: float
) -> Bool[Tensor, "g"]:
    """Return which true poses an estimate is matched to, greedily by descending score.

    Args:
        errors: (E, G) error of every estimate against every valid true pose of one object.
        scores: (E,) confidences.
        threshold: A match has a smaller error.

    Returns:
        (G,) whether the pose is found.
    """
    found = torch.zeros(errors.shape[1], dtype=torch.bool)
    for e in torch.argsort(scores, descending=True, stable=True).tolist():
        free = torch.where(found, torch.inf, errors[e].double())
        if len(free) and float(free.min()) < threshold:
            found[int(free.argmin())] = True
    return found


def _blocks(symmetries: Tensor, points: int) -> Iterator[Tensor]:
    count = max(1, _POINTS_AT_ONCE // max(points, 1))
    for i in range(0, len(symmetries), count):
        yield symmetries[i : i + count]


def _about(axis: Sequence[float], point: Sequence[float], angles: Tensor) -> Tensor:
    """Rotations about a line (Rodrigues' formula)."""
    n = torch.nn.functional.normalize(torch.tensor(axis, dtype=torch.float64), dim=0)
    zero = torch.zeros((), dtype=torch.float64)
    cross = torch.stack([zero, -n[2], n[1], n[2], zero, -n[0], -n[1], n[0], zero]).reshape(3, 3)
    sin, cos = angles.sin()[:, None, None], angles.cos()[:, None, None]
    R = torch.eye(3, dtype=torch.float64) + sin * cross + (1.0 - cos) * (cross @ cross)
    out = torch.eye(4, dtype=torch.float64).repeat(len(angles), 1, 1)
    out[:, :3, :3] = R
    offset = torch.tensor(point, dtype=torch.float64)
    out[:, :3, 3] = offset - R @ offset
    return out


def _project(points: Tensor, K: Tensor) -> Tensor:
    """Pixels of points also behind the camera, as the toolkit's project_pts."""
    image = points @ K.double().mT
    return image[..., :2] / image[..., 2:]


def _visible(scene: Tensor, model: Tensor, delta: float) -> Tensor:
    return ((model.float() - scene.float() <= delta) | (scene == 0)) & (model > 0)
