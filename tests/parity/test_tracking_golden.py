"""Tracks, occlusions and TAP-Vid metrics equal the reference implementation's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from equifeat.eval.tracker import track
from equifeat.metrics.tapvid import METRIC_HW, PIXELS, tapvid_metrics
from equifeat.model.feature_map import FeatureMap
from tests.helpers import GOLDEN


@pytest.mark.parametrize("memory_mb", [512, 0])
def test_the_tracker_equals_the_reference(memory_mb: int) -> None:
    stored = load_file(GOLDEN / "tracker.safetensors")
    size_hw = (int(stored["image_hw"][0]), int(stored["image_hw"][1]))
    patch, stride = stored["patch_stride"].tolist()
    margin = (patch - stride) / 2
    maps = FeatureMap(stored["features"], size_hw, (margin, margin))
    found = track(maps, stored["queries_xyt"], memory_mb=memory_mb)
    torch.testing.assert_close(found.xy, stored["tracks_xy"], rtol=1e-5, atol=0.0)
    assert found.occluded.equal(stored["occluded"].bool())


@pytest.mark.parametrize("mode", ["strided", "first"])
def test_the_metrics_equal_the_reference(mode: str) -> None:
    with np.load(GOLDEN / "tapvid_metrics.npz") as file:
        stored = {
            k.removeprefix(f"{mode}."): torch.from_numpy(file[k][0:1])[0] for k in file if mode in k
        }
    found = tapvid_metrics(
        stored["query_tyx"][:, 0].round().long(),
        stored["gt_tracks_xy"],
        stored["gt_occluded"],
        stored["pred_tracks_xy"],
        stored["pred_occluded"],
        "first" if mode == "first" else "strided",
        METRIC_HW,
    )
    names = {
        "OA": "occlusion_accuracy",
        "AJ": "average_jaccard",
        "δ_avg": "average_pts_within_thresh",
        **{f"δ<{p}": f"pts_within_{p}" for p in PIXELS},
        **{f"Jaccard@{p}": f"jaccard_{p}" for p in PIXELS},
    }
    assert set(names) == set(found)
    for ours, theirs in names.items():
        expected = 100 * float(stored[f"metric.{theirs}"])
        assert found[ours] == pytest.approx(expected, rel=1e-5), ours
