from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import equifeat
from equifeat.checkpoint import (
    load_model,
    load_trainable_state,
    save_model,
    trainable_state,
)
from equifeat.errors import CheckpointError, WeightsError
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.head import HeadKind
from tests.model.tiny import backbone, images, randomize, timm_model


def trained(
    head: HeadKind = "residual", blocks: int = 2, seed: int = 0, weights: str = "random"
) -> FeatureExtractor:
    extractor = build_extractor("test_vit", weights, head, 3, 6.0, blocks, seed=seed)
    if extractor.adapter is not None:
        randomize(extractor.adapter)
    with torch.no_grad():
        for parameter in extractor.head.parameters():
            parameter.add_(0.01)
    return extractor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(trained(), tmp_path / "model", recipe={"steps": 3})


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("head", ["none", "conv", "residual"])
@pytest.mark.parametrize("blocks", [0, 2])
def test_saved_model_loads_equal(head: HeadKind, blocks: int, tmp_path: Path) -> None:
    model = trained(head, blocks, seed=4)
    folder = save_model(model, tmp_path / "model")
    loaded = load_model(folder)
    with torch.no_grad():
        expected = model.dense(images()).features
        assert torch.equal(loaded.dense(images()).features, expected)
    for name, value in trainable_state(model).items():
        assert torch.equal(trainable_state(loaded)[name], value)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "README.md"} | (
        {"adapter_model.safetensors", "adapter_config.json"} if blocks else set()
    ) | ({"head.safetensors"} if head != "none" else set())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_config_names_all_that_is_needed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    model = trained()
    assert config["format"] == "equifeat-model"
    assert config["version"] == 1
    assert config["backbone"] == {
        "name": "test_vit.r160_in1k",
        "sha256": model.backbone.weights_hash(),
        "weights": {"source": "random", "seed": 0},
        "position": "timm",
        "patch_size": 16,
        "dim": 64,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
    assert config["lora"] == {"rank": 3, "alpha": 6.0, "blocks": 2, "targets": ["q", "v"]}
    assert config["head"] == {"kind": "residual"}
    assert "(0.5, 0.5)" in config["pixel_convention"]
    assert config["recipe"] == {"steps": 3}


def test_model_card_has_usage_and_results(tmp_path: Path) -> None:
    rows = [{"features": "raw", "APE": 30.5}, {"features": "trained", "APE": 26.7}]
    card = {"summary": "A test.", "training object": "mars_rover", "results": rows}
    text = (save_model(trained(), tmp_path / "m1", card=card) / "README.md").read_text()
    assert 'equifeat.load("m1")' in text
    assert "A test." in text
    assert "- training object: mars_rover" in text
    assert "| features | APE |\n| --- | --- |\n| raw | 30.5 |" in text


def test_saving_again_replaces_a_model_and_nothing_else(tmp_path: Path) -> None:
    folder = save_model(trained("conv"), tmp_path / "model")
    save_model(trained("none"), folder)
    assert not (folder / "head.safetensors").exists()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds 'notes\.txt'.*not be overwritten"):
        save_model(trained(), folder)
    assert load_model(folder).head.kind == "none"
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "README.md").write_text("mine")
    with pytest.raises(CheckpointError, match="not a model folder"):
        save_model(trained(), photos)
    with pytest.raises(CheckpointError, match="is a file"):
        save_model(trained(), photos / "README.md")
    assert (photos / "README.md").read_text() == "mine"


def test_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("equifeat.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(trained(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_missing_unexpected_and_misshapen_tensors_are_listed(folder: Path) -> None:
    head = folder / "head.safetensors"
    state = load_file(head)
    for wrong, reason in (
        ({"conv.weight": state["conv.weight"]}, r"1 missing \(conv\.bias\)"),
        ({**state, "extra": torch.zeros(1)}, r"1 unexpected \(extra\)"),
        ({**state, "conv.bias": torch.zeros(3)}, r"conv\.bias: \(3,\) instead of \(64,\)"),
    ):
        save_file(wrong, head)
        with pytest.raises(CheckpointError, match=reason):
            load_model(folder)
    save_file(state, head)
    load_model(folder)
    head.write_bytes(head.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"head\.safetensors cannot be read"):
        load_model(folder)
    head.unlink()
    with pytest.raises(CheckpointError, match=r"incomplete.*head\.safetensors does not exist"):
        load_model(folder)


def test_adapter_files_are_strict_too(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    save_file(dict(list(state.items())[1:]), path)
    with pytest.raises(CheckpointError, match="1 missing"):
        load_model(folder)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(folder)
    save_file(state, path)
    edit(folder, lora=None)
    with pytest.raises(CheckpointError, match=r"which config\.json knows nothing of"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 3}, "upgrade"),
        ({"version": "new"}, "no valid format version"),
        ({"format": "other"}, "not of an equifeat model"),
        ({"head": {"kind": "mlp"}}, "head must be one of"),
        ({"head": None}, "lacks or garbles"),
        ({"lora": {"rank": 3}}, "lacks or garbles"),
        ({"lora": {"rank": 3, "alpha": 6, "blocks": 99}}, "has 6 blocks"),
        ({"backbone": {}}, "lacks or garbles"),
    ],
)
def test_wrong_config_is_named(folder: Path, changes: dict[str, Any], reason: str) -> None:
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_what_is_no_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a model folder: it has no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(tmp_path)


def test_another_backbone_is_refused(folder: Path) -> None:
    shared = trained().backbone
    assert load_model(folder, backbone=shared).backbone is shared
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_model(folder, backbone=trained(seed=1).backbone)
    with pytest.raises(CheckpointError, match="needs a backbone with name"):
        load_model(folder, backbone=backbone("dinov2"))


def test_file_weights_are_found_again_or_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(timm_model("vit").state_dict(), path)
    model = trained(weights=str(path))
    folder = save_model(model, tmp_path / "model")
    expected = model.dense(images()).features
    assert torch.equal(load_model(folder).dense(images()).features, expected)
    moved = path.rename(tmp_path / "moved.safetensors")
    with pytest.raises(CheckpointError, match="give weights=FILE"):
        load_model(folder)
    loaded = load_model(folder, weights=str(moved))
    assert torch.equal(loaded.dense(images()).features, expected)
    save_file(timm_model("vit", seed=5).state_dict(), moved)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_model(folder, weights=str(moved))
    with pytest.raises(WeightsError, match="does not exist"):
        load_model(folder, weights=str(tmp_path / "absent.pth"))


def test_models_that_cannot_be_named_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="merged"):
        save_model(trained().merged(), tmp_path / "m")
    with pytest.raises(CheckpointError, match="float32"):
        save_model(trained().half(), tmp_path / "m")


def test_trainable_state_goes_round_and_is_strict() -> None:
    model, other = trained(), trained("conv", seed=3)
    state = trainable_state(model)
    assert set(state) == set(model.trainable_parameters())
    assert not any(name.startswith("backbone") for name in state)
    fresh = build_extractor(
        model.backbone, head="residual", lora_rank=3, lora_alpha=6.0, lora_blocks=2
    )
    load_trainable_state(fresh, state)
    assert torch.equal(fresh.dense(images()).features, model.dense(images()).features)
    with pytest.raises(CheckpointError, match="1 missing"):
        load_trainable_state(other, {k: v for k, v in state.items() if k != "head.conv.bias"})
    with pytest.raises(CheckpointError, match="of wrong shape"):
        load_trainable_state(other, {**state, "head.conv.bias": torch.zeros(1)})


def test_public_names_are_lazy() -> None:
    code = "import sys, equifeat; assert 'torch' not in sys.modules; print(equifeat.__version__)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == equifeat.__version__
    assert equifeat.load is load_model
    assert equifeat.build_extractor is build_extractor
    assert set(equifeat.__all__) <= set(dir(equifeat))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        equifeat.laod  # noqa: B018
