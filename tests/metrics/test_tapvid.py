"""TAP-Vid's and BADJA's metrics against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from equifeat.metrics.badja import joint_accuracy
from equifeat.metrics.tapvid import tapvid_metrics


def slow_metrics(
    frames: Tensor, true: Tensor, hidden: Tensor, xy: Tensor, said: Tensor, first: bool
) -> dict[str, float]:
    """Count true positives, false positives and false negatives one by one, in 256 x 256."""
    within, jaccard, right, total = [], [], 0, 0
    for limit in (1, 2, 4, 8, 16):
        tp = fp = fn = near_seen = seen = right = total = 0
        for n in range(len(true)):
            for t in range(true.shape[1]):
                start = int(frames[n])
                if t <= start if first else t == start:
                    continue
                near = math.dist(true[n, t].tolist(), xy[n, t].tolist()) < limit
                is_seen, says = not bool(hidden[n, t]), not bool(said[n, t])
                total += 1
                right += is_seen == says
                seen += is_seen
                near_seen += is_seen and near
                hit = is_seen and near and says
                tp += hit
                fp += says and not hit
                fn += is_seen and not hit
        within.append(100 * near_seen / seen)
        jaccard.append(100 * tp / (tp + fp + fn))
    return {"AJ": sum(jaccard) / 5, "δ_avg": sum(within) / 5, "OA": 100 * right / total}


@pytest.mark.parametrize("mode", ["strided", "first"])
def test_metrics_equal_counting_one_by_one(mode: str) -> None:
    generator = torch.Generator().manual_seed(3)
    true = 256 * torch.rand(14, 9, 2, generator=generator, dtype=torch.float64)
    off = torch.randn(14, 9, 2, generator=generator, dtype=torch.float64)
    xy = true + off * 12 * torch.rand(14, 9, 1, generator=generator, dtype=torch.float64)
    hidden = torch.rand(14, 9, generator=generator) < 0.4
    said = torch.rand(14, 9, generator=generator) < 0.4
    frames = torch.randint(0, 6, (14,), generator=generator)
    expected = slow_metrics(frames, true, hidden, xy, said, mode == "first")
    # a video of another size is the same after resizing
    size = true.new_tensor([854 / 256, 480 / 256])
    found = tapvid_metrics(
        frames,
        true * size,
        hidden,
        xy * size,
        said,
        "first" if mode == "first" else "strided",
        (480, 854),
    )
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


def test_a_video_that_says_nothing_scores_nan() -> None:
    true, hidden = torch.zeros(1, 3, 2), torch.tensor([[False, True, True]])
    found = tapvid_metrics(torch.tensor([0]), true, hidden, true, hidden)
    assert math.isnan(found["δ_avg"])
    assert found["OA"] == 100.0
    # hidden points may have no place; what is said to be seen there is false
    true = torch.full_like(true, torch.nan)
    found = tapvid_metrics(torch.tensor([0]), true, hidden, true, ~hidden)
    assert found["AJ"] == found["OA"] == 0.0


def test_joints_count_where_they_are_seen_after_the_first_frame() -> None:
    true = torch.zeros(2, 3, 2)
    xy = true.clone()
    xy[0, 1, 0], xy[1, 1, 1], xy[0, 2, 0] = 3.1, 1.4, 40.0
    visible = torch.tensor([[True, True, True], [True, True, False]])
    area = torch.tensor([0.0, 100.0, 40000.0])
    found = joint_accuracy(true, visible, xy, area, (480, 854))
    # limits are 2 px and 40 px, and "within" leaves the limit itself out
    assert found.seg == pytest.approx(100 / 3)
    assert found.px3 == pytest.approx(100 / 3)
    assert joint_accuracy(true, visible, xy, area, (960, 1708)).px3 == pytest.approx(200 / 3)
    assert math.isnan(joint_accuracy(true, visible & False, xy, area, (4, 4)).seg)
