"""torch.export programs: equal to the model, run by torch alone, refused clearly."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from equifeat.checkpoint import load_model, save_model
from equifeat.errors import CheckpointError, ExportError
from equifeat.export import program as module
from equifeat.export.graph import KeypointGraph, keypoint_graph
from equifeat.export.program import export_program
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.head import Head
from equifeat.model.weights import PACKAGED_BACKBONE
from tests.model.tiny import backbone, images, randomize

# Without what made the file, as its users run it.
ALONE = "import sys; sys.modules.update(equifeat=None, timm=None, peft=None)\n"


@pytest.fixture(scope="module", autouse=True)
def _symbols_are_sizes() -> Iterator[None]:
    """The suite's type checker takes torch.export's symbols for no int."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def trained(name: str = "test_vit", weights: str = "random") -> FeatureExtractor:
    extractor = build_extractor(name, weights, "residual", lora_blocks=2)
    assert extractor.adapter is not None
    randomize(extractor.adapter)
    with torch.no_grad():
        for parameter in extractor.head.parameters():
            parameter.add_(0.01)
    return extractor.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(trained(), tmp_path_factory.mktemp("program") / "model")


@pytest.fixture(scope="module")
def fixed(folder: Path) -> Path:
    """Programs of one image of 50 × 70 pixels, which is no whole number of patches."""
    out = folder.parent / "fixed"
    export_program(folder, out, size_hw=(50, 70))
    return out


@pytest.fixture(scope="module")
def free(folder: Path) -> Path:
    """Programs of any batch and size, in float16."""
    out = folder.parent / "free"
    export_program(folder, out, dynamic="size", half=True)
    return out


def load(path: Path) -> Any:
    return torch.export.load(path).module()


def points(count: int, size_hw: tuple[int, int], batch: int = 1) -> Tensor:
    """Random points, some at the border."""
    generator = torch.Generator().manual_seed(count)
    h, w = size_hw
    found = torch.rand(batch, count, 2, generator=generator) * torch.tensor([w, h])
    found[:, 0] = torch.tensor([w - 0.1, h - 0.1])
    found[:, -1] = 0.0
    return found


def readme_code(out: Path) -> list[str]:
    text = (out / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run_alone(code: str, cwd: Path) -> str:
    command = [sys.executable, "-W", "error::UserWarning", "-c", ALONE + code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_programs_equal_the_model(folder: Path, fixed: Path) -> None:
    model = load_model(folder)
    image = images(1, 50, 70)
    with torch.no_grad():
        dense = load(fixed / "dense.pt2")(image)
        assert dense.shape == model.dense(image).features.shape == (1, model.dim, 3, 4)
        torch.testing.assert_close(dense, model.dense(image).features, rtol=0, atol=1e-5)
        keypoints = load(fixed / "keypoints.pt2")
        for count in (1, 2, 33):
            where = points(count, (50, 70))
            expected = model.at(image, where)
            torch.testing.assert_close(keypoints(image, where), expected, rtol=0, atol=1e-5)


def test_a_fixed_size_takes_no_other(fixed: Path) -> None:
    dense = load(fixed / "dense.pt2")
    for wrong in (images(1, 64, 64), images(2, 50, 70)):
        with pytest.raises((AssertionError, RuntimeError), match=r"images|shape"):
            dense(wrong)


def test_folder_says_what_it_is(folder: Path, fixed: Path) -> None:
    assert {path.name for path in fixed.iterdir()} == {
        "README.md",
        "config.json",
        "dense.pt2",
        "keypoints.pt2",
    }
    config = json.loads((fixed / "config.json").read_text())
    assert (config["format"], config["version"]) == ("equifeat-torch-export", 1)
    assert config["images"]["height"] == 50
    assert config["images"]["batch"] == 1
    worst = config["largest_difference"]["torch.export"]
    assert 0 < worst["dense"] < 1e-5
    assert 0 < worst["keypoints"] < 1e-5
    assert config["backbone"] == {
        key: json.loads((folder / "config.json").read_text())["backbone"][key]
        for key in ("name", "sha256")
    }


def test_readme_runs_with_torch_alone(fixed: Path, free: Path) -> None:
    code = "import os\n"
    for out in (fixed, free):
        (snippet,) = readme_code(out)
        code += f"os.chdir({str(out)!r})\n{snippet}print(tuple(descriptors.shape))\n"
    assert run_alone(code, fixed).split("\n")[:2] == ["(1, 2, 64)", "(2, 2, 64)"]


def test_free_batch_and_size_in_half_precision(folder: Path, free: Path) -> None:
    model = load_model(folder)
    p = model.patch_size
    dense, keypoints = load(free / "dense.pt2"), load(free / "keypoints.pt2")
    for batch, rows, columns in ((1, 2, 7), (3, 11, 4), (2, 10, 10)):
        size_hw = (rows * p, columns * p)
        image, where = images(batch, *size_hw), points(9, size_hw, batch)
        with torch.no_grad():
            expected = model.dense(image).features
            found = dense(image)
            assert found.dtype == torch.float32
            assert found.shape == expected.shape
            difference = float((found - expected).abs().max() / expected.abs().max())
            assert 1e-6 < difference < 5e-3  # it is not the float32 graph
            torch.testing.assert_close(
                keypoints(image, where), model.at(image, where), rtol=0, atol=5e-3
            )
    # no whole patches; fewer than two
    for wrong in (images(1, 3 * p + 1, 3 * p), images(1, p, 3 * p)):
        with pytest.raises((AssertionError, RuntimeError)):
            dense(wrong)
    config = json.loads((free / "config.json").read_text())
    assert config["compute"] == "float16"
    assert config["images"]["height"] == f"multiple of {p}"


def test_free_batch_at_the_native_size(folder: Path, tmp_path: Path) -> None:
    said = export_program(folder, tmp_path / "out", dynamic="batch")
    assert "any batch, images of 160 × 160 pixels, float32" in said
    model, image = load_model(folder), images(5, 160, 160)
    with torch.no_grad():
        found = load(tmp_path / "out" / "dense.pt2")(image)
        torch.testing.assert_close(found, model.dense(image).features, rtol=0, atol=1e-5)


def test_rotary_positions_with_free_sizes(tmp_path: Path) -> None:
    """The other families are in test_graph.py."""
    vit = backbone("dinov3")
    model = FeatureExtractor(vit, None, Head("residual", vit.dim, 0)).eval()
    plan = module.Plan(None, "size", False, False, vit.patch_size)
    worst = module._write(model, plan, tmp_path, "")
    assert worst["dense"] < 1e-5
    assert worst["keypoints"] < 1e-5


def test_real_backbone(tmp_path: Path) -> None:
    model = trained(PACKAGED_BACKBONE, "packaged")
    folder = save_model(model, tmp_path / "model")
    export_program(folder, tmp_path / "out", size_hw=(140, 140))
    image, where = images(1, 140, 140, seed=3), points(20, (140, 140))
    with torch.no_grad():
        found = load(tmp_path / "out" / "keypoints.pt2")(image, where)
        torch.testing.assert_close(found, model.at(image, where), rtol=0, atol=2e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.slow  # half a minute of the compiler
@pytest.mark.timeout(900)
def test_aot_inductor(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    # Compiling takes seconds a block.
    model.backbone.model.blocks = model.backbone.model.blocks[-1:]
    model.adapter = None
    monkeypatch.setattr(module, "load_model", lambda *args, **options: model)
    out = tmp_path / "out"
    said = export_program(folder, out, size_hw=(32, 48), dynamic="batch", aoti=True)
    assert "AOTInductor on " in said
    image = images(3, 32, 48)
    torch.save(image, tmp_path / "image.pt")
    _, code = readme_code(out)
    code += (
        f"image = torch.load({str(tmp_path / 'image.pt')!r}, weights_only=True)\n"
        "where = 'cuda' if torch.cuda.is_available() else 'cpu'\n"
        f"torch.save(dense(image.to(where)).cpu(), {str(tmp_path / 'found.pt')!r})\n"
    )
    run_alone(code, out)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(found, model.cpu().dense(image).features, rtol=0, atol=1e-3)


def test_no_compiler_is_found_out_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(module, "load_model", never)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match=r"AOTInductor needs the C\+\+ compiler .* not on PATH"):
        export_program(folder, tmp_path / "out", aoti=True)
    monkeypatch.setenv("CXX", "nvc++ -O2")
    with pytest.raises(ExportError, match=r"'nvc\+\+'"):
        export_program(folder, tmp_path / "out", aoti=True)


def test_wrong_options_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="leave out one of the two"):
        export_program(folder, tmp_path / "out", size_hw=(32, 32), dynamic="size")
    with pytest.raises(ExportError, match="dynamic must be one of none, batch, size"):
        export_program(folder, tmp_path / "out", dynamic="all")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"1 pixel or more"):
        export_program(folder, tmp_path / "out", size_hw=(0, 32))
    with pytest.raises(CheckpointError, match="not a model folder"):
        export_program(tmp_path / "none", tmp_path / "out")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="there"):
        export_program(folder, tmp_path / "there")
    assert {path.name for path in tmp_path.iterdir()} == {"there"}


def test_a_wrong_export_is_not_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(extractor: FeatureExtractor, size_hw: tuple[int, int] | None) -> KeypointGraph:
        graph = keypoint_graph(extractor, size_hw)
        with torch.no_grad():
            graph.dense.mean.add_(0.1)
        return graph

    monkeypatch.setattr(module, "keypoint_graph", wrong)
    with pytest.raises(ExportError, match=r"differs by .* more than 0.001: nothing was written"):
        export_program(folder, tmp_path / "out", size_hw=(32, 32))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_traced_is_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def data_dependent(self: Any, images: Tensor) -> Tensor:
        return images if images.sum() > 0 else -images

    monkeypatch.setattr("equifeat.export.graph.DenseGraph.forward", data_dependent)
    with pytest.raises(ExportError, match=r"^torch.export cannot trace dense with dynamic 'none'"):
        export_program(folder, tmp_path / "out", size_hw=(32, 32))
    assert list(tmp_path.iterdir()) == []
