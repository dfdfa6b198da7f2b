"""What the numbers of a user's poses mean, and how they become cam_from_world.

Convention:
    A camera's axes are named by three letters that say where x, y and z point in its picture:
    Right or Left, Down or Up, Forward or Back. OpenCV is RDF, OpenGL and Blender are RUB.

    >>> axes_matrix("opengl").diagonal().tolist()
    [1.0, -1.0, -1.0]
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from equifeat.errors import ViewsError, suggest

Array = NDArray[Any]
PoseKind = Literal["cam_from_world", "world_from_cam"]
AXES = {
    "opencv": "RDF",
    "opengl": "RUB",
    "blender": "RUB",
    "pytorch3d": "LUF",
    "unity": "RUF",
    "ros": "FLU",
}
_LETTERS = {
    "R": (1.0, 0.0, 0.0),
    "L": (-1.0, 0.0, 0.0),
    "D": (0.0, 1.0, 0.0),
    "U": (0.0, -1.0, 0.0),
    "F": (0.0, 0.0, 1.0),
    "B": (0.0, 0.0, -1.0),
}
# Blender's +z is up, the project's +y: (x, y, z) becomes (x, z, -y).
_BLENDER_FROM_OURS = np.array(
    [[1.0, 0, 0, 0], [0, 0, -1.0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]], dtype=np.float64
)


@dataclass(frozen=True)
class Convention:
    """The convention of a set of poses.

    Args:
        axes: A key of AXES or three letters; "blender" also turns its z-up world to y-up.
        pose: Whether a matrix carries world points to the camera or camera points to the world.
        columns: Whether the numbers of a matrix were stored column after column.
        left_handed: Whether the world is left-handed though the axes of the camera are not.
    """

    axes: str = "opencv"
    pose: PoseKind = "cam_from_world"
    columns: bool = False
    left_handed: bool = False

    def __post_init__(self) -> None:
        axes_matrix(self.axes)
        if self.pose not in ("cam_from_world", "world_from_cam"):
            raise ViewsError(f"pose {self.pose!r} is unknown: use cam_from_world or world_from_cam")

    def cam_from_world(self, given: Array) -> Array:
        """Convert poses to OpenCV axes, without touching the handedness of the world.

        Args:
            given: (V, 4, 4) matrices as they were written.

        Returns:
            (V, 4, 4) cam_from_world, float64; mirrored where the world is left-handed.
        """
        matrices = given.transpose(0, 2, 1) if self.columns else given
        if self.pose == "world_from_cam":
            matrices = np.linalg.inv(matrices)
        turn = np.eye(4)
        turn[:3, :3] = axes_matrix(self.axes)
        out: Array = turn @ matrices
        return out @ _BLENDER_FROM_OURS if self.axes == "blender" else out

    @property
    def expects_mirror(self) -> bool:
        """Whether the world is known to be left-handed."""
        return self.left_handed or float(np.linalg.det(axes_matrix(self.axes))) < 0


def axes_matrix(axes: str) -> Array:
    """Return the rotation (or reflection) from the named camera axes to OpenCV's.

    Args:
        axes: A key of AXES or three letters.

    Returns:
        (3, 3) signed permutation.

    Raises:
        ViewsError: No such axes.
    """
    code = AXES.get(axes.lower(), axes.upper())
    if not re.fullmatch(r"[RLDUFB]{3}", code):
        raise ViewsError(
            f"axes {axes!r} are unknown: use {', '.join(AXES)} or three letters such as RDF"
            f" (x right, y down, z forward).{suggest(axes, AXES)}"
        )
    matrix = np.array([_LETTERS[letter] for letter in code]).T
    if abs(abs(float(np.linalg.det(matrix))) - 1.0) > 1e-9:
        raise ViewsError(
            f"axes {axes!r} name one direction twice: use one of R/L, of D/U and of F/B each"
        )
    return matrix


def axes_code(matrix: Array) -> str:
    """Name axes, the inverse of `axes_matrix`.

    Args:
        matrix: (3, 3) signed permutation.

    Returns:
        A key of AXES where there is one, else three letters.
    """
    letters = {tuple(direction): letter for letter, direction in _LETTERS.items()}
    code = "".join(letters[tuple(float(v) + 0.0 for v in column)] for column in matrix.T)
    return next((name for name, known in AXES.items() if known == code), code)


def unmirrored(cam_from_world: Array) -> Array:
    """Make a left-handed world right-handed by turning its z axis round.

    Args:
        cam_from_world: (V, 4, 4) poses.

    Returns:
        The poses with determinant +1.
    """
    if float(np.linalg.det(cam_from_world[0, :3, :3])) > 0:
        return cam_from_world
    return cam_from_world @ np.diag([1.0, 1.0, -1.0, 1.0])
