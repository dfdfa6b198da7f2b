"""Ratio test: matches whose nearest neighbour is much nearer than the second, best ones first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import CorrespondenceError, RecipeError
from equifeat.eval.matching import DEFAULT_BUDGET

_MIN_ROWS = 64
# Distances below this count as this, so that equal descriptors have a ratio.
_LEAST = 1e-9


class BestMatches(NamedTuple):
    """Chosen matches, best first.

    Attributes:
        rows0: (K,) int64 rows of descriptors0.
        rows1: (K,) int64 rows of descriptors1.
        score: (K,) what they were chosen by; higher is better.
    """

    rows0: Tensor
    rows1: Tensor
    score: Tensor


def two_nearest(
    descriptors0: Float[Tensor, "n d"],
    descriptors1: Float[Tensor, "m d"],
    budget_bytes: int = DEFAULT_BUDGET,
) -> tuple[Float[Tensor, "n 2"], Tensor]:
    """Find the two most similar rows of descriptors1 for every row of descriptors0.

    Args:
        descriptors0: (N, D) L2-normalised descriptors.
        descriptors1: (M, D) L2-normalised descriptors, M ≥ 1.
        budget_bytes: Largest block of the similarity matrix, in bytes.

    Returns:
        (N, 2) similarities, the nearest first, and the (N,) int64 row of the nearest. With M = 1
        the second similarity is -1, the least there is.

    Raises:
        CorrespondenceError: There is nothing to match against.
        RecipeError: The budget is below one entry.
    """
    n, m = len(descriptors0), len(descriptors1)
    if not m:
        raise CorrespondenceError("there are 0 descriptors to match against; give at least one.")
    dtype = torch.promote_types(descriptors0.dtype, torch.float32)
    entries = budget_bytes // dtype.itemsize
    if entries < 1:
        raise RecipeError(
            f"budget_bytes={budget_bytes} does not hold one similarity of {dtype.itemsize} bytes; "
            "give at least a few megabytes."
        )
    columns = min(m, max(1, entries // min(_MIN_ROWS, max(n, 1))))
    rows = max(1, entries // columns)
    best = torch.full((n, 2), -torch.inf, dtype=dtype, device=descriptors0.device)
    index = torch.zeros(n, dtype=torch.int64, device=descriptors0.device)
    for i in range(0, n, rows):
        part, at = best[i : i + rows], index[i : i + rows]
        for j in range(0, m, columns):
            block = descriptors0[i : i + rows].to(dtype) @ descriptors1[j : j + columns].to(dtype).T
            first, where = block.max(dim=1)
            block.scatter_(1, where[:, None], -torch.inf)
            second = block.amax(dim=1)
            better = first > part[:, 0]
            # the two best of four: the loser of the firsts may still be second
            runner_up = torch.maximum(
                torch.minimum(first, part[:, 0]), torch.where(better, second, part[:, 1])
            )
            at.copy_(torch.where(better, where + j, at))
            part[:, 0] = torch.maximum(first, part[:, 0])
            part[:, 1] = runner_up
    return best.clamp_(min=-1.0), index


def best_matches(
    descriptors0: Float[Tensor, "n d"],
    descriptors1: Float[Tensor, "m d"],
    count: int,
    ratio: bool = True,
    budget_bytes: int = DEFAULT_BUDGET,
) -> BestMatches:
    """Choose the best matches from descriptors0 to their nearest in descriptors1.

    As Probe3D (github.com/mbanani/probe3d, evals/utils/correspondence.py): the score is 1 - d1 / d2
    with the cosine distances to the nearest and second-nearest. Without the ratio it is the
    similarity (Probe3D's own switch keeps the most distant instead).

    Args:
        descriptors0: (N, D) L2-normalised descriptors.
        descriptors1: (M, D) L2-normalised descriptors, M ≥ 1.
        count: How many to choose, all if there are fewer; 0 chooses all.
        ratio: Choose by the ratio rather than by similarity.
        budget_bytes: Largest block of the similarity matrix, in bytes.

    Returns:
        The matches.

    Raises:
        CorrespondenceError: There is nothing to match against.
        RecipeError: The budget is below one entry.
    """
    similarity, index = two_nearest(descriptors0, descriptors1, budget_bytes)
    score = similarity[:, 0]
    if ratio:
        distance = (1.0 - similarity).clamp(min=_LEAST)
        score = 1.0 - distance[:, 0] / distance[:, 1]
    kept = min(count, len(score)) if count else len(score)
    top = torch.topk(score, kept)
    return BestMatches(top.indices, index[top.indices], top.values)
