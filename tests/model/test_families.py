"""Every family of the recipes, and further kinds of plain ViT, at a tiny width and depth.

Each is built by timm's own function of that architecture, so patch, positions, registers, norms
and the kind of q, k, v are the family's; only depth and width are small.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from equifeat.errors import ModelNameError, RecipeError
from equifeat.model.adapter import LoraAdapter
from equifeat.model.backbone import Backbone, resolve_name
from tests.model.tiny import images, randomize
from tests.recipe_table import ENTRIES

LAST = 2
TINY = {"depth": 3, "embed_dim": 48, "num_heads": 2}
# Not of a recipe, but taken too: each differs from the others in what it asks of the backbone.
FURTHER = {
    "biases of q and v, that of k held at zero": "vit_base_patch16_dinov3_qkvb.lvd1689m",
    "patches of 8": "vit_small_patch8_224.dino",
    "two class tokens": "deit_base_distilled_patch16_224.fb_in1k",
    "norm after the attention": "eva02_enormous_patch14_clip_224.laion2b",
    "differential attention": "vit_dwee_patch16_reg1_gap_256.sbb_in1k",
    "RMS norm": "aimv2_large_patch14_224.apple_pt",
    "RoPE and a norm of q and k": "vit_pe_spatial_base_patch16_512.fb",
    "RoPE mixed a block": "vit_base_patch16_rope_mixed_ape_224.naver_in1k",
    "no LoRA: attention and MLP at once": "vit_base_patch16_xp_224",
}
RECIPES = sorted({entry.backbone for entry in ENTRIES})
NAMES = [*RECIPES, *FURTHER.values()]
ADAPTABLE = [name for name in NAMES if "_xp_" not in name]
ATOL = 1e-5


@cache
def built(name: str, dynamic: bool = True, split: bool = False) -> Any:
    """A tiny model of a family; the same weights with and without dynamic sizes."""
    patch = 14 if "patch14" in name else 8 if "patch8" in name else 16
    options: dict[str, Any] = {**TINY, "img_size": 4 * patch}
    if split:
        options["qkv_fused"] = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0, dynamic_img_size=dynamic, **options)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "gamma" in key:  # layer scales start near zero and would hide the blocks
                    parameter.fill_(0.5)
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def grid(tokens: Tensor, model: Any, hw: tuple[int, int]) -> Tensor:
    patches = tokens[:, model.num_prefix_tokens :]
    return patches.transpose(1, 2).reshape(len(tokens), -1, *hw)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_timms(name: str) -> None:
    """At the model's own size against timm's code of a fixed size, then at another shape."""
    ours = Backbone(built(name), name)
    for hw, other in (((4, 4), built(name, dynamic=False)), ((5, 3), built(name))):
        image = images(1, hw[0] * ours.patch_size, hw[1] * ours.patch_size)
        with torch.no_grad():
            expected = grid(other.forward_features((image - ours.mean) / ours.std), other, hw)
        state = ours.trunk(image, LAST)
        assert state.tokens.shape[1] == ours.num_prefix_tokens + hw[0] * hw[1]
        got = ours.tail(state)
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, rtol=1e-5, atol=ATOL)
        assert float(got.std()) > 1e-2


def adapted(ours: Backbone, adapter: LoraAdapter, image: Tensor) -> Tensor:
    with adapter.attached(ours.blocks):
        return ours.tail(ours.trunk(image, LAST))


def check_merge(model: Any, name: str) -> None:
    ours = Backbone(model, name)
    adapter = LoraAdapter(ours.blocks, LAST, rank=3, alpha=5.0, seed=7)
    randomize(adapter)
    image = images(1, 4 * ours.patch_size, 3 * ours.patch_size)
    raw = ours.tail(ours.trunk(image, LAST))
    with torch.no_grad():
        unmerged = adapted(ours, adapter, image)
        adapter.fold_into(ours.blocks)
        merged = ours.tail(ours.trunk(image, LAST))
    assert torch.allclose(merged, unmerged, rtol=1e-4, atol=1e-4 * float(raw.std()))
    assert float((merged - raw).abs().max()) > 1e-2 * float(raw.std())


@pytest.mark.parametrize("name", ADAPTABLE)
def test_merged_lora_is_unmerged_lora(name: str) -> None:
    built.cache_clear()  # the weights are changed
    try:
        check_merge(built(name), name)
    finally:
        built.cache_clear()


def attention(name: str, split: bool = False) -> str:
    """The kind of q, k, v: what LoRA must handle."""
    attn = built(name, split=split).blocks[-1].attn
    if attn.qkv is None:
        return "split"
    if attn.qkv.bias is not None:
        return "fused"
    return "no bias" if getattr(attn, "q_bias", None) is None else "no k bias"


def test_every_kind_of_attention_is_merged() -> None:
    """The merges above would prove little if all families had one kind."""
    kinds = {attention(name) for name in ADAPTABLE}
    assert kinds == {"split", "fused", "no bias", "no k bias"}
    assert attention("vit_base_patch16_dinov3.lvd1689m") == "no bias"
    assert attention("vit_base_patch16_dinov3_qkvb.lvd1689m") == "no k bias"
    assert attention("eva02_base_patch14_224.mim_in22k") == "split"
    assert attention("eva02_small_patch14_224.mim_in22k") == "no k bias"
    assert attention("vit_base_patch16_siglip_512.v2_webli") == "fused"


def test_split_attention_without_biases_is_merged() -> None:
    name = "vit_base_patch16_dinov3.lvd1689m"
    assert attention(name, split=True) == "split"
    built.cache_clear()
    check_merge(built(name, split=True), name)
    built.cache_clear()


def test_key_and_value_heads_may_be_fewer_than_query_heads() -> None:
    """Sapiens 2: q has more rows than v."""
    name = "vit_base_patch16_sapiens2"
    options: dict[str, Any] = {**TINY, "num_heads": 4, "num_kv_heads": (4, 2, 2), "img_size": 64}
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
    q, v = LoraAdapter(Backbone(model, name).blocks, LAST, rank=3).pair(2)
    assert (len(q.b), len(v.b)) == (48, 24)
    check_merge(model.eval(), name)


def test_blocks_without_separate_attention_are_refused_with_a_remedy() -> None:
    name = FURTHER["no LoRA: attention and MLP at once"]
    with pytest.raises(RecipeError, match=r"ParallelScalingBlock lacks.*lora_blocks to 0"):
        LoraAdapter(Backbone(built(name), name).blocks, LAST)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("naflexvit_base_patch16_radio_v3.c_radio", "choose 'vit_base_patch16_radio_v3'"),
        ("vit_base_r50_s16_224", "a convolutional network makes its tokens"),
        ("samvit_base_patch16", "attend within windows"),
        ("beit_base_patch16_224", "fit one grid of patches only"),
        ("vit_relpos_base_patch16_224", "fit one grid of patches only"),
        ("sam2_hiera_base_plus", "pools tokens between its stages"),
        ("resnet50", "is not a plain ViT: choose a model of timm's"),
    ],
)
def test_other_models_are_refused_by_name_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ModelNameError, match=reason) as caught:
        resolve_name(name)
    assert repr(name) in str(caught.value)


def test_reference_position_knows_both_class_tokens_of_a_distilled_deit() -> None:
    name = FURTHER["two class tokens"]
    image = images(1, 64, 64)
    own = Backbone(built(name), name).trunk(image).tokens
    same = Backbone(built(name), name, position="reference").trunk(image).tokens
    assert torch.allclose(own, same, atol=ATOL)
