"""Pairs of pictures of one category with the same keypoints in both: what three data sets share.

Points are (x, y) as the files give them, read as pixels of the project's convention: none of the
three says where its first pixel's centre is, and published evaluations shift nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import EvalDataError


class KeypointPair(NamedTuple):
    """One pair of pictures.

    Attributes:
        name: Unique in its list.
        source: Picture the keypoints are given in.
        target: Picture they are looked for in.
        category: What both show.
        xy0: (N, 2) float64 keypoints in pixels of the source.
        xy1: (N, 2) float64 the same keypoints in the target.
        box1: (4,) float64 left, top, right, bottom of the target's object; None when the data set
            was read without boxes.
        labels: How hard the pair is, where the data set says so.
    """

    name: str
    source: Path
    target: Path
    category: str
    xy0: Tensor
    xy1: Tensor
    box1: Tensor | None = None
    labels: Mapping[str, str] = {}


class PairList(NamedTuple):
    """A read list of pairs.

    Attributes:
        pairs: In the order of the list.
        files: The list and annotations that were read.
        skipped: How many pairs of the list were left out.
    """

    pairs: Sequence[KeypointPair]
    files: Sequence[Path]
    skipped: int = 0


def points_of(
    where: str, x: Sequence[float | str], y: Sequence[float | str]
) -> Float[Tensor, "n 2"]:
    """Return coordinates as points.

    Args:
        where: For messages: file and line.
        x: N numbers.
        y: N numbers.

    Returns:
        (N, 2) float64.

    Raises:
        EvalDataError: They are not equally many finite numbers.
    """
    try:
        rows = [[float(a), float(b)] for a, b in zip(x, y, strict=True)]
    except (TypeError, ValueError) as error:
        raise EvalDataError(
            f"{where}: {len(x)} x and {len(y)} y are not equally many numbers ({error})."
        ) from error
    xy = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)
    if not torch.isfinite(xy).all():
        raise EvalDataError(f"{where}: coordinates are NaN or infinite; get the data set anew.")
    return xy
