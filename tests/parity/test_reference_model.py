"""An imported reference checkpoint against the outputs of the reference implementation.

Of the families that the reference takes from timm (MAE, CLIP, DeiT III) no checkpoint is at hand:
they are held against tests/reference_layout.py, whose sampling is held against golden numbers here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from equifeat.geometry.pixels import resize
from equifeat.model.backbone import Backbone
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.feature_map import FeatureMap
from equifeat.reference_checkpoint import ALIASES, import_reference
from tests.helpers import GOLDEN
from tests.model.test_weights import needs_packaged
from tests.reference_layout import Reference, sample_like_reference, with_lora, write_checkpoint

CASES = ["land", "port", "square"]
PATCHES = 20  # the reference's target side of 160, divided by 8
# Tiny, with all that is special about a family: CLIP's norm before the blocks, DeiT's position
# embedding of patches only, the registers of DINOv2 that the reference knows how to skip.
FAMILIES: dict[str, dict[str, Any]] = {
    "mae-base": {"img_size": 64},
    "clip-base": {"img_size": 96},
    "deit3-base": {"img_size": 64, "init_values": 0.5},
    "dinov2-reg-base": {"img_size": 70, "init_values": 0.5},
}
# On its longer side 12 patches; on the shorter one rounding and flooring differ in two of three.
SIZES = {"land": (77, 101), "port": (120, 85), "square": (64, 64)}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "reference_features.safetensors")


@pytest.fixture(scope="module")
def imported() -> FeatureExtractor:
    return import_reference(GOLDEN / "reference_dinov2_small.ckpt")


@needs_packaged
@pytest.mark.parametrize("case", CASES)
def test_descriptors_at_keypoints(
    case: str, golden: dict[str, Tensor], imported: FeatureExtractor
) -> None:
    with torch.no_grad():
        out = imported.at(golden[f"{case}.image"], golden[f"{case}.keypoints"], PATCHES)
    assert torch.allclose(out, golden[f"{case}.descriptors"], rtol=0, atol=1e-5)


@needs_packaged
@pytest.mark.parametrize("case", CASES)
def test_full_resolution_features(
    case: str, golden: dict[str, Tensor], imported: FeatureExtractor
) -> None:
    with torch.no_grad():
        out = imported.dense(golden[f"{case}.image"], PATCHES, at="image").normalized()
    every8 = out.features[:, :, ::8, ::8].permute(0, 2, 3, 1)
    assert torch.allclose(every8, golden[f"{case}.dense_stride8"], rtol=0, atol=1e-5)


@needs_packaged
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


@needs_packaged
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


def tiny(alias: str) -> Any:
    """A timm model of a family, small and with random weights."""
    name, _ = ALIASES[alias]
    small: dict[str, Any] = {"depth": 5, "embed_dim": 32, "num_heads": 2, **FAMILIES[alias]}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, **small)
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return vit.eval()


def inputs(size_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Two pictures, and points in them with corners among them."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, *size_hw, generator=generator)
    h, w = size_hw
    corners = torch.tensor([[0.5, 0.5], [w - 0.5, h - 0.5], [w - 0.5, 0.5]]).expand(2, 3, 2)
    points = torch.rand(2, 20, 2, generator=generator) * torch.tensor([float(w), float(h)])
    return image, torch.cat([corners, points], dim=1)


@pytest.mark.parametrize("case", ["p14", "p16"])
def test_sampling_written_anew_is_the_references(case: str) -> None:
    golden = load_file(GOLDEN / "sample_features.safetensors")
    (h, w), patch = golden[f"{case}.image_hw"].tolist(), int(golden[f"{case}.patch_stride"][0])
    features, points = golden[f"{case}.features"], golden[f"{case}.keypoints"]
    found = sample_like_reference(features, points, h, w, patch)
    torch.testing.assert_close(found, golden[f"{case}.sampled"], rtol=0, atol=1e-5)
    # With patches of 16 the reference forgets to say so, and its 14 stays.
    rows, columns = features.shape[-2:]
    faulty = sample_like_reference(features, points, rows * 14, columns * 14)
    maps = FeatureMap(features, (h, w), point_scale=patch / 14)
    ours = maps.sample(points, normalize=False).mT
    torch.testing.assert_close(ours, faulty, rtol=0, atol=1e-4)
    exact = FeatureMap(features, (h, w)).sample(points, normalize=False).mT
    torch.testing.assert_close(exact, found, rtol=0, atol=1e-4)
    assert (float((faulty - found).abs().max()) > 0.1) == (patch == 16)


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("alias", FAMILIES)
def test_families_of_timm_with_the_references_sampling(
    alias: str, case: str, tmp_path: Path
) -> None:
    content = write_checkpoint(tmp_path / "x.ckpt", 32, 4)
    backbone = Backbone(tiny(alias), ALIASES[alias][0])
    model = import_reference(tmp_path / "x.ckpt", backbone, sampling="reference")
    reference = Reference(with_lora(tiny(alias), content), content, target_side=96)
    image, points = inputs(SIZES[case])
    with torch.no_grad():
        maps = model.dense(image, 12)
        dense = model.dense(image, 12, at="image").normalized().features
        found = model.at(image, points, 12)
    assert maps.grid_hw == tuple(reference.patch_map(image).shape[-2:])
    torch.testing.assert_close(dense, reference.dense(image), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, reference.at(image, points), rtol=0, atol=1e-5)
    torch.testing.assert_close(maps.sample(points), found)


def test_exact_sampling_differs_by_the_fault_alone(tmp_path: Path) -> None:
    content = write_checkpoint(tmp_path / "x.ckpt", 32, 4)
    backbone = Backbone(tiny("mae-base"), ALIASES["mae-base"][0])
    model = import_reference(tmp_path / "x.ckpt", backbone)
    reference = Reference(with_lora(tiny("mae-base"), content), content, target_side=96)
    image, points = inputs((64, 64))  # on the same grid either way
    with torch.no_grad():
        found = model.at(image, points * 0.875, 12), model.at(image, points * 0.875 * 0.875, 12)
    faulty = reference.at(image, points * 0.875 * 0.875)
    # where the reference is asked for 14/16 of a point it gives the point itself
    torch.testing.assert_close(found[0], faulty, rtol=0, atol=1e-5)
    assert float((found[1] - faulty).abs().max()) > 0.1


def test_the_whole_map_is_resized_without_the_fault() -> None:
    """Also where patches overlap and the map is sampled, not resized."""
    features = torch.rand(1, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    for margin in (0.0, 3.0):
        faulty = FeatureMap(features, (80, 112), (margin, margin), 16 / 14)
        exact = FeatureMap(features, (80, 112), (margin, margin))
        assert torch.equal(faulty.at_image().features, exact.at_image().features)
        assert torch.equal(faulty.centers(), exact.centers())
        assert faulty.normalized().point_scale == 16 / 14
