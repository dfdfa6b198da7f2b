"""A real fit of a few steps: files, parameter count, falling loss, validation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from equifeat.cli import run
from equifeat.errors import CheckpointError, EquifeatError
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.feature_map import TrunkState
from equifeat.train.checkpoints import checkpoints, read_checkpoint
from equifeat.train.loggers import losses
from equifeat.train.module import EquivariantFinetune
from tests.synthetic import write_views
from tests.train.runs import EVERYTHING

BACKBONE = "test_vit.r160_in1k"


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    write_views(folder / "box", "box", views=6, size=96)
    return folder


def recipe(folder: Path, views: Path, **model: object) -> Path:
    settings = {
        "seed_everything": 0,
        "run": {"dir": str(folder / "run"), "save_every": 2},
        "model": {"backbone": BACKBONE, "weights": "random", **EVERYTHING, "lr": 1e-3, **model},
        "data": {
            "views": str(views),
            "num_keypoints": 200,
            "augment": False,
            "draws_per_epoch": 5,
        },
        "trainer": {"max_steps": 8, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
        "ckpt_path": "last",
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = read_checkpoint(checkpoints(folder / "run/checkpoints")[-1])[
        "state_dict"
    ]
    return weights


def test_fit_writes_checkpoints_logs_and_the_model_folder(tmp_path: Path, views: Path) -> None:
    path = recipe(tmp_path, views, trunk_cache_mb=16)
    run(["fit", "--config", str(path), "--trainer.max_steps", "24"])
    weights = last_weights(tmp_path)
    extractor = build_extractor(BACKBONE, weights="random", head="residual")
    trainable = sum(p.numel() for p in extractor.trainable_parameters().values())
    # Four blocks with rank 4 on q and v, and one 3x3 convolution of width D.
    d = 64
    assert trainable == 4 * 2 * (4 * d + d * 4) + d * d * 9 + d
    assert sum(w.numel() for w in weights.values()) == trainable
    curve = losses(tmp_path / "run")
    assert sorted(curve) == list(range(1, 25))
    first, last = [curve[i] for i in range(1, 7)], [curve[i] for i in range(19, 25)]
    assert sum(last) < sum(first)
    names = {p.name for p in (tmp_path / "run/model").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json"} <= names
    assert list((tmp_path / "run/logs").glob("events.out.tfevents*"))
    assert (tmp_path / "run/logs/config.yaml").is_file()


@pytest.mark.parametrize("augment", ["false", "{versions: 2}"])
def test_trunk_cache_changes_nothing(
    tmp_path: Path, views: Path, augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = FeatureExtractor.trunk

    def counted(self: FeatureExtractor, image: torch.Tensor, *rest: Any) -> TrunkState:
        calls.append(len(image))
        return real(self, image, *rest)

    monkeypatch.setattr(FeatureExtractor, "trunk", counted)
    curves, images = [], []
    for cache in (0, 16):
        folder = tmp_path / str(cache)
        folder.mkdir()
        calls.clear()
        words = ["fit", "--config", str(recipe(folder, views, trunk_cache_mb=cache))]
        run([*words, f"--data.augment={augment}", "--trainer.max_steps=12"])
        curves.append(list(losses(folder / "run").values()))
        images.append(sum(calls))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert images[0] == 24
    assert images[1] < 24


def test_validate_reports_held_out_loss(
    tmp_path: Path, views: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, views)
    command = ["validate", "--config", str(path), "--data.val_views", str(views)]
    command.append("--data.val_draws=3")
    with pytest.raises(EquifeatError, match=r"holds no checkpoint: fit first"):
        run(command)
    values = []
    for steps in (0, 1, 40):
        if steps:
            run(["fit", "--config", str(path), f"--trainer.max_steps={steps}"])
        capsys.readouterr()
        run([*command, "--ckpt_path=null"] if steps == 0 else command)
        text = capsys.readouterr().out
        values.append(float(re.findall(r"val/loss\D*([\d.]+)", text)[-1]))
    # It is the run's last checkpoint that is scored, not the untrained model.
    assert values[2] < values[1] != values[0]


def test_unknown_recipe_key_is_named_with_the_nearest(tmp_path: Path, views: Path) -> None:
    path = recipe(tmp_path, views, lora_rnk=8)
    with pytest.raises(EquifeatError, match=r"lora_rnk.*lora_rank") as caught:
        run(["fit", "--config", str(path)])
    assert "\n" not in str(caught.value)
    with pytest.raises(EquifeatError, match=r"max_stps.*max_steps"):
        run(["fit", "--config", str(recipe(tmp_path, views)), "--trainer.max_stps", "3"])
    assert not (tmp_path / "run").exists()


def test_missing_recipe_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EquifeatError, match=r"nowhere\.yaml") as caught:
        run(["fit", "--config", str(tmp_path / "nowhere.yaml")])
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    module = EquivariantFinetune(BACKBONE, weights="random")
    state = dict(module.state_dict())
    name = next(iter(state))
    value = state.pop(name)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        module.load_state_dict(state)
    with pytest.raises(CheckpointError, match="shape"):
        module.load_state_dict({**state, name: value[:1]})
