"""What --model names: rows, seeds, controls, and hashes that tell models apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from equifeat.checkpoint import save_model
from equifeat.errors import CheckpointError, RecipeError
from equifeat.eval.models import ModelSpec, extractor_hash, open_word, parse_models, with_controls
from equifeat.model.extractor import FeatureExtractor, build_extractor

MODEL = "test_vit.r160_in1k"


def fresh(seed: int = 5) -> FeatureExtractor:
    return build_extractor(MODEL, "random", "conv", lora_rank=2, lora_blocks=2, seed=seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    extractor = fresh()
    with torch.no_grad():
        for parameter in extractor.trainable_parameters().values():
            parameter.add_(0.01)
    out = tmp_path_factory.mktemp("models") / "model"
    return save_model(extractor, out, recipe={"seed": 5})


def test_words_are_rows_and_seeds() -> None:
    found = parse_models(["a", "ours=x/1,x/2", "runs/model"])
    assert found[1] == ModelSpec("ours", ("x/1", "x/2"))
    assert found[2] == ModelSpec("runs/model", ("runs/model",))


@pytest.mark.parametrize(
    ("words", "match"),
    [(["a", "a"], "twice"), (["=a"], "must be"), (["a="], "must be"), ([], "no model")],
)
def test_wrong_words_are_named(words: list[str], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        parse_models(words)


def test_controls_are_the_raw_vit_and_the_model_before_its_first_step(folder: Path) -> None:
    specs = with_controls(parse_models([f"ours={folder}", f"again={folder}", "random"]))
    assert [spec.name for spec in specs] == [
        f"{MODEL} raw",
        *("ours untrained", "ours", "again untrained", "again"),
        "random",
    ]
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    raw, untrained, trained = (
        open_word(spec.words[0], device="cpu").model.dense(images).features for spec in specs[:3]
    )
    assert torch.equal(raw, fresh().raw().dense(images).features)
    assert torch.equal(untrained, fresh().dense(images).features)
    assert not torch.allclose(untrained, trained)
    assert not torch.allclose(raw, untrained)


def test_without_a_seed_the_untrained_model_is_not_made_up(tmp_path: Path, folder: Path) -> None:
    save_model(fresh(), tmp_path / "model")
    with pytest.raises(RecipeError, match="does not tell the seed"):
        open_word(f"{tmp_path / 'model'}@untrained")
    with pytest.raises(CheckpointError, match="not a model folder"):
        with_controls(parse_models([str(tmp_path)]))
    assert json.loads((folder / "config.json").read_text())["recipe"]["seed"] == 5


def test_hashes_tell_models_apart(folder: Path) -> None:
    hashes = [open_word(f"{folder}{end}").hash for end in ("", "@raw", "@untrained")]
    hashes += [open_word(word).hash for word in ("oracle", "random")]
    hashes += [open_word(str(folder), precision="bfloat16").hash]
    hashes += [extractor_hash(fresh(6))]
    assert len(set(hashes)) == len(hashes)
    assert open_word(str(folder)).hash == hashes[0]
    wider = build_extractor(MODEL, "random", "conv", lora_rank=2, lora_alpha=4.0, lora_blocks=2)
    same = build_extractor(MODEL, "random", "conv", lora_rank=2, lora_alpha=2.0, lora_blocks=2)
    assert extractor_hash(wider) != extractor_hash(same)


def test_half_precision_is_almost_the_same_and_known_by_name(folder: Path) -> None:
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for word in (str(folder), f"{folder}@raw", f"{folder}@untrained"):
        full, half = (
            open_word(word, precision=name).model.dense(images).features
            for name in ("float32", "bfloat16")
        )
        assert half.dtype == torch.float32
        assert not torch.equal(full, half)
        assert torch.cosine_similarity(full, half, dim=1).min() > 0.99
    with pytest.raises(RecipeError, match=r"'bfloat' is not one of .* Did you mean bfloat16"):
        open_word(str(folder), precision="bfloat")
