"""Against numbers of the reference implementation on fixed inputs (tests/golden)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from equifeat.geometry.camera import Camera, invert, transform
from equifeat.geometry.pixels import (
    from_integer_centers,
    pixel_centers,
    pixel_index,
    sample,
    to_integer_centers,
)
from tests.helpers import GOLDEN


@pytest.mark.parametrize("case", ["p14", "p16", "stride7"])
def test_sampling_matches_the_reference(case: str) -> None:
    """Corner-convention keypoints, border padding, keypoints up to 3 px outside."""
    data = {
        key.split(".")[1]: value
        for key, value in load_file(GOLDEN / "sample_features.safetensors").items()
        if key.startswith(f"{case}.")
    }
    features, image_hw = data["features"], data["image_hw"].tolist()
    patch, stride = data["patch_stride"].tolist()
    xy = data["keypoints"]
    h, w = features.shape[-2:]
    if patch == stride:
        assert (h * patch, w * patch) == tuple(image_hw)
        size_hw = (h * patch, w * patch)
    else:
        # Overlapping patches: the first centre lies at patch/2 and the grid covers less than the
        # image, so the map's own frame starts at (patch - stride) / 2.
        xy = xy - (patch - stride) / 2
        size_hw = (h * stride, w * stride)
    found = sample(features, xy, size_hw)
    assert found.shape == (1, xy.shape[1], features.shape[1])
    assert torch.allclose(found, data["sampled"].mT, atol=1e-5, rtol=1e-5)


def test_back_projection_of_integer_keypoints_matches_the_reference() -> None:
    """The reference unprojects the integer index itself: corner pixels without the half pixel."""
    with np.load(GOLDEN / "geometry.npz", allow_pickle=False) as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files}
    depth, xy = golden["depth"], golden["keypoints_integer"]
    size_hw = (depth.shape[0], depth.shape[1])
    camera, pose = Camera(golden["K"], size_hw), golden["cam_from_world"]
    column, row = xy.long().unbind(-1)
    z = depth[row, column]
    asked = transform(invert(pose), camera.unproject(xy, z))
    assert torch.allclose(asked, golden["points3d"], rtol=1e-5, atol=1e-9)

    # The same through the border functions: integer-centred data, and a K in the same convention
    # brought over with it. Only so do pixel and camera agree.
    ours = from_integer_centers(xy)
    assert torch.equal(pixel_index(ours), torch.stack([column, row], dim=-1))
    assert torch.equal(to_integer_centers(ours), xy)
    assert torch.equal(pixel_centers(size_hw, dtype=torch.float64)[row, column], ours)
    K = golden["K"].clone()
    K[:2, 2] = from_integer_centers(K[:2, 2])
    moved = transform(invert(pose), Camera(K, size_hw).unproject(ours, z))
    assert torch.allclose(moved, golden["points3d"], rtol=1e-5, atol=1e-9)

    # With a K of corner convention, as golden's principal point (32, 24) of 64x48 says, the
    # reference is half a pixel off: z / (2 f) in x and in y.
    right = camera.unproject(ours, z)
    wrong = camera.unproject(xy, z)
    half = z / (2 * golden["K"][0, 0])
    assert torch.allclose((right - wrong)[:, :2], half[:, None].expand(-1, 2))
