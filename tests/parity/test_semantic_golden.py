"""The frame of PF-PASCAL pictures against the reference's own numbers (tests/golden)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from equifeat.eval.locate_dot import corner_places, locate_dot
from equifeat.eval.semantic_frame import frame_of, show
from equifeat.model.feature_map import FeatureMap
from tests.helpers import GOLDEN


@pytest.mark.parametrize("case", range(3))
def test_padded_keypoints_match_the_reference(case: int) -> None:
    with np.load(GOLDEN / "geometry.npz", allow_pickle=False) as file:
        golden = {
            key.split(".")[1]: torch.from_numpy(file[key])
            for key in file.files
            if key.startswith(f"pad{case}.")
        }
    w, h = golden["size_wh"].tolist()
    frame = frame_of((h, w), "pad", 840)
    *offset, scale = golden["offset_scale"].tolist()
    assert frame.size_hw == (840, 840)
    assert list(frame.offset_xy) == offset
    assert frame.scale_xy == pytest.approx((scale, scale), rel=1e-12)

    visible = golden["keypoints_vis"][:, 2] > 0
    assert 0 < int(visible.sum()) < len(visible)
    xy = golden["keypoints_vis"][visible, :2]
    # hidden keypoints are zeroed there, and not in the lists here
    assert torch.allclose(frame.carry(xy), golden["out"][visible, :2], rtol=1e-5, atol=0)
    assert torch.equal(golden["out"][~visible, :2], torch.zeros(int((~visible).sum()), 2))
    assert torch.allclose(frame.back(frame.carry(xy)), xy, atol=1e-4)


@pytest.mark.parametrize("size_hw", [(225, 300), (300, 199), (101, 77), (64, 64), (90, 301)])
def test_picture_lies_where_the_keypoints_go(size_hw: tuple[int, int]) -> None:
    """Padding as in the reference's resize(): slices (W - h) // 2 to (W + h) // 2."""
    h, w = size_hw
    side = 168
    pixels = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    canvas = np.zeros((side, side, 3), np.uint8)
    new_h, new_w = (
        (int(np.around(side * h / w)), side) if h <= w else (side, int(np.around(side * w / h)))
    )
    resized = np.asarray(Image.fromarray(pixels).resize((new_w, new_h), Image.Resampling.LANCZOS))
    if h <= w:
        canvas[(side - new_h) // 2 : (side + new_h) // 2] = resized
    else:
        canvas[:, (side - new_w) // 2 : (side + new_w) // 2] = resized
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255.0
    got = show(image, frame_of(size_hw, "pad", side))
    assert torch.equal((got * 255).round().byte().permute(1, 2, 0), torch.from_numpy(canvas))


def test_search_matches_the_reference_steps() -> None:
    """evaluate.py: resize to the patch centres' extent with aligned corners, repeat the edge."""
    patch, count = 14, 6
    side, extent = patch * count, patch * (count - 1) + 1
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 16, count, count, generator=generator)
    descriptors = torch.nn.functional.normalize(torch.randn(60, 16, generator=generator), dim=1)
    large = torch.nn.functional.interpolate(
        features, size=(extent, extent), mode="bilinear", align_corners=True
    )
    before, after = patch // 2, side - extent - patch // 2
    large = torch.nn.functional.pad(large, (before, after, before, after), mode="replicate")
    assert large.shape[-2:] == (side, side)
    products = descriptors @ large[0].flatten(1)
    index = products.argmax(dim=1)
    expected = torch.stack([index % side, index // side], dim=1).float()
    square = (side, side)
    found = locate_dot(descriptors, FeatureMap(features, square), corner_places(square, square))
    assert torch.allclose(found.similarity, products.amax(dim=1), atol=1e-5)
    assert torch.equal(found.xy, found.xy.round())
    apart = (found.xy - expected).abs().amax(dim=1)
    # where the edge is repeated all places of half a patch are equal up to rounding
    inner = ((expected > patch) & (expected < side - patch)).all(dim=1)
    assert int(inner.sum()) >= 10
    assert float(apart[inner].max()) == 0.0
    assert float(apart.max()) <= patch / 2
