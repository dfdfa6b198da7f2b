from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from equifeat.checkpoint import load_model, save_model
from equifeat.errors import CheckpointError, ExportError, WeightsError
from equifeat.export.transformers_ import export_transformers, load_onto, to_transformers
from equifeat.export.transformers_names import checkpoint_names, to_timm_names
from equifeat.model.backbone import Backbone, load_backbone
from equifeat.model.extractor import FeatureExtractor
from tests.export.foreign_models import (
    DINOV2,
    as_map,
    check_readme,
    normalized,
    same,
    saved,
    trained,
)
from tests.model.test_weights import needs_packaged
from tests.model.tiny import backbone, images, timm_model

SQUARE = (518, 518)


def features(vit: Any, model: FeatureExtractor, image: Tensor) -> Tensor:
    size_hw = (int(image.shape[-2]), int(image.shape[-1]))
    with torch.no_grad():
        return as_map(vit(normalized(image, model)).last_hidden_state, model, size_hw)


def tiny(name: str, **options: Any) -> Backbone:
    """A tiny ViT of a family, with weights large enough to matter."""
    small = {"depth": 3, "embed_dim": 96, "num_heads": 2, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, **small)
        with torch.no_grad():
            for key, parameter in vit.named_parameters():
                if "gamma" in key:
                    parameter.fill_(0.5)
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return Backbone(vit.eval(), name)


FITS = {
    "DINOv2": ("vit_small_patch14_dinov2.lvd142m", {"img_size": 70}),
    "registers": ("vit_small_patch14_reg4_dinov2.lvd142m", {"img_size": 70}),
    "gated MLP": ("vit_giant_patch14_dinov2.lvd142m", {"img_size": 70}),
    "gated MLP, registers": ("vit_giant_patch14_reg4_dinov2.lvd142m", {"img_size": 70}),
    "no layer scale (MAE)": ("vit_base_patch16_224.mae", {"img_size": 80}),
    "DINO": ("vit_small_patch8_224.dino", {"img_size": 40}),
    "no position of the class token": ("deit3_small_patch16_224.fb_in1k", {"img_size": 80}),
    "ImageNet": ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", {"img_size": 80}),
}
NOT = {
    "a norm before the blocks": ("vit_base_patch16_clip_224.openai", r"no norm before the blocks"),
    "no class token": ("vit_base_patch16_siglip_224.webli", "it has no class token"),
    "rotary positions": ("vit_small_patch16_dinov3.lvd1689m", "it is a Eva"),
    "two class tokens": ("deit_base_distilled_patch16_224.fb_in1k", "it is a VisionTransformerD"),
    "attention and MLP at once": ("vit_base_patch16_xp_224", "its blocks are ParallelScaling"),
    "no norm of tokens": ("vit_base_patch16_rpn_224.sw_in1k", "its blocks are ResPostBlock"),
}


@pytest.mark.parametrize("kind", FITS)
def test_features_are_equal_at_every_size(kind: str) -> None:
    name, options = FITS[kind]
    model = trained(tiny(name, **options), head="conv")
    p = model.patch_size
    vit = to_transformers(model)
    assert type(vit) is transformers.Dinov2WithRegistersModel
    assert vit.config.num_register_tokens == model.backbone.num_prefix_tokens - 1
    for grid in ((5, 5), (3, 7), (9, 8)):  # its own grid, a smaller and a larger one
        image = images(2, grid[0] * p, grid[1] * p)
        with torch.no_grad():
            expected = model.dense(image).features
            same(features(vit, model, image), expected)
    assert float((model.raw().dense(image).features - expected).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["DINOv2", "registers"])
@pytest.mark.parametrize("position", ["timm", "reference"])
def test_one_size_is_written_for_dinov2s_own_class(kind: str, position: str) -> None:
    name, options = FITS[kind]
    ours = tiny(name, **options)
    model = trained(Backbone(ours.model, name, position=position))
    if position == "reference":
        with pytest.raises(ExportError, match="only equifeat can"):
            to_transformers(model)
    vit = to_transformers(model, (98, 98))
    own = transformers.Dinov2WithRegistersModel if kind == "registers" else transformers.Dinov2Model
    assert type(vit) is own
    image = images(1, 98, 98)
    with torch.no_grad():
        same(features(vit, model, image), model.dense(image).features)
    with pytest.raises(ExportError, match="square images only"):
        to_transformers(model, (98, 70))
    with pytest.raises(ExportError, match="multiples of 14"):
        to_transformers(model, (100, 100))


@pytest.mark.parametrize("kind", NOT)
def test_other_vits_are_refused_with_the_reason(kind: str) -> None:
    name, reason = NOT[kind]
    patch = 16
    ours = tiny(name, img_size=4 * patch)
    with pytest.raises(ExportError, match=reason) as caught:
        to_transformers(trained(ours, blocks=0))
    assert repr(name) in str(caught.value)
    assert "give --to timm" in str(caught.value)


def test_other_activations_are_refused() -> None:
    ours = tiny("vit_small_patch14_dinov2.lvd142m", img_size=70, act_layer="quick_gelu")
    with pytest.raises(ExportError, match="its activation is not GELU"):
        to_transformers(trained(ours))


def test_folder_opens_with_automodel_and_its_readme_runs(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "test_vit", head="residual")
    out = tmp_path / "out"
    said = export_transformers(folder, out)
    assert "transformers' Dinov2WithRegistersModel" in said
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "head.safetensors",
        "README.md",
    }
    model = load_model(folder)
    check_readme(out, model, (75, 130))
    vit = transformers.AutoModel.from_pretrained(out).eval()
    assert vit.config.equifeat["head"]["formula"] == "x + conv(x)"
    # PIL in, features out, as transformers' users do it.
    processor: Any = transformers.AutoImageProcessor
    processor = processor.from_pretrained(out)
    pixels = (images(1, 64, 96)[0] * 255).round().to(torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    values = processor(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = vit(values).last_hidden_state
        expected = model.dense(pixels[None] / 255).features
        same(as_map(tokens, model, (64, 96)), expected)


def test_folder_of_one_size(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "test_vit", position="reference", head="none")
    with pytest.raises(ExportError, match="only equifeat can"):
        export_transformers(folder, tmp_path / "out")
    export_transformers(folder, tmp_path / "out", size_hw=(96, 96))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["image_size"]) == ("dinov2", 96)
    assert config["equifeat"]["image_size"] == [96, 96]
    check_readme(tmp_path / "out", load_model(folder), (96, 96))
    with pytest.raises(ExportError, match="is there already"):
        export_transformers(folder, tmp_path / "out", size_hw=(96, 96))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "model"}


@pytest.fixture(scope="module")
def dinov2_small() -> Any:
    """What facebook/dinov2-small is: a Dinov2Model of 518 pixels without an adapter."""
    raw = FeatureExtractor(load_backbone(DINOV2, "packaged"))
    with pytest.MonkeyPatch.context() as patch:  # the check, which takes long at this size
        patch.setattr("equifeat.export.transformers_.difference", lambda *_: 0.0)
        vit = to_transformers(raw, SQUARE)
    assert type(vit) is transformers.Dinov2Model
    return vit


@needs_packaged
def test_real_dinov2_and_back(dinov2_small: Any, tmp_path: Path) -> None:
    """Written, opened, and the folder put onto a Dinov2Model that somebody has."""
    folder = saved(tmp_path / "model", DINOV2, "packaged", blocks=4)
    out = tmp_path / "out"
    export_transformers(folder, out)
    model = load_model(folder)
    for size_hw in ((140, 224), (150, 101)):
        check_readme(out, model, size_hw)
    theirs = copy.deepcopy(dinov2_small)
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    own, head = load_onto(theirs, folder)
    assert own is theirs
    changed = {name for name, value in own.state_dict().items() if (value != before[name]).any()}
    assert {name.split(".")[2] for name in changed} == {"8", "9", "10", "11"}
    assert {name.rsplit(".", 2)[-2] for name in changed} == {"q_proj", "v_proj"}
    assert torch.equal(head.conv.weight, model.head.conv.weight)  # type: ignore[union-attr]
    image = images(1, *SQUARE)
    with torch.no_grad():
        same(features(own, model, image), model.dense(image).features)
    # Its own resampling differs from timm's, unless the positions are replaced too.
    image = images(1, 140, 140)
    with torch.no_grad():
        expected = model.dense(image).features
    apart = (features(own, model, image) - expected).abs().max()
    assert float(apart) > 1e-3 * float(expected.abs().max())
    fresh, _ = load_onto(copy.deepcopy(dinov2_small), folder, size_hw=(140, 140))
    same(features(fresh, model, image), expected)
    fresh.save_pretrained(tmp_path / "again")
    again: Any = transformers.Dinov2Model.from_pretrained(tmp_path / "again")
    same(features(again.eval(), model, image), expected)


@needs_packaged
def test_only_the_same_weights_take_the_folder(dinov2_small: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", DINOV2, "packaged", blocks=1, head="none")
    vit = copy.deepcopy(dinov2_small)
    with torch.no_grad():
        vit.encoder.layer[3].mlp.fc1.bias[0] += 1e-6
    with pytest.raises(CheckpointError, match="with SHA-256"):
        load_onto(vit, folder)
    with pytest.raises(ExportError, match=r"is in torch\.float16: load it with dtype"):
        load_onto(vit.half(), folder)
    small = to_transformers(trained(tiny(DINOV2, img_size=70), blocks=0))
    with pytest.raises(WeightsError, match="is not of"):
        load_onto(small, folder)
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    other = transformers.ViTModel(config)
    with pytest.raises(ExportError, match=r"not a ViTModel: give its backbone"):
        load_onto(other, folder)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_reg4"])
def test_names_go_there_and_back_to_the_bit(kind: str) -> None:
    """So that the hash of weights that transformers loaded is that of timm's."""
    ours = backbone(kind)
    vit = to_transformers(FeatureExtractor(ours))
    state = checkpoint_names(vit.state_dict())
    back = to_timm_names(state, ours.depth, swiglu=False, registers=kind.endswith("reg4"))
    own = timm_model(kind).state_dict()
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], own[name]) for name in own)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_models_as_they_are_published_are_mapped_to_timm(registers: int, gated: bool) -> None:
    """With a position of the class token, which timm adds to the token of models with registers."""
    options: dict[str, Any] = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 70,
        "patch_size": 14,
        "use_swiglu_ffn": gated,
        "layerscale_value": 0.5,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit: Any
        if registers:
            config = transformers.Dinov2WithRegistersConfig(**options, num_register_tokens=4)
            vit = transformers.Dinov2WithRegistersModel(config)
            vit.embeddings.register_tokens.data.normal_()
        else:
            vit = transformers.Dinov2Model(transformers.Dinov2Config(**options))
    vit.eval()
    assert float(vit.embeddings.position_embeddings[0, 0].detach().abs().max()) > 0.1
    state = to_timm_names(checkpoint_names(vit.state_dict()), 3, gated, registers > 0)
    size, reg = "giant" if gated else "small", "reg4_" if registers else ""
    ours = tiny(f"vit_{size}_patch14_{reg}dinov2.lvd142m", img_size=70)
    ours.model.load_state_dict(state, strict=True)
    model = FeatureExtractor(ours)
    image = images(1, 70, 70)
    with torch.no_grad():
        same(features(vit, model, image), model.dense(image).features)


def test_written_names_are_those_of_the_hubs_files(tmp_path: Path) -> None:
    """transformers 4 and 5 both read them; those that 5 has in memory only 5 reads."""
    folder = save_model(trained("test_vit"), tmp_path / "model")
    export_transformers(folder, tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "encoder.layer.0.attention.attention.query.weight" in names
    assert "encoder.layer.5.attention.output.dense.bias" in names
    assert not [name for name in names if "_proj" in name]
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == names
