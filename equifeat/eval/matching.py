"""Nearest neighbours of descriptors in blocks, within a memory budget.

Beside the matrix product, finding maxima must cost little: the result of a block goes to one
buffer that is used again and again, small enough for the caches on a CPU, and maxima are found
first among groups of entries without their places. See docs/matching.md for its measured share.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import CorrespondenceError, RecipeError

MatchDtype = Literal["float32", "bfloat16"]
DEFAULT_BUDGET = 64 * 2**20
# On a CPU a larger block leaves the caches before its maxima are looked for.
_CPU_ENTRIES = 2**20
# Enough rows for a GPU's product to be fast.
_GPU_ROWS = 512
# A block's sides are multiples of this where they can be.
_STEP = 64
# Maxima are looked for in groups: of neighbours in a row, of rows.
_GROUP_IN_ROW, _GROUP_OF_ROWS = 64, 32


class Matches(NamedTuple):
    """Matches of descriptors0 in descriptors1.

    Attributes:
        matches0: (N,) int64 rows of descriptors1; -1 for none.
        similarity: (N,) dot product with the nearest, whether it is a match or not.
    """

    matches0: Tensor
    similarity: Tensor


@torch.no_grad()
def nearest(
    descriptors0: Float[Tensor, "n d"],
    descriptors1: Float[Tensor, "m d"],
    budget_bytes: int = DEFAULT_BUDGET,
    dtype: MatchDtype = "float32",
) -> Matches:
    """Find the most similar row of descriptors1 for every row of descriptors0.

    Args:
        descriptors0: (N, D) L2-normalised descriptors.
        descriptors1: (M, D) L2-normalised descriptors, M ≥ 1.
        budget_bytes: Largest block of the similarity matrix, in bytes.
        dtype: "bfloat16" looks for the nearest with descriptors rounded to bfloat16, summing in
            float32 (on a GPU several times faster; on a CPU the same result without the gain).
            The similarity of what was found is in float32 in each case, or in float64 for such
            descriptors.

    Returns:
        The nearest of every row, never -1; of equally similar ones the first.

    Raises:
        CorrespondenceError: There is nothing to match against.
        RecipeError: The budget is below one entry, or there is no such dtype.
    """
    best, index, _, _ = _both(descriptors0, descriptors1, budget_bytes, dtype, mutual=False)
    if dtype != "float32":
        best = _similarity(descriptors0, descriptors1, index, budget_bytes)
    return Matches(index, best)


@torch.no_grad()
def mutual_nearest(
    descriptors0: Float[Tensor, "n d"],
    descriptors1: Float[Tensor, "m d"],
    budget_bytes: int = DEFAULT_BUDGET,
    dtype: MatchDtype = "float32",
) -> Matches:
    """Find the pairs of rows that are each other's nearest.

    Args:
        descriptors0: (N, D) L2-normalised descriptors.
        descriptors1: (M, D) L2-normalised descriptors, M ≥ 1.
        budget_bytes: Largest block of the similarity matrix, in bytes.
        dtype: See `nearest`.

    Returns:
        matches0 with -1 for none, and similarities.

    Raises:
        CorrespondenceError: There is nothing to match against.
        RecipeError: The budget is below one entry, or there is no such dtype.
    """
    best, index, _, back = _both(descriptors0, descriptors1, budget_bytes, dtype, mutual=True)
    if dtype != "float32":
        best = _similarity(descriptors0, descriptors1, index, budget_bytes)
    rows = torch.arange(len(index), device=index.device)
    return Matches(torch.where(back[index] == rows, index, -1), best)


def _both(
    descriptors0: Tensor,
    descriptors1: Tensor,
    budget_bytes: int,
    dtype: MatchDtype,
    mutual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best similarity and its index for rows and, when mutual, for columns."""
    n, m = len(descriptors0), len(descriptors1)
    if not m:
        raise CorrespondenceError("there are 0 descriptors to match against; give at least one.")
    wide = torch.promote_types(descriptors0.dtype, torch.float32)
    device = descriptors0.device
    rows, columns = block_shape(n, m, budget_bytes, wide.itemsize, device)
    buffer = torch.empty(rows * columns, dtype=wide, device=device)
    best0 = torch.full((n,), -torch.inf, dtype=wide, device=device)
    best1 = torch.full((m if mutual else 0,), -torch.inf, dtype=wide, device=device)
    index0 = torch.zeros(n, dtype=torch.int64, device=device)
    index1 = torch.zeros(len(best1), dtype=torch.int64, device=device)
    for i in range(0, n, rows):
        ours = slice(i, i + rows)
        d0 = factor(descriptors0[ours], wide, dtype)
        for j in range(0, m, columns):
            theirs = slice(j, j + columns)
            d1 = factor(descriptors1[theirs], wide, dtype)
            similarity = buffer[: len(d0) * len(d1)].view(len(d0), len(d1))
            product(d0, d1, similarity)
            if columns == m:  # nothing to compare with: a GPU has fewer small kernels to start
                best0[ours], index0[ours] = max_of_rows(similarity)
            else:
                _keep(best0[ours], index0[ours], max_of_rows(similarity), j)
            if mutual:
                _keep(best1[theirs], index1[theirs], _max_of_columns(similarity), i)
    return best0, index0, best1, index1


def block_shape(
    n: int, m: int, budget_bytes: int, itemsize: int, device: torch.device
) -> tuple[int, int]:
    """Return how large the blocks of a similarity matrix are.

    Args:
        n: Rows of the whole matrix.
        m: Columns of the whole matrix.
        budget_bytes: Largest block in bytes.
        itemsize: Bytes of an entry.
        device: Where it is computed.

    Returns:
        Rows and columns of a block, each at least 1. On a CPU a square where the matrix is large
        enough; elsewhere some hundred whole rows where they fit.

    Raises:
        RecipeError: The budget is below one entry.
    """
    entries = budget_bytes // itemsize
    if entries < 1:
        raise RecipeError(
            f"budget_bytes={budget_bytes} does not hold one similarity of {itemsize} bytes; "
            "give at least a few megabytes."
        )
    if device.type == "cpu":
        entries = min(entries, _CPU_ENTRIES)
        rows = _side(min(n, math.isqrt(entries)))
    else:
        rows = _side(min(n, _GPU_ROWS, math.isqrt(entries)))
    columns = m if rows * m <= entries else _side(entries // rows)
    return max(1, min(n, _side(entries // columns))), columns


def _side(length: int) -> int:
    return max(1, length if length < _STEP else length // _STEP * _STEP)


def factor(descriptors: Tensor, wide: torch.dtype, dtype: str) -> Tensor:
    """Return descriptors as they enter `product`.

    Args:
        descriptors: (N, D) in any floating type.
        wide: Type of the similarities, float32 or float64.
        dtype: See `nearest`.

    Returns:
        (N, D) in the type `wide`, or in bfloat16 where that is fast.

    Raises:
        RecipeError: There is no such dtype.
    """
    if dtype not in get_args(MatchDtype):
        raise RecipeError(f"dtype must be one of {', '.join(get_args(MatchDtype))}, not {dtype!r}.")
    if dtype == "float32":
        return descriptors.to(wide)
    rounded = descriptors.to(torch.bfloat16)
    # Only CUDA's product of bfloat16 gives float32; elsewhere its result would be rounded as well.
    return rounded if rounded.device.type == "cuda" else rounded.to(wide)


def product(descriptors0: Tensor, descriptors1: Tensor, out: Tensor) -> Tensor:
    """Compute all dot products of what `factor` gave.

    Args:
        descriptors0: (N, D).
        descriptors1: (M, D).
        out: (N, M) in the type `wide` of `factor`; overwritten.

    Returns:
        The same (N, M).
    """
    if descriptors0.dtype == out.dtype:
        return torch.mm(descriptors0, descriptors1.mT, out=out)
    return torch.mm(descriptors0, descriptors1.mT, out_dtype=out.dtype, out=out)


def max_of_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Find the largest value of each row: what max(dim=1) gives, in less time on a CPU.

    Args:
        values: (N, M), M ≥ 1.

    Returns:
        (N,) maxima and (N,) int64 columns; of equal ones the first.
    """
    n, m = values.shape
    if values.device.type != "cpu" or m % _GROUP_IN_ROW or m == _GROUP_IN_ROW:
        return values.max(dim=1)
    # torch finds a maximum with its place ten times slower than without.
    groups = values.view(n, m // _GROUP_IN_ROW, _GROUP_IN_ROW)
    best, group = groups.amax(dim=2).max(dim=1)
    inside = groups[torch.arange(n), group].argmax(dim=1)
    return best, group * _GROUP_IN_ROW + inside


def _max_of_columns(values: Tensor) -> tuple[Tensor, Tensor]:
    """What max(dim=0) gives; of equal ones the first."""
    n, m = values.shape
    if values.device.type != "cpu" or n % _GROUP_OF_ROWS or n == _GROUP_OF_ROWS:
        return values.max(dim=0)
    groups = values.view(-1, _GROUP_OF_ROWS, m)
    best, group = groups.amax(dim=1).max(dim=0)
    inside = groups[group, :, torch.arange(m)].argmax(dim=1)
    return best, group * _GROUP_OF_ROWS + inside


def _keep(best: Tensor, index: Tensor, found: tuple[Tensor, Tensor], offset: int) -> None:
    """Update views of the best so far in place; a tie keeps the earlier block."""
    value, at = found
    better = value > best
    best.copy_(torch.where(better, value, best))
    index.copy_(torch.where(better, at + offset, index))


def _similarity(
    descriptors0: Tensor, descriptors1: Tensor, index: Tensor, budget_bytes: int
) -> Tensor:
    """Dot products of pairs of rows, unrounded."""
    wide = torch.promote_types(descriptors0.dtype, torch.float32)
    out = torch.empty(len(index), dtype=wide, device=descriptors0.device)
    step = max(1, budget_bytes // (2 * wide.itemsize * max(1, descriptors0.shape[1])))
    for i in range(0, len(index), step):
        rows = slice(i, i + step)
        theirs = descriptors1[index[rows]].to(wide)
        torch.linalg.vecdot(descriptors0[rows].to(wide), theirs, out=out[rows])
    return out
