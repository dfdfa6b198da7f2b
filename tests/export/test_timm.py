from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from equifeat.checkpoint import load_model
from equifeat.errors import CheckpointError, ExportError
from equifeat.export.timm_ import export_timm, timm_state
from equifeat.model.backbone import Backbone
from tests.export.foreign_models import (
    DINOV2,
    as_map,
    check_readme,
    normalized,
    same,
    saved,
    trained,
)
from tests.helpers import GOLDEN
from tests.model.test_families import FURTHER, built
from tests.model.test_weights import needs_packaged
from tests.model.tiny import KINDS, backbone, images


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_vit4"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_timm_takes_the_state_strictly_and_gives_the_features(
    name: str, dynamic: bool, tmp_path: Path
) -> None:
    """One class token; registers and no class token; RMS norm."""
    folder = saved(tmp_path / "model", name, head="conv")
    model = load_model(folder)
    said = export_timm(folder, tmp_path / "out")
    assert "(LoRA of 2 blocks, head conv(x))" in said
    vit: Any = timm.create_model(
        model.backbone.name, num_classes=0, dynamic_img_size=dynamic
    ).eval()
    vit.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    for size_hw in [(160, 160), *([(96, 224), (16, 16)] if dynamic else [])]:
        image = images(2, *size_hw)
        with torch.no_grad():
            tokens = vit.forward_features(normalized(image, model))
            same(as_map(tokens, model, size_hw), model.dense(image).features)
    head = load_file(tmp_path / "out" / "head.safetensors")
    for key, value in model.head.state_dict().items():
        assert torch.equal(head[key], value)


def tiny_timm(kind: str, img_size: Any = None, split: bool = False) -> Any:
    """A timm model as its user makes it: of one size, or dynamic."""
    name, options = KINDS[kind]
    options = {**options, **({"img_size": img_size} if img_size else {"dynamic_img_size": True})}
    return timm.create_model(name, num_classes=0, **options).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed", [False, True])
def test_every_kind_of_vit_takes_its_state(kind: str, fixed: bool) -> None:
    """Fused, split and bias-free q, k, v; registers; rotary positions, also mixed per block."""
    model = trained(backbone(kind))
    p = model.patch_size
    size_hw = (6 * p, 5 * p)
    vit = tiny_timm(kind, size_hw if fixed else None)
    vit.load_state_dict(timm_state(model, size_hw if fixed else None), strict=True)
    image = images(1, *size_hw)
    with torch.no_grad():
        tokens = vit.forward_features(normalized(image, model))
        same(as_map(tokens, model, size_hw), model.dense(image).features)
        raw = model.raw().dense(image).features
        assert float((model.dense(image).features - raw).abs().max()) > 0.1 * float(raw.std())


@pytest.mark.parametrize(
    "name",
    [
        FURTHER[key]
        for key in (
            "biases of q and v, that of k held at zero",
            "two class tokens",
            "norm after the attention",
            "RoPE and a norm of q and k",
        )
    ],
)
def test_further_families_take_their_state(name: str) -> None:
    built.cache_clear()
    own = built(name)
    model = trained(Backbone(own, name))
    state = timm_state(model)
    built.cache_clear()
    fresh = built(name)  # random weights, all of which must be replaced
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(0.1)
    fresh.load_state_dict(state, strict=True)
    size_hw = (3 * model.patch_size, 5 * model.patch_size)
    image = images(1, *size_hw)
    with torch.no_grad():
        tokens = fresh.forward_features(normalized(image, model))
        same(as_map(tokens, model, size_hw), model.dense(image).features)
    built.cache_clear()


@needs_packaged
@pytest.mark.parametrize("size_hw", [(140, 224), (150, 101)])
def test_real_dinov2_by_the_readmes_code(size_hw: tuple[int, int], real: Path) -> None:
    check_readme(real / "timm", load_model(real / "model"), size_hw)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("real")
    saved(root / "model", DINOV2, "packaged", blocks=4)
    export_timm(root / "model", root / "timm")
    return root


@pytest.mark.parametrize("head", ["none", "conv", "residual"])
def test_readme_code_of_every_head_and_size(head: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "test_vit3", head=head)
    for size_hw in (None, (64, 96)):
        out = tmp_path / f"out{size_hw}"
        export_timm(folder, out, size_hw=size_hw)
        assert (out / "head.safetensors").exists() == (head != "none")
        check_readme(out, load_model(folder), (64, 96))
    check_readme(tmp_path / "outNone", load_model(folder), (75, 130))


def test_config_is_timms_own_and_has_the_facts(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "test_vit3")
    out = tmp_path / "out"
    export_timm(folder, out)
    model = load_model(folder)
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "head.safetensors",
        "config.json",
        "README.md",
    }
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "test_vit3"
    facts = config["equifeat"]
    assert facts["backbone"] == {
        "name": "test_vit3.r160_in1k",
        "sha256": model.backbone.weights_hash(),
        "weights": "random",
        "position": "timm",
    }
    assert facts["head"]["formula"] == "x + conv(x)"
    assert facts["prefix_tokens"] == model.backbone.num_prefix_tokens
    assert facts["mean"] == [0.5, 0.5, 0.5]
    assert facts["lora"] == {"rank": 3, "alpha": 5.0, "blocks": 2}
    # The whole folder opens as timm opens a folder, or a repository of the hub.
    vit: Any = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    image = images(1, 48, 80)
    with torch.no_grad():
        tokens = vit.forward_features(normalized(image, model))
        same(as_map(tokens, model, (48, 80)), model.dense(image).features)


def test_readme_repeats_the_references_sampling_where_the_model_does(tmp_path: Path) -> None:
    folder = GOLDEN / "model_v2_reference_sampling"
    weights = str(GOLDEN / "model_backbones" / "test_vit.safetensors")
    export_timm(folder, tmp_path / "out", weights)
    model = load_model(folder, weights=weights)
    assert model.sampling == "reference"
    check_readme(tmp_path / "out", model, (75, 130))
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["equifeat"]
    assert facts["sampling"] == "reference"


def test_model_without_lora_is_its_backbone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "test_vit", blocks=0)
    export_timm(folder, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    own = load_model(folder).backbone.model.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[key], own[key]) for key in own)
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["equifeat"]
    assert facts["lora"] is None


def test_reference_positions_need_a_size_and_are_then_equal(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "test_vit", position="reference")
    with pytest.raises(ExportError, match=r"only equifeat can.*--height and --width.*160 160"):
        export_timm(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    said = export_timm(folder, tmp_path / "out", size_hw=(128, 192))
    assert "for images of 128 × 192 pixels" in said
    text = (tmp_path / "out" / "README.md").read_text()
    assert "**For images of 128 x 192 pixels only.**" in text
    assert "which timm cannot" in text
    model = load_model(folder)
    check_readme(tmp_path / "out", model, (128, 192))
    # It matters: resampled as timm does, the features are others.
    vit: Any = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    state = timm_state(model, (160, 160))
    vit.load_state_dict(state, strict=True)
    image = images(1, 128, 192)
    with torch.no_grad():
        expected = model.dense(image).features
        other = as_map(vit.forward_features(normalized(image, model)), model, (128, 192))
    assert float((other - expected).abs().max()) > 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("size_hw", [(160, 100), (8, 160), (0, 0)])
def test_sizes_that_do_not_fit_are_refused(size_hw: tuple[int, int], tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "test_vit")
    with pytest.raises(ExportError, match="must be multiples of 16"):
        export_timm(folder, tmp_path / "out", size_hw=size_hw)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model", "test_vit")
    with pytest.raises(ExportError, match="is there already"):
        export_timm(folder, folder)
    with pytest.raises(ExportError, match="is there already"):
        export_timm(folder, folder / "config.json")
    with pytest.raises(CheckpointError, match="not a model folder"):
        export_timm(tmp_path, tmp_path / "out")
    # A wrong export is noticed by its features, whatever the cause.
    monkeypatch.setattr(
        "equifeat.export.timm_.save_timm",
        lambda *_: timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval(),
    )
    with pytest.raises(ExportError, match="gives other features"):
        export_timm(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
