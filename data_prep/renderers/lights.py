"""The light of one picture, the same for every renderer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# As many as the shader has room for.
MAX_LIGHTS = 8
# The key light stands still in the world, so that a surface looks alike from everywhere.
KEY_LIGHT = tuple(float(x) for x in np.array([0.35, 0.8, 0.5]) / np.linalg.norm([0.35, 0.8, 0.5]))


@dataclass(frozen=True, eq=False)
class Lights:
    """What lights an object: shade = ambient + sum of color (0.5 + 0.5 n·l) + head n·v.

    Everything is in sRGB values, n is turned to the camera and v points to it. The defaults are
    the fixed light. A path tracer takes ambient · sky for its environment instead.

    Attributes:
        ambient: (3,) RGB.
        places: (k, 4) homogeneous, in object coordinates: a direction (unit vector, 0) or a point
            (x, y, z, 1). At most `MAX_LIGHTS`.
        colors: (k, 3) RGB.
        head: RGB of the light at the camera, (3,).
        sky: (3, 3) RGB of the environment overhead, at the horizon and below, about 1 on average.
        environment: An equirectangular picture that stands in for the sky, or None.
        environment_turn: Turn of that picture about the vertical axis in radians.
    """

    ambient: Array = field(default_factory=lambda: np.full(3, 0.45))
    places: Array = field(default_factory=lambda: np.array([[*KEY_LIGHT, 0.0]]))
    colors: Array = field(default_factory=lambda: np.full((1, 3), 0.40))
    head: Array = field(default_factory=lambda: np.full(3, 0.15))
    sky: Array = field(
        default_factory=lambda: np.array([[1.15, 1.2, 1.25], [1.0, 1.0, 1.0], [0.7, 0.67, 0.63]])
    )
    environment: Path | None = None
    environment_turn: float = 0.0

    def record(self) -> dict[str, Any]:
        """Return numbers for views.json; the environment's file is recorded by who chose it."""
        return {
            name: np.round(getattr(self, name), 6).tolist()
            for name in ("ambient", "places", "colors", "head", "sky", "environment_turn")
        }


FIXED_LIGHT = Lights()


def shade(
    albedo: Array, normals: Array, to_camera: Array, points: Array, lights: Lights = FIXED_LIGHT
) -> Array:
    """Light surface points.

    Args:
        albedo: (N, 3) sRGB values up to 255.
        normals: (N, 3) unit world normals, turned to the camera.
        to_camera: (N, 3) unit vectors to the camera.
        points: (N, 3) object coordinates, looked at by point lights only.
        lights: The light.

    Returns:
        (N, 3) lit values, at most 255.
    """
    dtype = normals.dtype
    # one column does for white light, which is the usual one
    white = all(np.ptp(c) == 0 for c in (lights.ambient, lights.head, *lights.colors))
    last = 1 if white else 3
    ambient, head = (c[:last].astype(dtype) for c in (lights.ambient, lights.head))
    facing = np.einsum("nc,nc->n", normals, to_camera).clip(0.0, 1.0)
    value = np.broadcast_to(ambient, (len(albedo), last))
    for place, color in zip(lights.places, lights.colors, strict=True):
        if place[3] == 0:
            cosine = normals @ place[:3].astype(dtype)
        else:
            ray = place[:3].astype(dtype) - points
            ray /= np.maximum(np.linalg.norm(ray, axis=1, keepdims=True), 1e-6)
            cosine = np.einsum("nc,nc->n", normals, ray)
        value = value + color[:last].astype(dtype) * (0.5 + 0.5 * cosine)[:, None]
    value = value + head * facing[:, None]
    out: Array = np.minimum(albedo * value, 255.0)
    return out
