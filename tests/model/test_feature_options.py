"""Overlapping patches, chosen layers and unnormalised tokens, against timm's own pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.eval.shared_trunk import SharedTokens, SharedTrunk
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.feature_map import FeatureMap
from equifeat.model.head import HeadKind
from tests.helpers import GOLDEN
from tests.model.tiny import KINDS, backbone, images, randomize, timm_model

DEFAULT: dict[str, Any] = {"overlap": 1, "layers": (-1,), "norm": True}


def tiny(kind: str = "dinov2", head: HeadKind = "conv", blocks: int = 2) -> FeatureExtractor:
    extractor = build_extractor(backbone(kind), head=head, lora_blocks=blocks, lora_rank=2)
    if extractor.adapter is not None:
        randomize(extractor.adapter)
    return extractor


def patch_by_patch(extractor: FeatureExtractor, image: Tensor, stride: int) -> Tensor:
    """timm's patch embedding of each patch alone, as the one patch of an image: (B, h, w, D)."""
    embed, p = extractor.backbone.model.patch_embed, extractor.patch_size
    x = (image - extractor.backbone.mean) / extractor.backbone.std
    rows = range(0, image.shape[-2] - p + 1, stride)
    columns = range(0, image.shape[-1] - p + 1, stride)
    grid = [[embed(x[..., i : i + p, j : j + p])[:, 0, 0] for j in columns] for i in rows]
    return torch.stack([torch.stack(row, dim=1) for row in grid], dim=1)


def timm_blocks(model: Any, embedded: Tensor) -> list[Tensor]:
    """The tokens after each block, by timm's own order of pieces."""
    grid = tuple(embedded.shape[1:3])
    tokens = model._pos_embed(embedded)
    rope = None
    if isinstance(tokens, tuple):
        tokens, rope = tokens
    elif (own := getattr(model, "patch_drop", None)) is not None:
        tokens = own(tokens)
    tokens = model.norm_pre(tokens)
    out = []
    for index, block in enumerate(model.blocks):
        if rope is None:
            tokens = block(tokens)
        else:
            mixed = getattr(model, "rope_mixed", False)
            tokens = block(tokens, rope=rope[index] if mixed else rope)
        out.append(tokens)
    prefix = model.num_prefix_tokens
    return [t[:, prefix:].mT.reshape(len(t), -1, *grid) for t in out]


@pytest.mark.parametrize("kind", KINDS)
def test_overlap_is_timms_pieces_on_the_larger_grid(kind: str) -> None:
    extractor = tiny(kind, "none", blocks=0)
    p = extractor.patch_size
    image = images(2, 3 * p, 4 * p)
    with torch.no_grad():
        embedded = patch_by_patch(extractor, image, p // 2)
        expected = timm_blocks(extractor.backbone.model, embedded)[-1]
    out = extractor.dense(image, overlap=2, norm=False)
    assert out.features.shape == (2, extractor.dim, 5, 7)
    assert torch.allclose(out.features, expected, rtol=1e-4, atol=1e-4)
    assert out.margin_yx == (p / 4, p / 4)
    assert out.stride == (p / 2, p / 2)


def test_every_second_embedding_is_that_of_patches_side_by_side() -> None:
    """Before positions and attention, overlapping patches contain the usual ones."""
    extractor = tiny("vit", "none", blocks=0)
    model, p = extractor.backbone.model, extractor.patch_size
    x = images(1, 3 * p, 4 * p)
    assert torch.allclose(
        extractor.backbone._embed(x, p // 2)[:, ::2, ::2], model.patch_embed(x), atol=1e-5
    )


@pytest.mark.parametrize("kind", ["vit", "dinov2_reg4", "eva_split", "rope_mixed"])
def test_defaults_are_unchanged_to_the_bit_and_no_call_leaves_a_trace(kind: str) -> None:
    extractor = tiny(kind)
    p, image = extractor.patch_size, images(1, 50, 70)
    state = {key: value.clone() for key, value in extractor.state_dict().items()}
    proj = extractor.backbone.model.patch_embed.proj
    modules = dict(extractor.named_modules())
    before = extractor.dense(image, 4).features
    # What dense() was before it had options.
    by_parts = extractor.tail(extractor.trunk(image, 4)).features
    assert torch.equal(before, by_parts)
    assert torch.equal(extractor.dense(image, 4, **DEFAULT).features, before)
    extractor.dense(image, 4, overlap=p)
    extractor.dense(image, 4, overlap=2, layers=(0, -1), norm=False, at="image")
    assert torch.equal(extractor.dense(image, 4).features, before)
    assert proj.stride == (p, p)
    assert dict(extractor.named_modules()) == modules
    assert all(torch.equal(value, state[k]) for k, value in extractor.state_dict().items())


@pytest.mark.parametrize("kind", ["vit", "register_no_class", "dinov2", "deit3", "dinov3"])
@pytest.mark.parametrize("norm", [True, False])
def test_layers_are_timms_intermediates(kind: str, norm: bool) -> None:
    extractor = tiny(kind, "none", blocks=0)
    p = extractor.patch_size
    image = images(2, 3 * p, 4 * p)
    x = (image - extractor.backbone.mean) / extractor.backbone.std
    with torch.no_grad():
        expected = timm_model(kind).forward_intermediates(x, norm=norm, intermediates_only=True)
    depth = extractor.backbone.depth
    for layer in (0, 1, -2, -1, depth - 1, -depth):
        out = extractor.dense(image, layers=(layer,), norm=norm)
        assert torch.allclose(out.features, expected[layer], rtol=1e-4, atol=1e-4)
    together = extractor.dense(image, layers=(-1, 0, 0), norm=norm).features
    parts = [F.normalize(expected[layer], dim=1) for layer in (-1, 0, 0)]
    assert torch.allclose(together, torch.cat(parts, dim=1), atol=1e-5)
    assert together.shape == (2, 3 * extractor.dim, 3, 4)


@pytest.mark.parametrize("kind", ["vit", "dinov3"])
def test_adapter_acts_and_the_head_refines_the_last_layer_only(kind: str) -> None:
    """Against the merged model, whose blocks are timm's own."""
    extractor = tiny(kind, "residual", blocks=2)
    assert extractor.head.conv is not None
    torch.nn.init.normal_(extractor.head.conv.weight, std=0.02)
    merged = extractor.merged().backbone.model
    p = extractor.patch_size
    image = images(1, 2 * p, 3 * p)
    with torch.no_grad():
        expected = timm_blocks(merged, patch_by_patch(extractor, image, p // 4))
        refined = extractor.head(expected[-1])
        options: dict[str, Any] = {"overlap": 4, "norm": False}
        last = extractor.dense(image, **options).features
        assert torch.allclose(last, refined, rtol=1e-3, atol=1e-3)
        inner = extractor.dense(image, layers=(-2,), **options).features
        assert torch.allclose(inner, expected[-2], rtol=1e-3, atol=1e-3)
        raw = extractor.raw().dense(image, layers=(-2,), **options).features
        assert not torch.allclose(inner, raw, rtol=1e-2, atol=1e-2)
        both = extractor.dense(image, layers=(-2, -1), **options).features
    parts = [F.normalize(expected[-2], dim=1), F.normalize(refined, dim=1)]
    assert torch.allclose(both, torch.cat(parts, dim=1), atol=1e-4)


def test_gradients_reach_the_adapter_from_the_layers_that_see_it() -> None:
    extractor = tiny("dinov2", "none", blocks=1)
    assert extractor.adapter is not None
    assert not extractor.dense(images(), layers=(0,)).features.requires_grad
    out = extractor.dense(images(), overlap=2, layers=(0, -1), norm=False).features
    out.square().mean().backward()  # type: ignore[no-untyped-call]
    last = extractor.backbone.depth - 1
    gradients = [update.b.grad for update in extractor.adapter.pair(last)]
    assert all(gradient is not None for gradient in gradients)


def test_mixed_precision_and_recomputation_give_the_same_map() -> None:
    extractor = tiny("dinov2", "conv")
    options: dict[str, Any] = {"overlap": 2, "layers": (0, -1), "norm": False}
    expected = extractor.dense(images(), **options).features.detach()
    extractor.recompute = True
    assert torch.equal(extractor.dense(images(), **options).features, expected)
    extractor.compute_in(torch.bfloat16)
    half = extractor.dense(images(), **options).features.detach()
    assert half.dtype == torch.float32
    assert 1e-5 < float((half - expected).abs().max()) < 0.1


@pytest.mark.parametrize("overlap", [1, 2, 7])
def test_reference_position_runs_on_the_larger_grid(overlap: int) -> None:
    """DINOv2's own resampling, (h + 0.1) / 5: its first token is near timm's."""
    image = images(1, 56, 42)
    ours = FeatureExtractor(backbone("dinov2", position="reference"))
    other = FeatureExtractor(backbone("dinov2"))
    a = ours.dense(image, overlap=overlap)
    b = other.dense(image, overlap=overlap)
    assert a.features.shape == b.features.shape
    assert a.margin_yx == b.margin_yx
    assert 0 < float((a.features - b.features).abs().max()) < 0.5


def test_centers_are_the_middles_of_the_patches() -> None:
    extractor = tiny("dinov2", "none", blocks=0)  # patches of 14
    whole = extractor.dense(images(1, 56, 84), overlap=2)
    grid = torch.stack(
        torch.meshgrid(torch.arange(11) * 7.0 + 7, torch.arange(7) * 7.0 + 7, indexing="xy"), -1
    )
    assert torch.equal(whole.centers(), grid)
    assert torch.equal(extractor.dense(images(1, 56, 84)).centers()[0, 0], torch.tensor([7.0, 7.0]))
    # In an image that is half as wide and twice as high, points and margin scale with it.
    bent = extractor.dense(images(1, 112, 42), overlap=2)
    assert bent.grid_hw == (15, 5)
    assert bent.margin_yx == (3.5, 3.5)
    resized = extractor.dense(images(1, 28, 42), 6, overlap=2)  # 56 x 84 inside
    assert resized.margin_yx == (1.75, 1.75)
    assert torch.equal(resized.centers(), grid / 2)


def test_sampling_an_overlapped_map_gives_its_features_at_the_centers() -> None:
    extractor = tiny("dinov2", "none", blocks=0)
    out = extractor.dense(images(2, 30, 43), 4, overlap=2)
    xy = out.centers().reshape(1, -1, 2).expand(2, -1, -1)
    assert torch.allclose(
        out.sample(xy, normalize=False), out.features.flatten(2).mT, rtol=1e-4, atol=1e-4
    )
    assert torch.equal(out.normalized().centers(), out.centers())
    assert torch.allclose(out.sample(xy), out.normalized().features.flatten(2).mT, atol=1e-4)
    # Features that are their own positions are found at any point between the first and last.
    place = out.centers().permute(2, 0, 1)[None].contiguous()
    ramp = FeatureMap(place, out.size_hw, out.margin_yx)
    low, high = out.centers()[0, 0], out.centers()[-1, -1]
    points = low + torch.rand(1, 50, 2) * (high - low)
    assert torch.allclose(ramp.sample(points, normalize=False), points, atol=1e-4)
    full = ramp.at_image()
    assert full.features.shape == (1, 2, 30, 43)
    assert full.stride == (1.0, 1.0)
    inner = full.features[0, :, 15, 20]
    assert torch.allclose(inner, torch.tensor([20.5, 15.5]), atol=1e-4)
    assert torch.allclose(full.features[0, :, 0, 0], low, atol=1e-4)  # the border is repeated


def test_at_image_of_an_overlapped_map_is_sampled_at_pixel_centers() -> None:
    extractor = tiny("dinov2", "none", blocks=0)
    image = images(1, 28, 28)
    full = extractor.dense(image, at="image", overlap=2)
    patches = extractor.dense(image, overlap=2)
    xy = torch.tensor([[[0.5, 0.5], [13.5, 20.5]]])
    found = patches.sample(xy, normalize=False)[0]
    assert torch.allclose(full.features[0, :, [0, 20], [0, 13]].T, found, atol=1e-5)
    half = FeatureMap(patches.features.half(), patches.size_hw, patches.margin_yx).at_image()
    assert half.features.dtype == torch.float16


def test_a_map_with_a_margin_samples_as_the_reference_does() -> None:
    data = {
        key.split(".")[1]: value
        for key, value in load_file(GOLDEN / "sample_features.safetensors").items()
        if key.startswith("stride7.")
    }
    patch, stride = data["patch_stride"].tolist()
    height, width = data["image_hw"].tolist()
    margin = (patch - stride) / 2
    found = FeatureMap(data["features"], (height, width), (margin, margin))
    assert found.stride == (stride, stride)
    out = found.sample(data["keypoints"], normalize=False)
    assert torch.allclose(out, data["sampled"].mT, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"overlap": 2}, {"layers": (0, -1)}, {"norm": False}])
def test_a_shared_trunk_takes_the_same_options(options: dict[str, Any]) -> None:
    extractor = tiny("dinov2", "conv")
    shared = SharedTrunk(extractor, SharedTokens(), extractor)
    image = images(1)
    found = shared.dense(image, 4, **options)
    assert torch.equal(found.features, extractor.dense(image, 4, **options).features)
    assert not found.features.requires_grad
    assert torch.equal(shared.dense(image, 4, **DEFAULT).features, shared.dense(image, 4).features)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"overlap": 3}, r"overlap=3 would start patches of 14.*one of 1, 2, 7, 14\."),
        ({"overlap": 0}, "overlap=0"),
        ({"layers": (3,)}, r"layers has 3, but .* has the blocks 0 to 2, or -3 to -1\."),
        ({"layers": (-1, -4)}, "layers has -4"),
        ({"layers": ()}, r"layers has \(\)"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        tiny().dense(images(), **options)


def test_a_state_that_has_passed_a_layer_is_refused() -> None:
    extractor = tiny()
    state = extractor.trunk(images())
    with pytest.raises(ValueError, match="has passed 2 blocks, not only 1"):
        extractor.backbone.layers(state._replace(blocks_done=2), (0,))
    raw = extractor.raw()
    assert raw.trunk(images()).blocks_done == 3
    assert raw.trunk(images(), layers=(1, -1)).blocks_done == 2
    assert extractor.trunk(images(), layers=(1, -1)).blocks_done == 1  # adapted from there
