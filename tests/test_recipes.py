"""Every recipe is read by the real parser and makes a real training step at a tiny size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from equifeat.cli import run
from equifeat.model.extractor import build_extractor
from equifeat.model.weights import state_hash
from equifeat.train.module import EquivariantFinetune
from tests.helpers import ROOT
from tests.recipe_table import ENTRIES, FAMILIES, REFERENCES, docs_row, render, shape, step_flops
from tests.synthetic import write_views

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TINY = {"depth": 5, "embed_dim": 48, "num_heads": 2}
# Keys that the step at a tiny size sets itself.
OVERRIDDEN = {"model.weights", "model.resolution", "model.pos_radius"}
# What a family's recipe may have other than recipes/one_object.yaml, which is the default recipe
# of one object on a laptop: many objects, a GPU, augmentation (so no trunk cache), a fixed grid.
MANY_OBJECTS = {
    "run.dir",
    "run.save_every",
    "model.backbone",
    "model.weights",
    "model.resolution",
    "model.trunk_cache_mb",
    "data.views",
    "data.batch_size",
    "data.num_workers",
    "data.augment",
    "trainer.max_steps",
    "trainer.precision",
    "trainer.log_every_n_steps",
}
# And what may differ between two families.
OF_A_FAMILY = {"run.dir", "model.backbone", "model.weights"}
# The paper's settings (docs/recipes.md), written out once more.
PAPER: dict[str, Any] = {
    "model.head": "conv",
    "model.lora_rank": 4,
    "model.lora_blocks": 4,
    "model.loss": "smooth_ap",
    "model.both_directions": False,
    "model.tau": 0.01,
    "model.pos_radius": 0.005,
    "model.neg_radius": 0.1,
    "model.resolution": 80,
    "model.lr": 1e-5,
    "model.weight_decay": 1e-4,
    "model.warmup_steps": 0,
    "model.schedule": "constant",
    "data.batch_size": 1,
    "data.sampler": "reference",
    "data.num_keypoints": 3000,
    "data.min_angle_deg": 0.0,
    "data.max_angle_deg": 120.0,
    "data.augment": True,
    "data.background": "black",
    "trainer.max_steps": 10_000,
    "trainer.precision": "32-true",
    "trainer.gradient_clip_val": 1.0,
}
PAPER_BACKBONES = {
    "vit_small_patch14_dinov2.lvd142m": "reference",
    "vit_base_patch14_dinov2.lvd142m": "reference",
    "vit_base_patch14_reg4_dinov2.lvd142m": "timm",
    "vit_base_patch16_224.mae": "timm",
    "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k": "timm",
    "deit3_base_patch16_224.fb_in1k": "timm",
}


def flat(path: Path) -> dict[str, Any]:
    """A recipe's keys, such as model.lr."""
    found: dict[str, Any] = {}
    for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            found[key] = value
    return found


def recipe(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe_views")
    write_views(folder / "box", "box", views=4, size=96)
    return folder


@pytest.fixture
def tiny_timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let timm build few, narrow blocks of whatever architecture is asked for."""
    real = timm.create_model

    def create(name: str, **options: Any) -> Any:
        return real(name, **{**TINY, **options})

    monkeypatch.setattr(timm, "create_model", create)
    return create


def weights_of(path: Path, create: Any, folder: Path) -> str:
    """Random numbers; in a file like the publisher's where the recipe asks for a file."""
    config = flat(path)
    if config["model.weights"] in ("hub", "packaged"):
        return "random"
    state = create(config["model.backbone"], num_classes=0).state_dict()
    file = folder / Path(config["model.weights"]).name
    torch.save({"state_dict": state, "epoch": 800}, file)
    return str(file)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_makes_a_step(
    path: Path, views: Path, tmp_path: Path, tiny_timm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = EquivariantFinetune.training_step
    seen: list[tuple[EquivariantFinetune, torch.Tensor, str]] = []

    def watched(self: EquivariantFinetune, *args: Any, **options: Any) -> Any:
        before = state_hash(self.extractor.backbone.state_dict())
        loss = real(self, *args, **options)
        seen.append((self, loss.detach().clone(), before))
        return loss

    monkeypatch.setattr(EquivariantFinetune, "training_step", watched)
    run(
        [
            *("fit", "--config", str(path), "--run.dir", str(tmp_path / "run")),
            *("--model.weights", weights_of(path, tiny_timm, tmp_path)),
            *("--model.resolution", "5", "--model.pos_radius", "0.05"),
            *("--data.views", str(views), "--data.num_keypoints", "64", "--data.num_workers", "0"),
            *("--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"),
        ]
    )
    [(module, loss, before)] = seen
    config = flat(path)
    assert module.extractor.backbone.name == config["model.backbone"]
    assert module.extractor.backbone.position == config.get("model.position", "timm")
    for key in {key for key in config if key.startswith("model.")} - OVERRIDDEN:
        assert module.hparams[key.removeprefix("model.")] == config[key], key
    assert bool(torch.isfinite(loss))
    assert float(loss) > 0
    trained = module.extractor.trainable_parameters()
    conv = 0 if config["model.head"] == "none" else 2
    assert len(trained) == 4 * 2 * 2 + conv  # A and B of q and v in four blocks; the convolution
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        # B is zero at the start, so at the first step A has no gradient yet.
        assert bool(parameter.grad.any()) == (not name.endswith(".a")), name
    backbone = module.extractor.backbone
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert state_hash(backbone.state_dict()) == before


def test_recipes_cover_every_kind_of_backbone() -> None:
    """Of what the steps above are made."""
    shapes = [shape(entry.backbone) for entry in ENTRIES]
    assert {of.patch for of in shapes} == {14, 16}
    assert {of.qkv for of in shapes} == {"fused", "fused, no bias", "fused, no k bias", "split"}
    assert {of.position for of in shapes} == {"learned", "RoPE", "learned + RoPE"}
    # None, a class token, and with 4, 7 and 9 registers.
    assert {of.prefix for of in shapes} == {0, 1, 5, 8, 10}
    families = {re.split(r"_(?:v\d_)?(?:small|base|large|so400m|huge|giant)$", e.name)[0]
                for e in FAMILIES}  # fmt: skip
    assert families == {
        *("dinov2", "dinov2_reg", "dinov3", "clip_laion2b", "clip_openai", "siglip2", "mae"),
        *("deit3", "eva02", "dino", "ibot", "c_radio"),
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_says_command_hardware_and_numbers(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("seed_everything")[0]
    for word in ("Command:", "Hardware:", "Time:", "Numbers:"):
        assert word in header
    assert f"equifeat fit --config recipes/{path.name}" in header
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 100
    config = flat(path)
    assert config["ckpt_path"] == "last"
    assert config["run.dir"] == f"runs/{path.stem}"


def test_every_recipe_is_of_the_table_or_one_of_two() -> None:
    names = {path.stem for path in RECIPES}
    assert names == {entry.name for entry in ENTRIES} | {"one_object", "smoke"}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_file_is_what_the_table_writes(entry: Any) -> None:
    written = recipe(entry.name).read_text(encoding="utf-8")
    assert written == render(entry), "edit tests/recipe_table.py and run python -m it"


def test_families_have_the_default_recipe() -> None:
    default = flat(recipe("one_object"))
    first = flat(recipe(FAMILIES[0].name))
    for entry in FAMILIES:
        config = flat(recipe(entry.name))
        assert {k for k in config if config[k] != first.get(k)} <= OF_A_FAMILY
        assert config.keys() == first.keys()
        differing = {k for k in default | config if default.get(k) != config.get(k)}
        assert differing <= MANY_OBJECTS


@pytest.mark.parametrize("entry", REFERENCES, ids=lambda entry: entry.name)
def test_references_have_the_papers_settings(entry: Any) -> None:
    config = flat(recipe(entry.name))
    assert {key: config.get(key) for key in PAPER} == PAPER
    assert config["model.position"] == PAPER_BACKBONES[config["model.backbone"]]
    assert "model.lora_alpha" not in config  # alpha = rank: scale 1
    assert "trainer.accumulate_grad_batches" not in config
    header = recipe(entry.name).read_text(encoding="utf-8")
    assert header.count("→") == (0 if "small" in entry.name else 7 + 1)


def test_references_are_the_papers_five_and_the_small_one() -> None:
    assert {entry.backbone for entry in REFERENCES} == set(PAPER_BACKBONES)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_weights_exist_and_the_docs_have_the_row(entry: Any) -> None:
    published: Any = timm.models.get_pretrained_cfg(entry.backbone)
    assert published.has_weights
    assert docs_row(entry) in (ROOT / "docs/recipes.md").read_text(encoding="utf-8")


def test_docs_have_the_published_numbers() -> None:
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    for entry in REFERENCES:
        numbers = [row.split(": ")[1] for row in entry.published]
        assert " | ".join(numbers) in page


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2.lvd142m", "eva02_small_patch14_224.mim_in22k"]
)
def test_estimated_operations_are_what_torch_counts(name: str) -> None:
    extractor = build_extractor(name, "random", head="conv")
    image = torch.rand(2, 3, 10 * 14, 10 * 14)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(extractor.tail(extractor.trunk(image)).features.sum())
    assert counter.get_total_flops() == pytest.approx(
        step_flops(shape(name), 100, 1, conv=True), rel=0.05
    )
