"""Which keypoints of two views are positives and negatives of one another, from their 3D points."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import RecipeError

# Elements of one block of (positives, M): on a CPU a block should stay in the cache, on an
# accelerator it should be large enough to fill it.
_CPU_BLOCK = 2**17
_DEVICE_BLOCK = 2**24
# Stands for minus infinity where gradients must stay finite.
FAR = -1e30


class ExtraNegatives(NamedTuple):
    """Descriptors of other pairs that the rows of a pair are compared with.

    Attributes:
        descriptors: (E, D) L2-normalised, with their graph.
        points3d: (E, 3) their points in the coordinates of their own object.
        same_object: (E,) true where that object is the pair's own: such a descriptor is a negative
            only of rows farther than neg_radius (soft_labels: three label radii). Points of any
            other object always are.
    """

    descriptors: Tensor
    points3d: Tensor
    same_object: Tensor


class Problem(NamedTuple):
    """Rows of view 0 that have a positive, and their pairs sorted by row.

    Attributes:
        similarity: (R, M + E) with its graph, float32 or float64; extra negatives come last.
        negative: (R, M + E).
        row: (P,) index into the R rows, ascending.
        col: (P,) index into the M descriptors.
        single: Whether every row has exactly one positive.
    """

    similarity: Tensor
    negative: Tensor
    row: Tensor
    col: Tensor
    single: bool


def upcast(x: Tensor) -> Tensor:
    """Return float32 or float64.

    Args:
        x: Of any floating type.

    Returns:
        The tensor itself where it is float64, otherwise in float32.
    """
    return x if x.dtype == torch.float64 else x.float()


def squared_distances(points3d0: Tensor, points3d1: Tensor) -> Tensor:
    """Return the squared distance of every point of view 0 to every point of view 1.

    Args:
        points3d0: (N, 3) points of view 0.
        points3d1: (M, 3) points of view 1.

    Returns:
        (N, M), detached, in the squared unit of the points.
    """
    # Differences, axis by axis: the matrix-product form is wrong by 3e-4, far too much for a
    # radius of 5e-3, and cdist's exact form is several times slower than this on a CPU.
    p0, p1 = upcast(points3d0.detach()), upcast(points3d1.detach())
    total = (p0[:, None, 0] - p1[None, :, 0]).square_()
    for axis in (1, 2):
        total += (p0[:, None, axis] - p1[None, :, axis]).square_()
    return total


def within(points3d0: Tensor, points3d1: Tensor, radius: float) -> Tensor:
    """Return which points are at most a radius apart.

    Args:
        points3d0: (N, 3) points of view 0.
        points3d1: (M, 3) points of view 1.
        radius: In the unit of the points.

    Returns:
        (N, M) booleans.
    """
    n, m, device = len(points3d0), len(points3d1), points3d0.device
    out = torch.empty(n, m, dtype=torch.bool, device=device)
    rows = rows_at_once(m, device)
    for start in range(0, n, rows):
        block = slice(start, start + rows)
        torch.le(squared_distances(points3d0[block], points3d1), radius**2, out=out[block])
    return out


def rows_at_once(columns: int, device: torch.device) -> int:
    """Return how many rows of a wide matrix one block should have.

    Args:
        columns: Width of the matrix.
        device: Where it is.

    Returns:
        At least 1.
    """
    block = _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK
    return max(1, block // max(1, columns))


def check_options(pos_radius: float, neg_radius: float, temperature: float) -> None:
    """Refuse radii and temperatures that make no sense.

    Args:
        pos_radius: Positives are at most this far apart.
        neg_radius: Negatives are farther apart than this.
        temperature: Temperature.

    Raises:
        RecipeError: The radii are not 0 < pos_radius ≤ neg_radius, or the temperature is not above
            0.
    """
    if not 0.0 < pos_radius <= neg_radius:
        raise RecipeError(
            f"pos_radius={pos_radius} and neg_radius={neg_radius} must satisfy "
            "0 < pos_radius ≤ neg_radius."
        )
    check_temperature(temperature)


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that makes no sense.

    Args:
        temperature: Temperature.

    Raises:
        RecipeError: It is not above 0.
    """
    if not temperature > 0.0:
        raise RecipeError(f"the temperature is {temperature}, but it must be greater than 0.")


def check_chunk(chunk: int | None) -> None:
    """Refuse a number of positives handled at once that makes no sense.

    Args:
        chunk: The number; None for one chosen by the device.

    Raises:
        RecipeError: It is below 1.
    """
    if chunk is not None and chunk < 1:
        raise RecipeError(f"chunk={chunk} must be at least 1.")


def pairs_of(
    descriptors0: Tensor,
    descriptors1: Tensor,
    points3d0: Tensor,
    points3d1: Tensor,
    pos_radius: float,
    neg_radius: float,
    extra: ExtraNegatives | None,
) -> Problem:
    """Return the similarities of the rows that have a positive, and their pairs.

    Args:
        descriptors0: (N, D) descriptors of view 0.
        descriptors1: (M, D) descriptors of view 1.
        points3d0: (N, 3) their points in object coordinates.
        points3d1: (M, 3) likewise.
        pos_radius: Positives are at most this far apart, in object units.
        neg_radius: Negatives are farther apart than this.
        extra: Further negatives from other pairs.

    Returns:
        R of the N rows, M + E columns.
    """
    pairs_row, col = within(points3d0, points3d1, pos_radius).nonzero(as_tuple=True)
    rows, row = torch.unique_consecutive(pairs_row, return_inverse=True)
    single = len(rows) == len(pairs_row)
    if len(rows) < len(points3d0):
        descriptors0, points3d0 = descriptors0[rows], points3d0[rows]
    negative = within(points3d0, points3d1, neg_radius).logical_not_()
    descriptors1 = upcast(descriptors1)
    if extra is not None:
        near = within(points3d0, extra.points3d, neg_radius).logical_and_(extra.same_object)
        negative = torch.cat([negative, near.logical_not_()], dim=1)
        descriptors1 = torch.cat([descriptors1, upcast(extra.descriptors)])
    similarity = upcast(descriptors0) @ descriptors1.mT
    return Problem(similarity, negative, row, col, single)


def count_positives(
    points3d0: Float[Tensor, "n 3"], points3d1: Float[Tensor, "m 3"], pos_radius: float = 5e-3
) -> int:
    """Count the pairs that are at most a radius apart.

    Args:
        points3d0: Object points of view 0.
        points3d1: Object points of view 1.
        pos_radius: Largest distance of a positive pair in object units.

    Returns:
        Number of positive pairs.
    """
    return int(within(points3d0, points3d1, pos_radius).sum())
