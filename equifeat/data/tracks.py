"""Sparse correspondences of a real capture: points that several views see.

Convention:
    Row n of view i says that the point ``points3d[point_ids[i][n]]`` was seen at the pixel
    ``xy[i][n]``, corner convention. A point appears at most once in a view.

    >>> tracks = Tracks(
    ...     xy=[torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0]])],
    ...     point_ids=[torch.tensor([0, 1]), torch.tensor([1])],
    ...     points3d=torch.zeros(2, 3),
    ... )
    >>> tracks.shared(0, 1)
    (tensor([1]), tensor([0]))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equifeat.geometry.pixels import pixel_index


@dataclass(frozen=True)
class Tracks:
    """Where the views of one object see its points.

    Both sequences may be lazy: a reader that must look at pictures to know what a view sees gives
    its own Sequence, and asking for view i costs what reading view i costs.

    Args:
        xy: For every view (N_i, 2) pixels.
        point_ids: For every view (N_i,) int64 rows of points3d, each at most once.
        points3d: (P, 3) points in object coordinates.
    """

    xy: Sequence[Tensor]
    point_ids: Sequence[Tensor]
    points3d: Float[Tensor, "p 3"]

    def __len__(self) -> int:
        return len(self.xy)

    def shared(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        """Return which observations of two views are of the same points.

        Args:
            i: Index of a view.
            j: Index of another.

        Returns:
            (M,) rows of view i and (M,) rows of view j, in order of their points.
        """
        _, rows_i, rows_j = np.intersect1d(
            self.point_ids[i].numpy(),
            self.point_ids[j].numpy(),
            assume_unique=True,
            return_indices=True,
        )
        return torch.from_numpy(rows_i), torch.from_numpy(rows_j)

    def shared_counts(self) -> Int[Tensor, "v v"]:
        """Return how many points every two views share.

        Returns:
            (V, V) counts; the diagonal holds the points of each view.
        """
        sees = torch.zeros(len(self), len(self.points3d))
        for i, ids in enumerate(self.point_ids):
            sees[i, ids] = 1.0
        return (sees @ sees.T).round().long()

    def seen_on(self, i: int, mask: Bool[Tensor, "h w"]) -> Bool[Tensor, "n"]:
        """Return which observations of a view lie on the object.

        Args:
            i: Index of the view.
            mask: (H, W) its mask.

        Returns:
            (N_i,) booleans.
        """
        column, row = pixel_index(self.xy[i]).unbind(-1)
        return mask[row, column]


class DrawnKeypoints(NamedTuple):
    """Keypoints of two views with their 3D points.

    Attributes:
        keypoints0: (N, 2) pixels of view 0.
        keypoints1: (M, 2) pixels of view 1.
        points3d0: (N, 3) object coordinates.
        points3d1: (M, 3) object coordinates.
    """

    keypoints0: Tensor
    keypoints1: Tensor
    points3d0: Tensor
    points3d1: Tensor


def draw_keypoints(
    tracks: Tracks,
    views: tuple[int, int],
    masks: tuple[Tensor, Tensor],
    count: int,
    matched: bool,
    rng: np.random.Generator,
) -> DrawnKeypoints:
    """Draw keypoints of two views from what they see.

    Args:
        tracks: What the views see.
        views: Their indices.
        masks: Their (H, W) masks; points beside the object are not drawn.
        count: Keypoints a view.
        matched: True for points that both views see, at most count, row n the same point in both;
            False for an independent choice in each view, with repetitions where there are too few.
        rng: Source of every random number.

    Returns:
        The keypoints.
    """
    on0, on1 = (tracks.seen_on(i, mask) for i, mask in zip(views, masks, strict=True))
    if matched:
        rows0, rows1 = tracks.shared(*views)
        both = (on0[rows0] & on1[rows1]).nonzero()[:, 0]
        if len(both) > count:
            both = both[torch.from_numpy(np.sort(rng.choice(len(both), count, replace=False)))]
        rows0, rows1 = rows0[both], rows1[both]
    else:
        rows0, rows1 = (_choose(on, count, rng) for on in (on0, on1))
    i, j = views
    return DrawnKeypoints(
        tracks.xy[i][rows0],
        tracks.xy[j][rows1],
        tracks.points3d[tracks.point_ids[i][rows0]],
        tracks.points3d[tracks.point_ids[j][rows1]],
    )


def _choose(on: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    rows = on.nonzero()[:, 0]
    if len(rows) == 0:
        return rows
    return rows[torch.from_numpy(rng.choice(len(rows), count, replace=len(rows) < count))]
