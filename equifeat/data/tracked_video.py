"""A video with point tracks, and how queries are drawn from tracks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

QueryMode = Literal["strided", "first"]


class Queries(NamedTuple):
    """Points to track and where they truly are.

    Attributes:
        frame: (N,) frame of each query.
        xy: (N, 2) where it is there, in pixels of the video.
        tracks: (N, T, 2) where it truly is in every frame, in pixels.
        occluded: (N, T) whether it is hidden or outside there.
    """

    frame: Int[Tensor, "n"]
    xy: Float[Tensor, "n 2"]
    tracks: Float[Tensor, "n t 2"]
    occluded: Bool[Tensor, "n t"]

    @property
    def xyt(self) -> Float[Tensor, "n 3"]:
        """x, y and frame of each query."""
        return torch.cat([self.xy, self.frame[:, None].to(self.xy)], dim=1)


@dataclass(frozen=True)
class TrackedVideo:
    """A video with queries.

    Args:
        name: Its name.
        size_hw: Height and width of its frames.
        read: Gives frame t as (3, H, W) RGB in [0, 1].
        queries: The points to track, in pixels of the frames.
    """

    name: str
    size_hw: tuple[int, int]
    read: Callable[[int], Tensor]
    queries: Queries

    def __len__(self) -> int:
        return int(self.queries.tracks.shape[1])


def strided_queries(
    tracks: Float[Tensor, "p t 2"], occluded: Bool[Tensor, "p t"], stride: int = 5
) -> Queries:
    """Ask for every point in every n-th frame where it is seen (TAP-Vid's "strided").

    Args:
        tracks: Points in pixels.
        occluded: Where they are hidden.
        stride: Frames from one query to the next.

    Returns:
        The queries, by frame, then by point.
    """
    seen = (~occluded[:, ::stride]).T
    at, point = seen.nonzero(as_tuple=True)
    return _ask(tracks, occluded, point, at * stride)


def first_queries(tracks: Float[Tensor, "p t 2"], occluded: Bool[Tensor, "p t"]) -> Queries:
    """Ask for every point in the first frame where it is seen (TAP-Vid's "first").

    Args:
        tracks: Points in pixels.
        occluded: Where they are hidden.

    Returns:
        The queries; points that are never seen are left out.
    """
    point = (~occluded).any(dim=1).nonzero()[:, 0]
    frame = (~occluded[point]).int().argmax(dim=1)
    return _ask(tracks, occluded, point, frame)


def _ask(tracks: Tensor, occluded: Tensor, point: Tensor, frame: Tensor) -> Queries:
    return Queries(frame, tracks[point, frame], tracks[point], occluded[point])
