"""Model folders of every format version load and give the features they gave when written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from equifeat.checkpoint import FORMAT, load_model, read_config, save_model
from equifeat.errors import CheckpointError
from tests.golden_models import (
    BACKBONES,
    EXPECTED,
    KINDS,
    SUMS,
    features,
    folders,
    load,
    make_set,
    read_sums,
    sums,
)
from tests.helpers import GOLDEN
from tests.model.test_weights import needs_packaged

SETS = [BACKBONES, *sorted(GOLDEN.glob("model_v*"))]


def parameters(found: list[Path]) -> list[Any]:
    def needs(folder: Path) -> Any:
        kind = KINDS.get(folder.name)
        return needs_packaged if kind is not None and kind.file is None else ()

    return [
        pytest.param(folder, id=folder.relative_to(GOLDEN).as_posix(), marks=needs(folder))
        for folder in found
    ]


# A model that is no member of a set is frozen with numbers from elsewhere: tests/test_convert.py.
MEMBERS = parameters([folder for folder in folders() if folder.parent != GOLDEN])
ALL = parameters(folders())


@pytest.mark.parametrize("folder", MEMBERS)
def test_frozen_model_loads_with_the_features_it_had(folder: Path) -> None:
    frozen = load_file(folder / EXPECTED)
    model = load(folder)
    image, keypoints = frozen["image"], frozen["keypoints"]
    found = features(model, image, keypoints)
    for name, value in found.items():
        scale = float(frozen[name].abs().max())
        torch.testing.assert_close(value, frozen[name], rtol=1e-5, atol=2e-5 * scale)
    # What was trained is in them: the raw ViT is far from that.
    raw = features(model.raw(), image, keypoints)["dense"]
    assert float((raw - frozen["dense"]).abs().max()) > 0.05 * float(frozen["dense"].std())


@pytest.mark.parametrize("folder", ALL)
def test_frozen_model_is_saved_again_and_is_the_same(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    again = save_model(model, tmp_path / "model")
    loaded = load_model(again, backbone=model.backbone)
    frozen = load_file(folder / EXPECTED)
    with torch.no_grad():
        expected = model.dense(frozen["image"]).features
        assert torch.equal(loaded.dense(frozen["image"]).features, expected)


def newest_version(folder: Path) -> int:
    """Ask the reader itself, which knows more than one version."""
    version = 1
    while True:
        (folder / "config.json").write_text(
            json.dumps({"format": FORMAT, "version": version + 1}), encoding="utf-8"
        )
        try:
            read_config(folder)
        except CheckpointError:
            return version
        version += 1


def test_every_version_has_its_frozen_models(tmp_path: Path) -> None:
    found: dict[int, set[str]] = {}
    for folder in folders():
        version = read_config(folder)["version"]
        place = folder if folder.parent == GOLDEN else folder.parent
        assert place.name.startswith(f"model_v{version}")
        found.setdefault(version, set()).add(folder.name)
    assert set(found) == set(range(1, newest_version(tmp_path) + 1)), (
        "a format version without a frozen model: python -m tests.golden_models"
    )
    assert found[1] == set(KINDS)


@pytest.mark.parametrize("root", SETS, ids=lambda root: str(root.name))
def test_frozen_files_have_not_changed(root: Path) -> None:
    assert sums(root) == read_sums(root), f"a file of {root.name} is not what {SUMS} says"


def test_a_set_is_never_written_again() -> None:
    before = sums(GOLDEN / "model_v1")
    with pytest.raises(SystemExit, match="never written again"):
        make_set(GOLDEN / "model_v1")
    assert sums(GOLDEN / "model_v1") == before
