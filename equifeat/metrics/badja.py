"""Metrics of BADJA: joints near enough to where they are (arXiv 1811.05804, as PIPs scores it)."""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from equifeat.geometry.pixels import SizeHW


class JointAccuracy(NamedTuple):
    """Shares in percent; NaN when no joint counts.

    Attributes:
        seg: Joints within 0.2 · sqrt(area of the animal's mask).
        px3: Joints within 3 px.
    """

    seg: float
    px3: float


def joint_accuracy(
    true_tracks: Float[Tensor, "n t 2"],
    visible: Bool[Tensor, "n t"],
    tracks: Float[Tensor, "n t 2"],
    mask_px: Float[Tensor, "t"],
    size_hw: SizeHW,
    height: int = 480,
) -> JointAccuracy:
    """Score tracks that start in frame 0.

    Args:
        true_tracks: Where joints are, in pixels of the video.
        visible: Where they are annotated and seen.
        tracks: Where they are predicted.
        mask_px: Pixels of the animal's mask in every frame.
        size_hw: Height and width of the video.
        height: The 3 px are pixels of the video at this height.

    Returns:
        Both shares, over all visible joints of frames 1, 2, ….
    """
    off = (tracks.double() - true_tracks.double()).norm(dim=-1)[:, 1:]
    counts = visible[:, 1:]
    total = int(counts.sum())
    if not total:
        return JointAccuracy(math.nan, math.nan)
    seg = off < 0.2 * mask_px.double().sqrt()[1:]
    px3 = off * (height / size_hw[0]) < 3.0
    return JointAccuracy(*(100.0 * int((hit & counts).sum()) / total for hit in (seg, px3)))
