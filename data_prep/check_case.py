"""A capture as the check sees it, and the corrections that can be applied to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.capture_conventions import Convention, PoseKind, axes_code, axes_matrix

Array = NDArray[Any]
# The order in which faults are named: what is nearer to the file comes first.
KINDS = ("unit", "ray", "axes", "handedness", "direction", "rows", "K", "order")
_UNITS = {
    1e-3: "the depth is in millimetres and was read as metres",
    1e3: "the depth is in metres and was read as millimetres",
    1e-2: "the depth is in centimetres and was read as metres",
    1e2: "the depth is in metres and was read as centimetres",
    0.1: "the depth is in millimetres and was read as centimetres",
    10.0: "the depth is in centimetres and was read as millimetres",
    1 / 5000: "the depth is in 1/5000 m, as TUM's, and was read as metres",
    0.2: "the depth is in 1/5000 m, as TUM's, and was read as millimetres",
}
_SHIFTS_PX = (-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0)


class Fix(NamedTuple):
    """One correction.

    Attributes:
        kind: One of KINDS.
        wrong: What is wrong, a clause.
        remedy: What to do, a clause.
    """

    kind: str
    wrong: str
    remedy: str


@dataclass(frozen=True)
class Case:
    """Poses and intrinsics as given, with the corrections applied so far.

    Args:
        given: (V, 4, 4) poses as they were written.
        convention: How they are read.
        K: (V, 3, 3) intrinsics in pixels, corner convention.
        sizes_wh: (V, 2) width and height of the views.
        unit: Units of the poses a unit of the depth files, as the options say.
        ray: Whether the options say that depth is measured along the ray.
        scale: Correction of the depth's unit.
        to_z: 1 turns ray distance to z-depth, -1 undoes that.
        order: Which pose belongs to view i.
        fixes: What was corrected.
    """

    given: Array
    convention: Convention
    K: Array
    sizes_wh: Array
    unit: float = 1.0
    ray: bool = False
    scale: float = 1.0
    to_z: float = 0.0
    order: tuple[int, ...] | None = None
    fixes: tuple[Fix, ...] = ()

    def poses(self) -> Array:
        """Return the (V, 4, 4) cam_from_world of the corrected capture."""
        given = self.given if self.order is None else self.given[list(self.order)]
        return self.convention.cam_from_world(given)

    def fixed(self, fix: Fix, **changes: Any) -> Case:
        """Return the case with one more correction.

        Args:
            fix: What it is.
            changes: Fields of the new case.
        """
        fixes = tuple(sorted((*self.fixes, fix), key=lambda f: KINDS.index(f.kind)))
        return dataclasses.replace(self, fixes=fixes, **changes)

    @property
    def kinds(self) -> set[str]:
        """The kinds of the corrections so far."""
        return {fix.kind for fix in self.fixes}


def known_ratio(ratio: float) -> float:
    """Round a ratio to that of two usual units, which is meant exactly.

    Args:
        ratio: What fits best.

    Returns:
        The ratio of the units, or the ratio itself where none is near.
    """
    return next((unit for unit in _UNITS if abs(ratio / unit - 1) < 0.015), ratio)


def with_scale(case: Case, ratio: float) -> Case:
    """Multiply the depth.

    Args:
        case: What to correct.
        ratio: The factor.

    Returns:
        The corrected case; its sentence names the unit where the ratio is that of two units.
    """
    near = ratio if ratio in _UNITS else None
    exact = near or float(f"{ratio:.3g}")
    times = f"{1 / exact:,.4g} times too large" if exact < 1 else f"{exact:,.4g} times too small"
    why = f", as if {_UNITS[near]}" if near else ""
    unit = f"{case.unit * exact:.4g}"
    fix = Fix(
        "unit", f"the unit of the depth is wrong: it is {times}{why}", f"give --depth-unit {unit}"
    )
    return case.fixed(fix, scale=case.scale * ratio)


def pose_cases(case: Case, thorough: bool) -> Iterator[Case]:
    """Yield other readings of the poses: axes, direction, rows, handedness.

    Args:
        case: What to correct.
        thorough: Whether to try all 48 signed permutations of the axes; else the 8 of signs.
    """
    convention = case.convention
    given = axes_matrix(convention.axes)
    rotations = _permutations() if thorough else [np.eye(3)]
    for turned in ("", "direction", "rows"):
        start, named = case, convention
        if turned == "direction":
            inverse = convention.pose == "cam_from_world"
            other: PoseKind = "world_from_cam" if inverse else "cam_from_world"
            named = dataclasses.replace(convention, pose=other)
            fix = Fix(
                "direction",
                f"the poses are {other}, not {convention.pose}",
                f"give --pose {other}",
            )
            start = case.fixed(fix, convention=named)
        elif turned == "rows":
            matrices = case.given.copy()
            matrices[:, :3, :3] = matrices[:, :3, :3].transpose(0, 2, 1)
            fix = Fix(
                "rows",
                "the rotations are transposed (rows and columns swapped) but the translations are"
                " not",
                "transpose the 3x3 part of every pose",
            )
            start = case.fixed(fix, given=matrices)
            yield start
            continue  # with other axes it is too much alike other readings
        if turned:
            yield start
        for permutation in rotations:
            for signs in np.array(np.meshgrid([1, -1], [1, -1], [1, -1])).reshape(3, -1).T:
                change = permutation @ np.diag(signs).astype(np.float64)
                if np.array_equal(change, np.eye(3)):
                    continue
                yield _with_axes(start, named, change @ given)


def _with_axes(case: Case, convention: Convention, axes: Array) -> Case:
    name = axes_code(axes)
    old = axes_code(axes_matrix(convention.axes))
    if float(np.linalg.det(axes)) < 0 < float(np.linalg.det(axes_matrix(convention.axes))):
        mirrored = float(np.linalg.det(case.given[0, :3, :3])) < 0
        if mirrored:
            wrong = "the poses are mirrored (their determinant is -1)"
        else:
            wrong = "the poses are left-handed"
        fix = Fix(
            "handedness", f"{wrong}: the camera's axes are {_spell(axes)}", f"give --axes {name}"
        )
    else:
        fix = Fix(
            "axes",
            f"the camera's axes are {_spell(axes)}, not {old}",
            f"give --axes {name}",
        )
    return case.fixed(fix, convention=dataclasses.replace(convention, axes=name))


def _spell(axes: Array) -> str:
    name = axes_code(axes)
    words = {
        "opencv": "OpenCV's (x right, y down, z forward)",
        "opengl": "OpenGL's (x right, y up, z back)",
        "pytorch3d": "PyTorch3D's (x left, y up, z forward)",
        "unity": "Unity's (x right, y up, z forward)",
        "ros": "a robot's (x forward, y left, z up)",
    }
    return words.get(name, name)


def _permutations() -> list[Array]:
    eye = np.eye(3)
    return [
        eye[list(p)] for p in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    ]


def ray_case(case: Case) -> Case:
    """Return the case with the other kind of depth.

    Args:
        case: What to correct.
    """
    if case.ray:
        fix = Fix("ray", "the depth is z already, not distance along the ray", "give --depth z")
        return case.fixed(fix, to_z=-1.0)
    fix = Fix("ray", "the depth is the distance along the ray, not z-depth", "give --depth ray")
    return case.fixed(fix, to_z=1.0)


def intrinsics_cases(case: Case) -> Iterator[Case]:
    """Yield other readings of K.

    Args:
        case: What to correct.
    """
    K = case.K
    swapped_f, swapped_c = K.copy(), K.copy()
    swapped_f[:, [0, 1], [0, 1]] = K[:, [1, 0], [1, 0]]
    swapped_c[:, :2, 2] = K[:, [1, 0], 2]
    both = swapped_f.copy()
    both[:, :2, 2] = swapped_c[:, :2, 2]
    differ_f = bool((np.abs(K[:, 0, 0] / K[:, 1, 1] - 1) > 1e-3).any())
    differ_c = bool((np.abs(K[:, 0, 2] - K[:, 1, 2]) > 0.5).any())
    if differ_f:
        fix = Fix("K", "fx and fy are swapped", "swap fx and fy in K")
        yield case.fixed(fix, K=swapped_f)
    if differ_c:
        fix = Fix("K", "cx and cy are swapped", "swap cx and cy in K")
        yield case.fixed(fix, K=swapped_c)
    if differ_f and differ_c:
        fix = Fix(
            "K", "x and y are swapped in K (fx with fy and cx with cy)", "swap both pairs in K"
        )
        yield case.fixed(fix, K=both)
    ratios = (case.sizes_wh / 2 / np.maximum(np.abs(K[:, :2, 2]), 1e-9)).reshape(-1)
    guess = float(np.median(ratios))
    factors = [0.25, 1 / 3, 0.5, 2 / 3, 1.5, 2.0, 3.0, 4.0]
    if abs(guess - 1) > 0.05 and min(abs(guess / f - 1) for f in factors) > 0.01:
        factors.append(guess)
    for factor in factors:
        resized = K.copy()
        resized[:, :2] *= factor
        w, h = case.sizes_wh[0] / factor
        fix = Fix(
            "K",
            f"K belongs to pictures of another resolution, about {w:.0f}x{h:.0f} instead of "
            f"{case.sizes_wh[0][0]:.0f}x{case.sizes_wh[0][1]:.0f}",
            f"give --k-size {w:.0f}x{h:.0f}",
        )
        yield case.fixed(fix, K=resized)


def shifted_cases(case: Case) -> list[tuple[float, Case]]:
    """Return principal points shifted along the diagonal, to see whether half a pixel is best.

    Args:
        case: What to correct.

    Returns:
        Shift in pixels and the corrected case.
    """
    out = []
    for shift in _SHIFTS_PX:
        K = case.K.copy()
        K[:, :2, 2] += shift
        convention = "center" if shift > 0 else "corner"
        what = "centre" if shift > 0 else "corner"
        fix = Fix(
            "K",
            "the principal point is off by half a pixel: K counts from the first pixel's " + what,
            f"give --pixels {convention}",
        )
        out.append((shift, case.fixed(fix, K=K)))
    return out


def focal_case(case: Case, factor: float) -> Case:
    """Multiply the focal lengths.

    Args:
        case: What to correct.
        factor: The factor.

    Returns:
        The corrected case.
    """
    K = case.K.copy()
    K[:, [0, 1], [0, 1]] *= factor
    was = float(np.median(case.K[:, 0, 0]))
    fix = Fix(
        "K",
        f"the focal length is wrong: {was:.5g} px, where {was * factor:.4g} px fits",
        f"multiply fx and fy by {factor:.3g}",
    )
    return case.fixed(fix, K=K)
