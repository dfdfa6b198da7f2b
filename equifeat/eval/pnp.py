"""The pose of an object from matches of its 3D points with pixels: PnP inside RANSAC."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from equifeat.errors import RecipeError, import_extra
from equifeat.geometry.camera import Camera
from equifeat.seeding import numpy_generator

PnpMethod = Literal["epnp", "poselib"]
# The default of cv2.solvePnPRansac, which the reference keeps: it may end before all iterations.
_CONFIDENCE = 0.99
_PURPOSE = "Pose estimation"


class PoseEstimate(NamedTuple):
    """A pose with the matches that agree with it.

    Attributes:
        cam_from_object: (4, 4) float64 on the CPU, in the unit of the points; the identity when
            there is none.
        inliers: (N,) bool, the matches within the threshold.
        ok: Whether there is a pose.
    """

    cam_from_object: Float[Tensor, "4 4"]
    inliers: Bool[Tensor, "n"]
    ok: bool


def estimate_pose(
    points3d: Float[Tensor, "n 3"],
    keypoints: Float[Tensor, "n 2"],
    camera: Camera,
    *,
    threshold_px: float = 8.0,
    iterations: int = 10000,
    min_inliers: int = 6,
    seed: int,
    method: PnpMethod = "epnp",
) -> PoseEstimate:
    """Estimate where an object is from matches, some of which are wrong.

    Both solvers only see K and pixels, so K and keypoints must share a convention: here corners
    are (0, 0), as everywhere in the project.

    Args:
        points3d: (N, 3) points of the object, in its own axes and any unit.
        keypoints: (N, 2) where they were found, pixels of the camera's image.
        camera: Intrinsics without skew.
        threshold_px: Largest reprojection error of an inlier, pixels.
        iterations: Most RANSAC iterations.
        min_inliers: Fewer say nothing: the pose is then the identity.
        seed: Seed of RANSAC.
        method: "epnp" is OpenCV's EPnP (Lepetit et al., IJCV 2009) in RANSAC, "poselib" LO-RANSAC
            over P3P with a refinement by all inliers (github.com/PoseLib/PoseLib).

    Returns:
        The pose; the identity without inliers where there is none.

    Raises:
        RecipeError: An option makes no sense.
        MissingExtraError: OpenCV or PoseLib is not installed.
    """
    if method not in get_args(PnpMethod):
        raise RecipeError(f"method must be one of {', '.join(get_args(PnpMethod))}, not {method}.")
    if not threshold_px > 0.0 or iterations < 1 or min_inliers < 4:
        raise RecipeError(
            f"threshold_px={threshold_px:g}, iterations={iterations} and min_inliers={min_inliers} "
            "must be above 0, at least 1 and at least 4."
        )
    n = len(points3d)
    none = PoseEstimate(torch.eye(4, dtype=torch.float64), torch.zeros(n, dtype=torch.bool), False)
    if n < min_inliers:
        return none
    # OpenCV's RANSAC draws from a generator with a fixed seed, so the order must carry ours.
    order = numpy_generator(seed, 61).permutation(n)
    world = points3d.detach().cpu().double().numpy()[order]
    pixels = keypoints.detach().cpu().double().numpy()[order]
    # Both solvers work in float32 or with fixed tolerances somewhere: give them points around 1.
    center = world.mean(axis=0)
    scale = float(np.linalg.norm(world - center, axis=1).max())
    if not scale > 0.0:
        return none
    local = np.ascontiguousarray((world - center) / scale)
    K = camera.K.detach().cpu().double().numpy()
    solve = _opencv if method == "epnp" else _poselib
    found = solve(local, pixels, K, camera.size_hw, threshold_px, iterations, seed)
    if found is None:
        return none
    rotation, shift, chosen = found
    if chosen.sum() < min_inliers or not (np.isfinite(rotation).all() and np.isfinite(shift).all()):
        return none
    pose = np.eye(4)
    pose[:3, :3] = rotation
    pose[:3, 3] = scale * shift - rotation @ center
    inliers = np.zeros(n, dtype=bool)
    inliers[order] = chosen
    return PoseEstimate(torch.from_numpy(pose), torch.from_numpy(inliers), True)


_Found = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]


def _opencv(
    world: NDArray[np.float64],
    pixels: NDArray[np.float64],
    K: NDArray[np.float64],
    size_hw: tuple[int, int],
    threshold_px: float,
    iterations: int,
    seed: int,
) -> _Found | None:
    cv2 = import_extra("cv2", "eval", _PURPOSE)
    cv2.setRNGSeed(seed % 2**31)
    try:
        ok, turn, shift, index = cv2.solvePnPRansac(
            world,
            pixels,
            K,
            None,
            iterationsCount=iterations,
            reprojectionError=threshold_px,
            confidence=_CONFIDENCE,
            flags=cv2.SOLVEPNP_EPNP,
        )
    except cv2.error:
        # what it says of degenerate points, such as ones on a line
        return None
    if not ok or index is None:
        return None
    chosen = np.zeros(len(world), dtype=bool)
    chosen[np.asarray(index).ravel()] = True
    return cv2.Rodrigues(turn)[0], np.asarray(shift).ravel(), chosen


def _poselib(
    world: NDArray[np.float64],
    pixels: NDArray[np.float64],
    K: NDArray[np.float64],
    size_hw: tuple[int, int],
    threshold_px: float,
    iterations: int,
    seed: int,
) -> _Found | None:
    poselib = import_extra("poselib", "eval", _PURPOSE)
    camera = {
        "model": "PINHOLE",
        "width": size_hw[1],
        "height": size_hw[0],
        "params": [float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2])],
    }
    ransac = {
        "max_reproj_error": threshold_px,
        "max_iterations": iterations,
        "min_iterations": min(100, iterations),
        "success_prob": _CONFIDENCE,
        "seed": seed,
    }
    pose, info = poselib.estimate_absolute_pose(pixels, world, camera, ransac, {})
    return np.asarray(pose.R), np.asarray(pose.t).ravel(), np.asarray(info["inliers"], dtype=bool)
