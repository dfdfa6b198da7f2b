"""Metrics of TAP-Vid: position accuracy, occlusion accuracy, average Jaccard (arXiv 2211.03726)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equifeat.geometry.pixels import SizeHW, scale_xy

PIXELS = (1, 2, 4, 8, 16)
METRIC_HW: SizeHW = (256, 256)


def tapvid_metrics(
    query_frame: Int[Tensor, "n"],
    true_tracks: Float[Tensor, "n t 2"],
    true_occluded: Bool[Tensor, "n t"],
    tracks: Float[Tensor, "n t 2"],
    occluded: Bool[Tensor, "n t"],
    mode: Literal["strided", "first"] = "strided",
    size_hw: SizeHW = METRIC_HW,
) -> dict[str, float]:
    """Score the tracks of one video as tapnet's compute_tapvid_metrics does.

    A point counts in every frame but its query's; in mode "first" only after it. Within a
    threshold, a true positive is seen, predicted as seen and near enough; a false positive is
    predicted as seen but hidden or too far; Jaccard = TP / (true points seen + FP).

    Args:
        query_frame: Frame of each query.
        true_tracks: Where points are, in pixels of the video.
        true_occluded: Where they are hidden.
        tracks: Where they are predicted.
        occluded: Where they are predicted to be hidden.
        mode: Which frames count.
        size_hw: Height and width of the video; distances are measured after it is resized to
            256 × 256.

    Returns:
        "AJ", "δ_avg", "OA", and by threshold "δ<16" and "Jaccard@16", all in percent; NaN where no
        point is seen in a frame that counts.
    """
    frames = torch.arange(true_tracks.shape[1])
    at = query_frame.cpu()[:, None]
    counts = frames > at if mode == "first" else frames != at
    offset = scale_xy(tracks.double() - true_tracks.double(), size_hw, METRIC_HW)
    squared = offset.square().sum(dim=-1)
    seen, said = ~true_occluded & counts, ~occluded & counts
    out = {"OA": _percent(((true_occluded == occluded) & counts).sum(), counts.sum())}
    for pixels in PIXELS:
        near = squared < pixels**2
        true_positive = (near & seen & said).sum()
        false_positive = (said & ~(near & seen)).sum()
        out[f"δ<{pixels}"] = _percent((near & seen).sum(), seen.sum())
        out[f"Jaccard@{pixels}"] = _percent(true_positive, seen.sum() + false_positive)
    out["δ_avg"] = sum(out[f"δ<{p}"] for p in PIXELS) / len(PIXELS)
    out["AJ"] = sum(out[f"Jaccard@{p}"] for p in PIXELS) / len(PIXELS)
    return out


def _percent(part: Tensor, whole: Tensor) -> float:
    return 100.0 * int(part) / int(whole) if int(whole) else float("nan")
