from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from equifeat.checkpoint import load_model
from equifeat.errors import ExportError
from equifeat.export.peft_ import export_peft
from equifeat.model.extractor import FeatureExtractor
from tests.export.foreign_models import (
    DINOV2,
    as_map,
    check_readme,
    normalized,
    readme_functions,
    same,
    saved,
)
from tests.model.test_weights import needs_packaged
from tests.model.tiny import images

# Its attention reads qkv.weight and never calls qkv.
EVA = "eva02_tiny_patch14_224"


def vit_of(model: FeatureExtractor) -> Any:
    """The timm model as its user has it, with the backbone's weights."""
    vit = timm.create_model(model.backbone.name, num_classes=0, dynamic_img_size=True)
    vit.load_state_dict(model.backbone.model.state_dict(), strict=True)
    return vit.eval()


def check(model: FeatureExtractor, out: Path, size_hw: tuple[int, int], unmerged: bool) -> None:
    image = images(1, *size_hw)
    with torch.no_grad():
        expected = model.dense(image).features

        def features(vit: Any) -> Tensor:
            return as_map(vit.forward_features(normalized(image, model)), model, size_hw)

        loaded = peft.PeftModel.from_pretrained(vit_of(model), str(out)).eval()
        if unmerged:
            same(features(loaded.base_model.model), expected)
        else:  # and silently does nothing
            assert torch.equal(
                features(loaded.base_model.model), as_map_of_raw(model, image, size_hw)
            )
        merged = peft.PeftModel.from_pretrained(vit_of(model), str(out)).merge_and_unload()
        same(features(merged), expected)


def as_map_of_raw(model: FeatureExtractor, image: Tensor, size_hw: tuple[int, int]) -> Tensor:
    return as_map(vit_of(model).forward_features(normalized(image, model)), model, size_hw)


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_vit4", EVA])
def test_stock_peft_gives_the_features(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", name)
    out = tmp_path / "out"
    export_peft(folder, out)
    model = load_model(folder)
    p = model.patch_size
    check(model, out, (5 * p, 7 * p), unmerged=name != EVA)
    text = (out / "README.md").read_text()
    assert ("`merge_and_unload()` is needed" in text) == (name == EVA)
    assert ("`merge_and_unload()` may be left out" in text) == (name != EVA)
    put_backbone(model, out)
    check_readme(out, model, (5 * p + 3, 7 * p))


def put_backbone(model: FeatureExtractor, out: Path) -> None:
    state = {key: value.clone() for key, value in model.backbone.model.state_dict().items()}
    save_file(state, out / "backbone.safetensors")


@needs_packaged
def test_real_dinov2_with_stock_peft(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", DINOV2, "packaged", blocks=4)
    out = tmp_path / "out"
    said = export_peft(folder, out)
    assert "a PEFT adapter of timm's vit_small_patch14_dinov2.lvd142m" in said
    model = load_model(folder)
    check(model, out, (140, 196), unmerged=True)
    put_backbone(model, out)
    check_readme(out, model, (150, 200))


def test_it_is_an_ordinary_peft_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "test_vit", head="conv")
    out = tmp_path / "out"
    export_peft(folder, out)
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "config.json",
        "README.md",
    }
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 10)  # q and v of rank 3 on one fused qkv
    assert config["base_model_name_or_path"] == "timm/test_vit.r160_in1k"
    for name in ("adapter_model.safetensors", "head.safetensors"):
        ours, theirs = load_file(folder / name), load_file(out / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    facts = json.loads((out / "config.json").read_text())["equifeat"]
    assert facts["head"]["formula"] == "conv(x)"
    assert facts["backbone"]["sha256"] == load_model(folder).backbone.weights_hash()


def test_readme_takes_hub_weights_where_the_model_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network the download is played by the same weights."""
    folder = saved(tmp_path / "model", "test_vit", head="none")
    model = load_model(folder)
    own = {key: value.clone() for key, value in model.backbone.model.state_dict().items()}
    save_file(own, tmp_path / "w.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["backbone"]["weights"] = {"source": "hub"}
    (folder / "config.json").write_text(json.dumps(config))
    create = timm.create_model
    asked = []

    def download(name: str, pretrained: bool = False, **options: Any) -> Any:
        vit = create(name, **options)
        if pretrained:
            asked.append(name)
            vit.load_state_dict(own)
        return vit

    monkeypatch.setattr(timm, "create_model", download)
    monkeypatch.setattr("equifeat.model.backbone.timm.create_model", download)
    out = tmp_path / "out"
    export_peft(folder, out)
    assert not re.search(r"backbone\.safetensors", (out / "README.md").read_text())
    asked.clear()
    found = readme_functions(out)
    assert asked == ["test_vit.r160_in1k"]
    image = images(1, 64, 80)
    with torch.no_grad():
        same(found["features"](image), model.dense(image).features)


def test_reference_positions_are_said_loudly(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "test_vit", position="reference")
    out = tmp_path / "out"
    said = export_peft(folder, out)
    assert "Only images of 160 × 160 pixels give these features" in said
    assert "**Only images of 160 x 160 pixels" in (out / "README.md").read_text()
    check(load_model(folder), out, (160, 160), unmerged=True)


def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = saved(tmp_path / "without", "test_vit", blocks=0)
    with pytest.raises(ExportError, match=r"has no LoRA, only a head \(residual\): give --to timm"):
        export_peft(without, tmp_path / "out")
    folder = saved(tmp_path / "model", "test_vit")
    with pytest.raises(ExportError, match="is there already"):
        export_peft(folder, without)
    monkeypatch.setattr("equifeat.export.peft_.merge_with_peft", lambda vit, folder: vit)
    with pytest.raises(ExportError, match="gives other features"):
        export_peft(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"without", "model"}
