"""Every recipe is read by the real parser, names its command, and makes a step at a tiny size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from equifeat.cli import run
from tests.helpers import ROOT
from tests.synthetic import write_views

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe_views")
    write_views(folder / "box", "box", views=4, size=96)
    return folder


def test_there_are_recipes() -> None:
    assert {"one_object.yaml", "smoke.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_makes_a_step(path: Path, views: Path, tmp_path: Path) -> None:
    run(
        [
            *("fit", "--config", str(path), "--run.dir", str(tmp_path / "run")),
            *("--model.backbone", "test_vit.r160_in1k", "--model.weights", "random"),
            *("--model.resolution", "6", "--data.views", str(views), "--data.num_keypoints", "64"),
            *("--trainer.max_steps", "1", "--trainer.accelerator", "cpu"),
        ]
    )
    assert (tmp_path / "run/model/config.json").is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_says_command_hardware_and_numbers(path: Path) -> None:
    header = path.read_text().split("seed_everything")[0]
    for word in ("Command:", "Hardware:", "Numbers:"):
        assert word in header
    assert f"equifeat fit --config recipes/{path.name}" in header
    assert re.search(r"ckpt_path: last$", path.read_text().strip())
    assert yaml.safe_load(path.read_text())["run"]["dir"].startswith("runs/")
