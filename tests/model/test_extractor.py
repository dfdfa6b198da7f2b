from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equifeat.errors import ImageError, KeypointError, RecipeError
from equifeat.geometry import pixels
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.feature_map import FeatureMap, TrunkState
from equifeat.model.head import HeadKind
from tests.model.tiny import KINDS, backbone, images, randomize

HEADS: list[HeadKind] = ["none", "conv", "residual"]


def tiny(kind: str = "dinov2", head: HeadKind = "conv", blocks: int = 2) -> FeatureExtractor:
    extractor = build_extractor(backbone(kind), head=head, lora_blocks=blocks, lora_rank=2)
    if extractor.adapter is not None:
        randomize(extractor.adapter)
    return extractor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_dense_has_the_size_of_the_image_in_patches(kind: str, head: HeadKind) -> None:
    extractor = tiny(kind, head)
    p = extractor.patch_size
    out = extractor.dense(images(2, 3 * p + 2, 5 * p - 3))
    assert out.features.shape == (2, extractor.dim, 3, 5)
    assert out.size_hw == (3 * p + 2, 5 * p - 3)
    assert out.stride == ((3 * p + 2) / 3, (5 * p - 3) / 5)
    full = extractor.dense(images(1, 2 * p, 3 * p), at="image")
    assert full.features.shape == (1, extractor.dim, 2 * p, 3 * p)
    assert full.stride == (1.0, 1.0)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 100))
def test_grid_keeps_the_aspect_and_the_longer_side(h: int, w: int, resolution: int) -> None:
    extractor = FeatureExtractor(BACKBONE)
    grid = extractor.grid_hw((h, w), resolution)
    assert max(grid) == resolution
    assert min(grid) >= 1
    exact = min(h, w) / max(h, w) * resolution
    assert abs(min(grid) - max(exact, 1)) <= 0.5
    own = extractor.grid_hw((h, w))
    assert abs(own[0] * 14 - max(h, 14)) <= 7
    assert abs(own[1] * 14 - max(w, 14)) <= 7


BACKBONE = backbone("dinov2")


def test_reference_grid_rounds_down_as_the_reference() -> None:
    extractor = FeatureExtractor(backbone("dinov2", position="reference"))
    assert extractor.grid_hw((480, 640), 80) == (60, 80)
    assert extractor.grid_hw((100, 128), 20) == (15, 20)  # 125 // 8
    assert FeatureExtractor(BACKBONE).grid_hw((100, 128), 20) == (16, 20)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_a_batch_gives_what_single_images_give(kind: str) -> None:
    extractor = tiny(kind)
    batch = images(3, 50, 71)
    together = extractor.dense(batch, 4).features
    for index in range(3):
        alone = extractor.dense(batch[index : index + 1], 4).features[0]
        assert torch.allclose(together[index], alone, atol=1e-5)


def test_at_samples_dense() -> None:
    extractor = tiny()
    image = images(2, 45, 70)
    keypoints = torch.rand(2, 9, 2) * torch.tensor([70.0, 45.0])
    out = extractor.at(image, keypoints, 6)
    dense = extractor.dense(image, 6)
    assert torch.equal(out, dense.sample(keypoints))
    assert torch.allclose(out.norm(dim=-1), torch.ones(2, 9), atol=1e-5)
    by_hand = pixels.sample(dense.features, keypoints, (45, 70))
    assert torch.allclose(dense.sample(keypoints, normalize=False), by_hand)
    assert torch.allclose(out, by_hand / by_hand.norm(dim=-1, keepdim=True), atol=1e-5)
    # At the patches' centres, sampling gives the patches themselves.
    centres = pixels.patch_centers(dense.grid_hw, (45, 70)).reshape(1, -1, 2).expand(2, -1, -1)
    expected = dense.normalized().features.flatten(2).transpose(1, 2)
    assert torch.allclose(dense.sample(centres), expected, atol=1e-4)


@pytest.mark.parametrize("head", ["none", "residual"])
def test_untrained_model_is_exactly_the_raw_vit(head: HeadKind) -> None:
    extractor = build_extractor(backbone("dinov2"), head=head, lora_blocks=3)
    image = images()
    assert torch.equal(extractor.dense(image).features, extractor.raw().dense(image).features)


def test_extractors_share_one_backbone_without_disturbing_each_other() -> None:
    shared = backbone("dinov2")
    image = images()
    raw = build_extractor(shared, head="none", lora_blocks=0)
    before = raw.dense(image).features
    trained = build_extractor(shared, head="none", lora_blocks=2)
    assert trained.adapter is not None
    randomize(trained.adapter)
    changed = trained.dense(image).features
    assert not torch.equal(changed, before)
    assert torch.equal(raw.dense(image).features, before)
    assert torch.equal(trained.raw().dense(image).features, before)
    assert torch.equal(trained.dense(image).features, changed)
    assert trained.raw().backbone is shared


def test_only_adapter_and_head_train() -> None:
    extractor = tiny().train()
    names = extractor.trainable_parameters()
    assert {name.split(".")[0] for name in names} == {"adapter", "head"}
    assert len(names) == 2 * 2 * 2 + 2
    assert not any(module.training for module in extractor.backbone.modules())
    frozen = {key: value.clone() for key, value in extractor.backbone.state_dict().items()}
    optimizer = torch.optim.AdamW(extractor.parameters(), lr=0.1)
    before = extractor.dense(images()).features
    torch.autograd.backward(before.square().mean())
    optimizer.step()
    assert not torch.allclose(extractor.dense(images()).features, before)
    assert all(
        torch.equal(value, frozen[key]) for key, value in extractor.backbone.state_dict().items()
    )


def test_no_graph_is_built_through_frozen_blocks() -> None:
    extractor = tiny()
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        state = extractor.trunk(images())
    assert not saved
    assert not state.tokens.requires_grad
    raw = extractor.raw().dense(images())
    assert not raw.features.requires_grad


def test_cached_trunk_gives_the_same_features() -> None:
    extractor = tiny()
    image = images(2)
    expected = extractor.dense(image, 5).features
    states = [extractor.trunk(image[i : i + 1], 5) for i in range(2)]
    joined = TrunkState.cat([state.to("cpu") for state in states])
    assert torch.allclose(extractor.tail(joined).features, expected, atol=1e-5)
    half = joined.to(dtype=torch.float16)
    assert half.tokens.dtype == torch.float16
    assert torch.allclose(extractor.tail(half).features, expected, atol=0.05)
    assert extractor.tail(half).features.dtype == torch.float32
    with pytest.raises(ValueError, match="one image size"):
        TrunkState.cat([states[0], extractor.trunk(image, 4)])
    with pytest.raises(ValueError, match="make it with this extractor's trunk"):
        extractor.tail(extractor.raw().trunk(image))


def test_merged_extractor_gives_the_same_features_without_an_adapter() -> None:
    extractor = tiny()
    merged = extractor.merged()
    assert merged.adapter is None
    assert torch.allclose(
        merged.dense(images()).features, extractor.dense(images()).features, atol=1e-5
    )
    assert extractor.adapter is not None
    assert merged.backbone.weights_hash() != extractor.backbone.weights_hash()


def test_autocast_and_half_maps_keep_exact_coordinates() -> None:
    extractor = tiny()
    image, keypoints = images(1, 60, 80), torch.rand(1, 5, 2) * 60
    expected = extractor.at(image, keypoints)
    with torch.autocast("cpu", torch.bfloat16):
        out = extractor.at(image, keypoints)
    assert out.dtype == torch.float32
    assert float((out * expected).detach().sum(-1).min()) > 0.99
    ramp = pixels.pixel_centers((1, 600)).permute(2, 0, 1)[None, :1]
    halved = FeatureMap(ramp.half(), (1, 600))
    at = torch.tensor([[[301.25, 0.5]]])
    assert float(halved.sample(at, normalize=False)) == pytest.approx(301.25, abs=0.1)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (torch.zeros(4, 8, 8), r"\(B, 3, H, W\), not \(4, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), r"not \(1, 1, 8, 8\)"),
        (torch.zeros(1, 3, 0, 8), r"not \(1, 3, 0, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "uint8 or floats in .0, 1."),
        (torch.full((1, 3, 8, 8), 255.0), "largest value is 255"),
        (torch.full((1, 3, 8, 8), torch.nan), "largest value is nan"),
    ],
)
def test_wrong_images_are_named(image: torch.Tensor, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        tiny().dense(image)


@pytest.mark.parametrize("point", [[-0.1, 3.0], [80.0, 3.0], [3.0, 60.5], [torch.nan, 3.0]])
def test_keypoints_outside_are_named(point: list[float]) -> None:
    keypoints = torch.full((2, 4, 2), 5.0)
    keypoints[1, 2] = torch.tensor(point)
    with pytest.raises(KeypointError, match=r"keypoint 2 of image 1 at .* width 80 and height 60"):
        tiny().at(images(2, 60, 80), keypoints)


def test_keypoints_of_wrong_shape_are_named() -> None:
    with pytest.raises(KeypointError, match=r"\(2, N, 2\), not \(1, 4, 2\)"):
        tiny().at(images(2), torch.zeros(1, 4, 2))


def test_options_out_of_range() -> None:
    with pytest.raises(RecipeError, match="resolution"):
        tiny().dense(images(), 0)
    with pytest.raises(RecipeError, match="lora_blocks"):
        build_extractor(backbone("vit"), lora_blocks=-1)
    with pytest.raises(RecipeError, match="has 6 blocks"):
        build_extractor(backbone("vit"), lora_blocks=9)


def test_build_by_name_with_random_weights() -> None:
    a = build_extractor("test_vit", "random", "conv", seed=1)
    b = build_extractor("test_vit", "random", "conv", seed=1)
    assert torch.equal(a.dense(images()).features, b.dense(images()).features)
    assert a.backbone.name == "test_vit.r160_in1k"
