"""Nearest neighbours of descriptors in blocks, within a memory budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import CorrespondenceError, RecipeError

DEFAULT_BUDGET = 64 * 2**20
# Narrower blocks than this waste the matrix product; rows are given up first.
_MIN_ROWS = 64


class Matches(NamedTuple):
    """Matches of descriptors0 in descriptors1.

    Attributes:
        matches0: (N,) int64 rows of descriptors1; -1 for none.
        similarity: (N,) dot product with the nearest, whether it is a match or not.
    """

    matches0: Tensor
    similarity: Tensor


def nearest(
    descriptors0: Float[Tensor, "n d"],
    descriptors1: Float[Tensor, "m d"],
    budget_bytes: int = DEFAULT_BUDGET,
) -> Matches:
    """Find the most similar row of descriptors1 for every row of descriptors0.

    Args:
        descriptors0: (N, D) L2-normalised descriptors.
        descriptors1: (M, D) L2-normalised descriptors, M ≥ 1.
        budget_bytes: Largest block of the similarity matrix, in bytes.

    Returns:
        The nearest of every row, never -1; of equal ones any.

    Raises:
        CorrespondenceError: There is nothing to match against.
        RecipeError: The budget is below one entry.
    """
    best, index, _, _ = _both(descriptors0, descriptors1, budget_bytes, mutual=False)
    return Matches(index, best)


def mutual_nearest(
    descriptors0: Float[Tensor, "n d"],
    descriptors1: Float[Tensor, "m d"],
    budget_bytes: int = DEFAULT_BUDGET,
) -> Matches:
    """Find the pairs of rows that are each other's nearest.

    Args:
        descriptors0: (N, D) L2-normalised descriptors.
        descriptors1: (M, D) L2-normalised descriptors, M ≥ 1.
        budget_bytes: Largest block of the similarity matrix, in bytes.

    Returns:
        matches0 with -1 for none, and similarities.

    Raises:
        CorrespondenceError: There is nothing to match against.
        RecipeError: The budget is below one entry.
    """
    best, index, _, back = _both(descriptors0, descriptors1, budget_bytes, mutual=True)
    rows = torch.arange(len(index), device=index.device)
    return Matches(torch.where(back[index] == rows, index, -1), best)


def _both(
    descriptors0: Tensor, descriptors1: Tensor, budget_bytes: int, mutual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best similarity and its index for rows and, when mutual, for columns."""
    n, m = len(descriptors0), len(descriptors1)
    if not m:
        raise CorrespondenceError("there are 0 descriptors to match against; give at least one.")
    dtype = torch.promote_types(descriptors0.dtype, torch.float32)
    device = descriptors0.device
    best0 = torch.full((n,), -torch.inf, dtype=dtype, device=device)
    best1 = torch.full((m if mutual else 0,), -torch.inf, dtype=dtype, device=device)
    index0 = torch.zeros(n, dtype=torch.int64, device=device)
    index1 = torch.zeros(len(best1), dtype=torch.int64, device=device)
    for rows, columns in _blocks(n, m, budget_bytes, dtype.itemsize):
        similarity = descriptors0[rows].to(dtype) @ descriptors1[columns].to(dtype).mT
        _keep(best0[rows], index0[rows], similarity.max(dim=1), columns.start)
        if mutual:
            _keep(best1[columns], index1[columns], similarity.max(dim=0), rows.start)
    return best0, index0, best1, index1


def _keep(best: Tensor, index: Tensor, found: tuple[Tensor, Tensor], offset: int) -> None:
    """Update views of the best so far in place; a tie keeps the earlier block."""
    value, at = found
    better = value > best
    best.copy_(torch.where(better, value, best))
    index.copy_(torch.where(better, at + offset, index))


def _blocks(n: int, m: int, budget_bytes: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
    entries = budget_bytes // itemsize
    if entries < 1:
        raise RecipeError(
            f"budget_bytes={budget_bytes} does not hold one similarity of {itemsize} bytes; "
            "give at least a few megabytes."
        )
    columns = min(m, max(1, entries // min(_MIN_ROWS, max(n, 1))))
    rows = max(1, entries // columns)
    for i in range(0, n, rows):
        for j in range(0, m, columns):
            yield slice(i, min(i + rows, n)), slice(j, min(j + columns, m))
