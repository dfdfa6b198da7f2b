"""Camera poses around an object: 42 icosphere vertices at distance 2 unless told otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equifeat.errors import RenderError, import_extra
from equifeat.geometry.camera import look_at
from equifeat.seeding import numpy_generator

Array = NDArray[Any]

# 560 px at 512 px is the reference's focal length (BlenderProc, 3DCorrEnhance).
_FOCAL_OVER_SIZE = 560.0 / 512.0
_ICOSPHERES = {12: 0, 42: 1, 162: 2, 642: 3}
_WHOLE = (-90.0, 90.0)


@dataclass(frozen=True)
class ViewpointOptions:
    """Where the cameras stand and how they look. Jitters are uniform in plus or minus the value.

    Args:
        count: Number of views. 12, 42, 162 and 642 are icosphere vertices when the elevation is
            not restricted; other counts lie on a Fibonacci spiral of equal areas.
        distance: From the camera to the object's centre, in object units (longest side 1).
        elevation: Lowest and highest elevation in degrees above the horizontal plane (up is +y).
        fov: Field of view of the longer image side in degrees; None is f = 560 px at 512 px.
        roll_jitter: Roll about the optical axis in degrees.
        look_at_jitter: Shift of the point looked at, in object units along each axis.
        focal_jitter: Relative change of the focal length, 0 to below 1.
        distance_jitter: Relative change of the distance, 0 to below 1.
        angle_jitter: Turn of the camera's position about the object in degrees, in any direction;
            it may leave the range of elevations by as much.
        seed: Seed of the jitters; view i depends on (seed, i) only.
    """

    count: int = 42
    distance: float = 2.0
    elevation: tuple[float, float] = _WHOLE
    fov: float | None = None
    roll_jitter: float = 0.0
    look_at_jitter: float = 0.0
    focal_jitter: float = 0.0
    distance_jitter: float = 0.0
    angle_jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.elevation
        checks = [
            (self.count >= 1, f"views = {self.count}: at least one view is needed"),
            (
                math.isfinite(self.distance) and self.distance > 0.9,
                f"distance = {self.distance}: the camera must stand outside the object, "
                "more than 0.9 from its centre",
            ),
            (
                -90.0 <= low <= high <= 90.0,
                f"elevation = {low} {high}: give MIN ≤ MAX within -90 to 90 degrees",
            ),
            (
                self.fov is None or 1.0 <= self.fov <= 160.0,
                f"fov = {self.fov}: give 1 to 160 degrees",
            ),
            (
                0.0 <= self.focal_jitter < 1.0,
                f"focal_jitter = {self.focal_jitter}: give 0 to below 1",
            ),
            (
                0.0 <= self.roll_jitter <= 180.0,
                f"roll_jitter = {self.roll_jitter}: give 0 to 180 degrees",
            ),
            (
                0.0 <= self.look_at_jitter <= 0.5,
                f"look_at_jitter = {self.look_at_jitter}: give 0 to 0.5 object units",
            ),
            (
                0.0 <= self.distance_jitter < 1.0,
                f"distance_jitter = {self.distance_jitter}: give 0 to below 1",
            ),
            (
                self.distance * (1.0 - self.distance_jitter) > 0.9,
                f"distance_jitter = {self.distance_jitter} at distance = {self.distance}: the "
                "camera must stay more than 0.9 from the object's centre",
            ),
            (
                0.0 <= self.angle_jitter <= 45.0,
                f"angle_jitter = {self.angle_jitter}: give 0 to 45 degrees",
            ),
            (self.seed >= 0, f"seed = {self.seed}: give a number from 0"),
        ]
        for ok, message in checks:
            if not ok:
                raise RenderError(message)


class Viewpoints(NamedTuple):
    """Cameras of all views.

    Attributes:
        K: (V, 3, 3) float64 intrinsics in pixels, corner convention.
        cam_from_world: (V, 4, 4) float64, OpenCV axes.
    """

    K: Tensor
    cam_from_world: Tensor


def make_viewpoints(options: ViewpointOptions, size_hw: tuple[int, int]) -> Viewpoints:
    """Place the cameras.

    Args:
        options: Where they stand.
        size_hw: Height and width of the images.

    Returns:
        Intrinsics and poses, one a view.
    """
    eyes = torch.from_numpy(_eyes(options))
    jitter = np.stack(
        [numpy_generator(options.seed, i).uniform(-1.0, 1.0, size=5) for i in range(options.count)]
    )
    target = torch.from_numpy(jitter[:, :3] * options.look_at_jitter)
    poses = look_at(eyes, target, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    angle = torch.from_numpy(np.deg2rad(jitter[:, 3] * options.roll_jitter))
    roll = torch.eye(4, dtype=torch.float64).repeat(options.count, 1, 1)
    roll[:, 0, 0], roll[:, 0, 1] = torch.cos(angle), -torch.sin(angle)
    roll[:, 1, 0], roll[:, 1, 1] = torch.sin(angle), torch.cos(angle)
    return Viewpoints(_intrinsics(options, size_hw, jitter[:, 4]), roll @ poses)


def _intrinsics(
    options: ViewpointOptions,
    size_hw: tuple[int, int],
    jitter: Array,
) -> Tensor:
    h, w = size_hw
    side = float(max(h, w))
    focal = _FOCAL_OVER_SIZE * side
    if options.fov is not None:
        focal = 0.5 * side / math.tan(math.radians(options.fov) / 2)
    K = torch.zeros(options.count, 3, 3, dtype=torch.float64)
    K[:, 0, 0] = K[:, 1, 1] = focal * (1.0 + torch.from_numpy(jitter * options.focal_jitter))
    K[:, 0, 2], K[:, 1, 2], K[:, 2, 2] = w / 2, h / 2, 1.0
    return K


def _eyes(options: ViewpointOptions) -> Array:
    """Return (V, 3) camera positions, moved by their jitters."""
    directions = _directions(options)
    if not (options.distance_jitter or options.angle_jitter):
        return directions * options.distance
    # a stream of their own: the older jitters keep their values
    draws = np.stack(
        [
            numpy_generator(options.seed, i, 1).uniform(-1.0, 1.0, size=3)
            for i in range(len(directions))
        ]
    )
    helper = np.where(np.abs(directions[:, 1:2]) < 0.9, [[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]])
    across = np.cross(directions, helper)
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    turn = draws[:, :1] * math.pi
    tangent = np.cos(turn) * across + np.sin(turn) * np.cross(directions, across)
    angle = np.deg2rad(draws[:, 1:2] * options.angle_jitter)
    moved = np.cos(angle) * directions + np.sin(angle) * tangent
    out: Array = moved * options.distance * (1.0 + draws[:, 2:] * options.distance_jitter)
    return out


def _directions(options: ViewpointOptions) -> Array:
    """Return (V, 3) unit vectors from the object to the cameras, +y up."""
    if tuple(options.elevation) == _WHOLE and options.count in _ICOSPHERES:
        creation = import_extra("trimesh.creation", "render", "Placing cameras")
        sphere = creation.icosphere(subdivisions=_ICOSPHERES[options.count])
        vertices = np.asarray(sphere.vertices, dtype=np.float64)
        out: Array = vertices / np.linalg.norm(vertices, axis=1, keepdims=True)
        return out
    low, high = np.sin(np.deg2rad(options.elevation))
    steps = np.arange(options.count)
    y = low + (high - low) * (steps + 0.5) / options.count
    turn = steps * math.pi * (3.0 - math.sqrt(5.0))
    radius = np.sqrt(np.clip(1.0 - y * y, 0.0, 1.0))
    return np.stack([radius * np.sin(turn), y, radius * np.cos(turn)], axis=1)
