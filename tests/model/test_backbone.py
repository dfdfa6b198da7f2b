from __future__ import annotations

import pytest
import torch
from torch import nn

from equifeat.errors import ModelNameError, RecipeError, WeightsError
from equifeat.model import backbone as module
from equifeat.model.backbone import Backbone, load_backbone, resolve_name
from tests.model.tiny import KINDS, backbone, images, timm_model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(5, 3), (2, 7), (4, 4)])
def test_trunk_and_tail_are_timms_forward_features(kind: str, grid: tuple[int, int]) -> None:
    """Whatever the cut: also the last block's normalised tokens, prefix tokens taken off."""
    model = timm_model(kind)
    ours = Backbone(model, KINDS[kind][0])
    image = images(2, grid[0] * ours.patch_size, grid[1] * ours.patch_size)
    with torch.no_grad():
        tokens = model.forward_features((image - ours.mean) / ours.std)
    expected = tokens[:, model.num_prefix_tokens :].transpose(1, 2).reshape(2, -1, *grid)
    for cut in (0, 1, ours.depth):
        state = ours.trunk(image, cut)
        assert state.tokens.shape == tokens.shape
        assert state.blocks_done == ours.depth - cut
        assert torch.allclose(ours.tail(state), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_tokens_patch_and_statistics_come_from_the_model(kind: str) -> None:
    model = timm_model(kind)
    ours = Backbone(model, KINDS[kind][0])
    assert ours.num_prefix_tokens == model.num_prefix_tokens
    assert ours.patch_size == model.patch_embed.patch_size[0]
    assert ours.mean.flatten().tolist() == pytest.approx(model.pretrained_cfg["mean"])
    assert ours.std.flatten().tolist() == pytest.approx(model.pretrained_cfg["std"])


def test_backbone_stays_frozen_and_in_eval_mode() -> None:
    ours = backbone("vit")
    parent = nn.Sequential(ours, nn.Dropout())
    parent.train()
    assert parent[1].training
    assert not any(part.training for part in ours.modules())
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_reference_position_is_the_table_itself_on_its_own_grid() -> None:
    kinds = ("dinov2", "dinov2_reg4")
    for kind in kinds:
        image = images(1, 70, 70)
        a = backbone(kind).trunk(image).tokens
        b = backbone(kind, position="reference").trunk(image).tokens
        assert torch.allclose(a, b, atol=1e-5)


def test_reference_position_differs_a_little_on_another_grid() -> None:
    image = images(1, 56, 98)
    a = backbone("dinov2").trunk(image, 3).tokens
    b = backbone("dinov2", position="reference").trunk(image, 3).tokens
    assert a.shape == b.shape
    assert 1e-6 < float((a - b).abs().max()) < 0.1
    assert torch.equal(a[:, 0], b[:, 0])


def test_reference_position_needs_a_learned_table() -> None:
    with pytest.raises(RecipeError, match="learned position"):
        backbone("dinov3", position="reference")
    with pytest.raises(RecipeError, match="'timm' or 'reference'"):
        backbone("vit", position="nearest")


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("vit_smal_patch14_dinov2", "vit_small_patch14_dinov2"),
        ("vit_small_patch14_dinov2.lvd14", "vit_small_patch14_dinov2.lvd142m"),
        ("dinov2_vits14", "Did you mean"),
        ("resnet50", "not a plain ViT"),
        ("swin_tiny_patch4_window7_224", "not a plain ViT"),
    ],
)
def test_wrong_names_get_one_sentence_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ModelNameError, match=near) as caught:
        resolve_name(wrong)
    assert "\n" not in str(caught.value)


def test_names_get_their_default_tag() -> None:
    assert resolve_name("vit_small_patch14_dinov2") == "vit_small_patch14_dinov2.lvd142m"
    assert resolve_name("test_vit.r160_in1k") == "test_vit.r160_in1k"


def test_other_shapes_of_vit_are_refused() -> None:
    import timm

    model = timm.create_model("test_vit_relpos", num_classes=0)
    with pytest.raises(ModelNameError, match="not a plain ViT"):
        Backbone(model, "test_vit_relpos")
    fixed = timm.create_model("test_vit3", num_classes=0)
    with pytest.raises(ModelNameError, match="dynamic_img_size"):
        Backbone(fixed, "test_vit3")


def test_hub_failure_is_one_sentence_with_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._create

    def offline(name: str, seed: int = 0, **options: object) -> object:
        if options.get("pretrained"):
            raise ConnectionError("no route to host\nlong trace")
        return real(name, seed)

    monkeypatch.setattr(module, "_create", offline)
    with pytest.raises(WeightsError, match=r"no route to host.*HF_HUB_OFFLINE.*packaged") as caught:
        load_backbone("test_vit", "hub")
    assert "\n" not in str(caught.value)


def test_hub_without_weights_says_so() -> None:
    with pytest.raises(WeightsError, match="no weights of 'vit_small_patch16_36x1_224"):
        load_backbone("vit_small_patch16_36x1_224", "hub")


def test_packaged_weights_exist_of_one_backbone_only() -> None:
    with pytest.raises(WeightsError, match=r"only of 'vit_small_patch14_dinov2\.lvd142m'"):
        load_backbone("test_vit", "packaged")


def test_random_weights_depend_on_the_seed_only_and_leave_the_callers_numbers() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_backbone("test_vit", "random", seed=3).weights_hash()
    assert torch.equal(torch.rand(3), expected)
    assert load_backbone("test_vit", "random", seed=3).weights_hash() == first
    assert load_backbone("test_vit", "random", seed=4).weights_hash() != first
