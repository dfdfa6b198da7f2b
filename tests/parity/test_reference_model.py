"""An imported reference checkpoint against the outputs of the reference implementation."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from equifeat.checkpoint import import_reference
from equifeat.geometry.pixels import resize
from equifeat.model.extractor import FeatureExtractor, build_extractor
from tests.helpers import GOLDEN
from tests.model.test_weights import needs_packaged

CASES = ["land", "port", "square"]
PATCHES = 20  # the reference's target side of 160, divided by 8

pytestmark = needs_packaged


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "reference_features.safetensors")


@pytest.fixture(scope="module")
def imported() -> FeatureExtractor:
    return import_reference(GOLDEN / "reference_dinov2_small.ckpt")


@pytest.mark.parametrize("case", CASES)
def test_descriptors_at_keypoints(
    case: str, golden: dict[str, Tensor], imported: FeatureExtractor
) -> None:
    with torch.no_grad():
        out = imported.at(golden[f"{case}.image"], golden[f"{case}.keypoints"], PATCHES)
    assert torch.allclose(out, golden[f"{case}.descriptors"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_full_resolution_features(
    case: str, golden: dict[str, Tensor], imported: FeatureExtractor
) -> None:
    with torch.no_grad():
        out = imported.dense(golden[f"{case}.image"], PATCHES, at="image").normalized()
    every8 = out.features[:, :, ::8, ::8].permute(0, 2, 3, 1)
    assert torch.allclose(every8, golden[f"{case}.dense_stride8"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_tokens_before_the_head(
    case: str, golden: dict[str, Tensor], imported: FeatureExtractor
) -> None:
    headless = FeatureExtractor(imported.backbone, imported.adapter)
    image = resize(golden[f"{case}.image"], (140, 140), antialias=False)
    with torch.no_grad():
        tokens = headless.dense(image).features.flatten(2).transpose(1, 2)
    # Tokens are not normalised: values up to 7.
    assert torch.allclose(tokens[:, ::7], golden[f"{case}.patch_tokens_140"], rtol=0, atol=1e-4)


def test_timms_own_resampling_would_miss_the_reference(
    golden: dict[str, Tensor], imported: FeatureExtractor
) -> None:
    """The reference's position mode is needed: without it descriptors are off by up to 5e-3."""
    image, keypoints = golden["land.image"], golden["land.keypoints"]
    imported.backbone.position = "timm"
    try:
        with torch.no_grad():
            out = imported.at(image, keypoints, PATCHES)
    finally:
        imported.backbone.position = "reference"
    worst = float((out - golden["land.descriptors"]).abs().max())
    assert 1e-3 < worst < 1e-2


def test_trainable_parameters_are_as_many_as_the_references() -> None:
    extractor = build_extractor("vit_small_patch14_dinov2", head="conv")
    count = sum(value.numel() for value in extractor.trainable_parameters().values())
    assert count == 1_352_064
