"""Predictions on disk: of one configuration, whole, and named when they are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from equifeat.errors import RecipeError
from equifeat.eval.cache import PredictionCache, file_name

KEY = {"task": "pose", "protocol": "a/b", "model": "m1", "data": "d1"}


def test_predictions_come_back(tmp_path: Path) -> None:
    prediction = {"xy": torch.rand(3, 2)[:, :1], "ok": torch.tensor([True, False])}
    for folder in (tmp_path / "cache", None):
        cache = PredictionCache(folder, KEY)
        assert "../x y/π" not in cache
        cache.put("../x y/π", prediction)
        assert "../x y/π" in cache
        found = (PredictionCache(folder, KEY) if folder else cache).get("../x y/π")
        assert all(torch.equal(found[k], prediction[k]) for k in prediction)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 2
    assert all(p.is_relative_to(tmp_path / "cache") for p in files)


@pytest.mark.parametrize("name", ["model", "data", "protocol"])
def test_another_configuration_is_refused_by_name(tmp_path: Path, name: str) -> None:
    PredictionCache(tmp_path, KEY)
    with pytest.raises(RecipeError, match=rf"made with {name} \S+, but now {name} is other"):
        PredictionCache(tmp_path, {**KEY, name: "other"})


def test_damage_is_named(tmp_path: Path) -> None:
    cache = PredictionCache(tmp_path, KEY)
    cache.put("a", {"x": torch.zeros(100)})
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    with pytest.raises(RecipeError, match=f"{file.name} is damaged"):
        cache.get("a")
    file.write_bytes(whole)
    cache.put("b", {"x": torch.zeros(1)})
    (other,) = set(tmp_path.rglob("*.safetensors")) - {file}
    other.write_bytes(whole)
    with pytest.raises(RecipeError, match="is of item 'a', not 'b'"):
        cache.get("b")
    (tmp_path / "predictions.json").write_text("{")
    with pytest.raises(RecipeError, match="is damaged"):
        PredictionCache(tmp_path, KEY)
    (tmp_path / "predictions.json").write_text(json.dumps({**KEY, "format": "older"}))
    with pytest.raises(RecipeError, match="format older"):
        PredictionCache(tmp_path, KEY)


def test_file_names_are_safe() -> None:
    assert file_name("pf-pascal/mef-840+layers=[-4,-1]") == "pf-pascal-mef-840+layers=--4,-1"
    assert file_name("../../etc") == "etc"
    assert file_name("π") == "unnamed"
    assert file_name(".hidden") == "hidden"
