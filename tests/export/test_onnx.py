"""ONNX exports, run by onnxruntime's CPU provider alone, give the model's features."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

import equifeat
from equifeat.errors import CheckpointError, ExportError, MissingExtraError
from equifeat.export import onnx_
from equifeat.export.graph import check_dynamic
from equifeat.export.onnx_ import export_onnx
from equifeat.export.onnx_check import Case, compare
from equifeat.files import sha256_of
from equifeat.model.extractor import FeatureExtractor
from tests.export.test_graph import model, points
from tests.helpers import ROOT
from tests.model.tiny import images

ATOL = 2e-5
SAID = r"features differ from the model's by \d\.\de-\d\d of the largest"


def exported(extractor: FeatureExtractor, out: Path, **options: Any) -> str:
    """Export a model that has no folder: tiny ones of most families cannot be named."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_, "load_model", lambda folder, weights=None: extractor)
        return export_onnx("model", out, **options)


class Fixed:
    """A model folder with random weights, exported for one size that is not of whole patches."""

    size_hw = (61, 50)

    def __init__(self, folder: Path) -> None:
        built = equifeat.build_extractor("test_vit.r160_in1k", "random", "conv", lora_blocks=2)
        self.folder = equifeat.save_model(built, folder / "model")
        self.extractor = equifeat.load(self.folder)
        self.out = folder / "onnx"
        self.said = export_onnx(self.folder, self.out, size_hw=self.size_hw)


class Free:
    """Any size, any batch: DINOv3, whose rotary embedding depends on the size."""

    def __init__(self, folder: Path) -> None:
        self.extractor = model("dinov3")
        self.out = folder / "onnx"
        self.said = exported(self.extractor, self.out, dynamic="size")


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Fixed:
    return Fixed(tmp_path_factory.mktemp("fixed"))


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Free:
    return Free(tmp_path_factory.mktemp("free"))


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert opened.get_providers() == ["CPUExecutionProvider"]
    return opened


def run(out: Path, image: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    (features,) = session(out / "dense.onnx").run(["features"], {"images": image.numpy()})
    inputs = {"images": image.numpy(), "keypoints": xy.numpy()}
    (descriptors,) = session(out / "keypoints.onnx").run(["descriptors"], inputs)
    return torch.from_numpy(features), torch.from_numpy(descriptors)


@torch.no_grad()
def check(extractor: FeatureExtractor, out: Path, image: Tensor, xy: Tensor, atol: float) -> None:
    features, descriptors = run(out, image, xy)
    assert torch.allclose(features, extractor.dense(image).features, rtol=0, atol=atol)
    assert torch.allclose(descriptors, extractor.at(image, xy), rtol=0, atol=atol)


def test_a_fixed_size(fixed: Fixed) -> None:
    check(fixed.extractor, fixed.out, images(1, 61, 50), points(1, 30, (61, 50)), ATOL)
    assert "one image of 61 x 50 pixels (height x width) only, resized to 64 x 48" in fixed.said
    assert re.search(SAID, fixed.said)
    dense = session(fixed.out / "dense.onnx")
    with pytest.raises(Exception, match="Got invalid dimensions"):
        dense.run(None, {"images": images(2, 61, 50).numpy()})


def test_what_is_written(fixed: Fixed) -> None:
    config = json.loads((fixed.out / "config.json").read_text(encoding="utf-8"))
    assert {path.name for path in fixed.out.iterdir()} == {
        "dense.onnx",
        "keypoints.onnx",
        "config.json",
        "README.md",
    }
    assert (config["format"], config["precision"], config["batch"]) == (
        "equifeat-onnx",
        "float32",
        1,
    )
    assert config["size_hw"] == [61, 50]
    assert config["grid_hw"] == [4, 3]
    assert config["check"]["features"] < 1e-5
    for name, entry in config["files"].items():
        path = fixed.out / name
        assert entry["sha256"] == sha256_of(path)
        graph = onnx.load(str(path))
        assert {opset.domain: opset.version for opset in graph.opset_import} == {"": 18}
        props = {prop.key: prop.value for prop in graph.metadata_props}
        assert props["backbone_sha256"] == config["model"]["backbone"]["sha256"]
        assert "(0.5, 0.5)" in props["pixel_convention"]
        content = path.read_bytes()  # torch's exporter notes the files and lines of every node
        for told in (b"site-packages", str(ROOT).encode(), b".py"):
            assert told not in content
    ports = {
        name: [(port["name"], port["shape"]) for port in entry["inputs"] + entry["outputs"]]
        for name, entry in config["files"].items()
    }
    assert ports == {
        "dense.onnx": [("images", [1, 3, 61, 50]), ("features", [1, 64, 4, 3])],
        "keypoints.onnx": [
            ("images", [1, 3, 61, 50]),
            ("keypoints", [1, "points", 2]),
            ("descriptors", [1, "points", 64]),
        ],
    }


def test_the_readmes_code_runs_without_torch(fixed: Fixed) -> None:
    text = (fixed.out / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    code += "import sys\nassert not {'torch', 'timm', 'equifeat'} & set(sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=fixed.out,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "(1, 64, 4, 3)"


def test_a_free_size(free: Free) -> None:
    p = free.extractor.patch_size
    own_h, own_w = (side // p for side in free.extractor.backbone.native_hw)
    grids = [(1, own_h, own_w), (2, own_h + 5, own_w + 2), (3, 2, 3 * own_w), (1, 1, 1)]
    for batch, h, w in grids:
        size_hw = (h * p, w * p)
        check(free.extractor, free.out, images(batch, *size_hw), points(batch, 5, size_hw), ATOL)
    assert "any number of images of any height and width that are multiples of 16" in free.said
    with pytest.raises(Exception, match="cannot be reshaped"):
        session(free.out / "dense.onnx").run(None, {"images": images(1, 64, 50).numpy()})


def test_half_precision_with_weights_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights beside, as above 2 GB; positions resampled as the reference does; 4 points only."""
    monkeypatch.setattr(onnx_, "_INSIDE_BELOW", 1000)
    extractor = model("dinov2", "reference", "conv")
    said = exported(extractor, tmp_path / "a", dynamic="size", half=True, keypoints=4, check=False)
    assert "float16" in said
    assert said.endswith("They were not run.")
    out = (tmp_path / "a").rename(tmp_path / "b")  # the graph finds its weights again
    assert "not run after they were written" in (out / "README.md").read_text(encoding="utf-8")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    for name, entry in config["files"].items():
        assert entry["weights"]["file"] == f"{name}.data"
        assert entry["weights"]["sha256"] == sha256_of(out / f"{name}.data")
        assert entry["bytes"] < entry["weights"]["bytes"]

    p, native = extractor.patch_size, extractor.backbone.native_hw
    for size_hw in (native, (native[0], 3 * p), (9 * p, 8 * p)):
        check(extractor, out, images(2, *size_hw), points(2, 4, size_hw), 2e-2)
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run(out, images(1, *native), points(1, 5, native))

    graph = onnx.load(str(out / "dense.onnx")).graph
    matrices = [item for item in graph.initializer if len(item.dims) == 2]
    halves = [item for item in matrices if item.data_type == TensorProto.FLOAT16]
    assert len(halves) >= 4 * extractor.backbone.depth
    ports = [port.type.tensor_type.elem_type for port in (*graph.input, *graph.output)]
    assert ports == [TensorProto.FLOAT, TensorProto.FLOAT]


def test_a_real_model_and_a_free_batch(tmp_path: Path) -> None:
    built = equifeat.build_extractor(
        "vit_small_patch14_dinov2.lvd142m", "packaged", head="residual"
    )
    folder = equifeat.save_model(built, tmp_path / "model")
    size_hw = (150, 140)
    said = export_onnx(folder, tmp_path / "onnx", size_hw=size_hw, dynamic="batch")
    assert "any number of images of 150 x 140 pixels" in said
    check(
        equifeat.load(folder), tmp_path / "onnx", images(2, *size_hw), points(2, 9, size_hw), 5e-5
    )


def damaged(path: Path) -> None:
    """Make one weight matrix a little larger."""
    graph = onnx.load(str(path))
    weight = next(item for item in graph.graph.initializer if len(item.dims) == 2)
    values = numpy_helper.to_array(weight) * np.float32(1.01)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(graph, str(path))


@pytest.mark.parametrize("name", ["dense.onnx", "keypoints.onnx"])
def test_the_check_sees_a_wrong_weight(fixed: Fixed, tmp_path: Path, name: str) -> None:
    out = shutil.copytree(fixed.out, tmp_path / "onnx")
    cases = [Case(1, fixed.size_hw, 5)]
    assert compare(out, fixed.extractor, cases, False)["features"] < 1e-5
    damaged(out / name)
    with pytest.raises(ExportError, match=r"other features than the model.*nothing was written"):
        compare(out, fixed.extractor, cases, False)


def test_the_check_sees_a_broken_file(fixed: Fixed, tmp_path: Path) -> None:
    out = shutil.copytree(fixed.out, tmp_path / "onnx")
    (out / "dense.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"onnxruntime cannot load dense\.onnx"):
        compare(out, fixed.extractor, [Case(1, fixed.size_hw, 5)], False)


def test_the_check_sees_a_size_that_cannot_run(fixed: Fixed) -> None:
    with pytest.raises(ExportError, match=r"cannot run the graph with images \(2, 3, 61, 50\)"):
        compare(fixed.out, fixed.extractor, [Case(2, fixed.size_hw, 5)], False)


def test_an_export_that_differs_is_not_written(
    fixed: Fixed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written_wrongly(program: Any, folder: Path, config: Any) -> dict[str, Any]:
        for name in ("dense.onnx", "keypoints.onnx"):
            shutil.copy(fixed.out / name, folder / name)
        damaged(folder / "keypoints.onnx")
        return {}

    monkeypatch.setattr(onnx_, "_traced", lambda graph, plan: None)
    monkeypatch.setattr(onnx_, "_write", written_wrongly)
    with pytest.raises(ExportError, match="other features than the model"):
        export_onnx(fixed.folder, tmp_path / "onnx", size_hw=fixed.size_hw)
    assert not list(tmp_path.iterdir())


def test_what_torch_cannot_export_is_one_sentence(
    fixed: Fixed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        try:
            raise ValueError("no such operator\nwith details")
        except ValueError as error:
            raise RuntimeError("a page of advice") from error

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ExportError, match=r"torch\.onnx cannot export this ViT: no such operator$"):
        export_onnx(fixed.folder, tmp_path / "onnx", size_hw=(32, 32))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dynamic": "size", "size_hw": (64, 64)}, "are given too: leave out one of the two"),
        ({"keypoints": 0}, "keypoints must be 1 or more points an image, not 0"),
        ({"size_hw": (0, 64)}, r"height and width of 1 pixel or more, not \(0, 64\)"),
    ],
)
def test_options_that_make_no_sense(
    fixed: Fixed, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ExportError, match=sentence):
        export_onnx(fixed.folder, tmp_path / "onnx", **options)
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_of_freedom() -> None:
    with pytest.raises(ExportError, match="dynamic must be one of none, batch, size, not 'shape'"):
        check_dynamic("shape", None)


def test_folders_that_make_no_sense(fixed: Fixed, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is there already and will not be overwritten"):
        export_onnx(fixed.folder, fixed.out)
    with pytest.raises(CheckpointError, match="is not a model folder"):
        export_onnx(tmp_path, tmp_path / "onnx")


def test_a_missing_package_is_named(
    fixed: Fixed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r'ONNX export needs.*"equifeat\[onnx\]"'):
        export_onnx(fixed.folder, tmp_path / "onnx")
