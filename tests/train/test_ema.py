"""The average of the weights: its formula, where it is used, and an exact resume."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from equifeat.cli import run
from equifeat.errors import CheckpointError, RecipeError
from equifeat.train.checkpoints import checkpoints, read_checkpoint
from equifeat.train.ema import AveragedWeights
from equifeat.train.loggers import read_metrics
from equifeat.train.module import EquivariantFinetune
from tests.train import runs
from tests.train.test_fit import recipe

OPTIONS = {"ema_decay": 0.5, "preserve": "relations", "trunk_cache_mb": 8}


def fit(folder: Path, views: Path, steps: int, *more: str, **model: object) -> Path:
    folder.mkdir(exist_ok=True)
    path = recipe(folder, views, **model)
    run(["fit", "--config", str(path), f"--trainer.max_steps={steps}", *more])
    return folder / "run"


def last(folder: Path) -> dict[str, Any]:
    return read_checkpoint(checkpoints(folder / "checkpoints")[-1])


def test_the_average_is_what_it_says() -> None:
    weight = nn.Parameter(torch.zeros(3))
    average, wanted = AveragedWeights(0.3), torch.zeros(3)
    with average.lent_to({"w": weight}):  # before the first step: the weights themselves
        assert torch.equal(weight, torch.zeros(3))
    for step in range(12):
        with torch.no_grad():
            weight.add_(torch.tensor([1.0, -2.0, 0.5]) * step + 1)
        average.update({"w": weight})
        decay = min(0.3, (1 + step) / (10 + step)) if step else 0.0
        wanted = decay * wanted + (1 - decay) * weight.detach()
        trained = weight.detach().clone()
        with average.lent_to({"w": weight}):
            assert torch.allclose(weight, wanted)
            assert not step or not torch.allclose(weight, trained)
        assert torch.equal(weight, trained)
    with pytest.raises(ValueError, match="inside"), average.lent_to({"w": weight}):
        raise ValueError("inside")
    assert torch.equal(weight, trained)


def test_an_interrupted_run_equals_the_unbroken_one(
    tmp_path: Path, views: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--data.val_views", str(views), "--data.val_draws=2", "--trainer.val_check_interval=2"]
    whole = fit(tmp_path / "whole", views, 7, *more, **OPTIONS)
    for steps in (3, 7):  # the first start ends between two validations and within an epoch
        broken = fit(tmp_path / "broken", views, steps, *more, **OPTIONS)
    runs.assert_same_run(broken, whole, checked=True)
    content = last(whole)
    state, averaged = content["state_dict"], content["averaged_weights"]
    assert averaged["steps"] == 7
    weights = averaged["weights"]
    assert weights.keys() == state.keys()
    assert all(not torch.equal(weights[name], state[name]) for name in state)
    # The run itself is that without an average; only what is measured and shipped is another.
    plain = fit(tmp_path / "plain", views, 7, *more, **{**OPTIONS, "ema_decay": 0.0})
    assert runs.same(last(plain)["state_dict"], state)
    assert "averaged_weights" not in last(plain)
    head = load_file(whole / "model" / "head.safetensors")
    assert all(torch.equal(value, weights[f"head.{name}"]) for name, value in head.items())
    logged, other = (
        [float(row["val/loss"]) for row in read_metrics(folder) if row.get("val/loss")]
        for folder in (whole, plain)
    )
    assert len(logged) == len(other) > 1
    assert all(a != b for a, b in zip(logged, other, strict=True))
    # A checkpoint is validated by its average, too.
    capsys.readouterr()
    run(["validate", "--config", str(tmp_path / "whole" / "recipe.yaml"), *more[:3]])
    found = re.findall(r"val/loss\D*([\d.]+)", capsys.readouterr().out)
    assert float(found[-1]) == pytest.approx(logged[-1], rel=1e-6)


def test_a_run_from_before_these_options_goes_on(tmp_path: Path, views: Path) -> None:
    folder = fit(tmp_path, views, 2)
    path = checkpoints(folder / "checkpoints")[-1]
    content = torch.load(path, weights_only=True)
    new = (
        *("preserve", "preserve_weight", "ema_decay", "both_directions", "label_radius"),
        *("hard_radius", "curriculum_draws", "curriculum_start_deg"),
    )
    sections = (content["recipe"]["model"], content["recipe"]["data"], content["hyper_parameters"])
    removed = [section.pop(key) for section in sections for key in new if key in section]
    assert len(removed) == 13
    torch.save(content, path)
    run(["validate", "--config", str(tmp_path / "recipe.yaml"), f"--data.val_views={views}"])
    with pytest.raises(RecipeError, match=r"model\.ema_decay was 0\.0 and is 0\.5"):
        fit(tmp_path, views, 4, "--model.ema_decay=0.5")
    # Asked for, the average begins where the run goes on; all that is exported then has it.
    watch = ["--run.watch_every=2", f"--run.watch_views={views}", "--run.watch_pairs=1"]
    allowed = ["--model.ema_decay=0.5", "--run.allow_changes=[model.ema_decay]"]
    fit(tmp_path, views, 4, *allowed, *watch, "--run.export_steps=[4]")
    content = last(folder)
    assert content["global_step"] == 4
    assert content["averaged_weights"]["steps"] == 2
    averaged = content["averaged_weights"]["weights"]["head.conv.weight"]
    assert not torch.equal(averaged, content["state_dict"]["head.conv.weight"])
    for name in ("best", "step_000004", "model"):
        head = load_file(folder / name / "head.safetensors")
        assert torch.equal(head["conv.weight"], averaged)


def test_another_models_average_is_refused() -> None:
    module = EquivariantFinetune(runs.BACKBONE, weights="random", ema_decay=0.9)
    module.average.update(module.extractor.trainable_parameters())
    state = module.average.state_dict()
    weights = dict(state["weights"])
    name = weights.popitem()[0]
    checkpoint = {"averaged_weights": {**state, "weights": weights}}
    with pytest.raises(CheckpointError, match=re.escape(name)):
        module.on_load_checkpoint(checkpoint)
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(RecipeError, match=f"ema_decay is {decay}"):
            EquivariantFinetune(runs.BACKBONE, weights="random", ema_decay=decay)
