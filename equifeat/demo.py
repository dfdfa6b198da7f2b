"""The one-object demo: render, finetune, measure on objects never seen in training, report."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch

from data_prep.procedural import object_name, write_procedural
from data_prep.render import ObjectReport, RenderOptions, find_meshes, render_many
from data_prep.viewpoints import ViewpointOptions
from equifeat.checkpoint import load_model, save_model
from equifeat.data.datamodule import PairDataModule
from equifeat.data.views import ObjectViews, open_views
from equifeat.demo_report import RAW, UNTRAINED, demo_report, summary
from equifeat.errors import MeshError, RecipeError
from equifeat.eval.equivariance import evaluate_equivariance
from equifeat.eval.shared_trunk import SharedTokens, SharedTrunk
from equifeat.files import atomic_file
from equifeat.model.weights import PACKAGED_BACKBONE
from equifeat.progress import progress
from equifeat.train.checkpoints import latest_checkpoint
from equifeat.train.cli import quiet
from equifeat.train.loggers import losses, run_loggers
from equifeat.train.module import EquivariantFinetune
from equifeat.train.run_folder import run_callbacks, run_lock
from equifeat.train.signals import signals_restored

# Seeds of the procedural objects: one to train on, the others never seen in training.
_TRAIN_SEED, _EVAL_SEEDS = 0, range(100, 106)
_TRAIN_VIEWS, _EVAL_VIEWS = 42, 5
_EVAL_ELEVATION = (10.0, 40.0)
_KEYPOINTS = 500


def parse_steps(text: str) -> list[int]:
    """Read the option --steps.

    Args:
        text: Optimiser steps, as in "1,100".

    Returns:
        Ascending distinct numbers.

    Raises:
        RecipeError: Not a list of positive numbers.
    """
    words = [word.strip() for word in text.split(",")]
    if not words or not all(word.isdigit() and int(word) > 0 for word in words):
        raise RecipeError(f"--steps {text!r} must be numbers of at least 1, as in 1,100")
    return sorted({int(word) for word in words})


def demo(
    mesh: Path | None = None,
    eval_meshes: Path | None = None,
    steps: str = "1,100",
    resolution: int = 448,
    out: Path = Path("demo_out"),
    backbone: str = PACKAGED_BACKBONE,
    weights: str = "packaged",
    head: Literal["none", "conv", "residual"] = "none",
    lr: float = 1e-3,
    renderer: Literal["auto", "pyrender", "embree"] = "auto",
    seed: int = 0,
) -> str:
    """Finetune on one object and measure the result on objects never seen in training.

    Args:
        mesh: The training object; a procedural one when not given.
        eval_meshes: Held-out meshes, a file or a folder; procedural ones when not given.
        steps: Optimiser steps to measure after, the last one ends the training.
        resolution: Side of the rendered images and of the model's input in pixels.
        out: Folder of the results; an interrupted demo goes on there with the same command.
        backbone: Name of a timm ViT.
        weights: packaged, hub, random or a file.
        head: none, conv or residual.
        lr: Learning rate.
        renderer: auto, pyrender or embree.
        seed: Seed of the training.

    Returns:
        The table and where the report is.

    Raises:
        RecipeError: Wrong options, or the folder holds a demo with other options.
        MeshError: A mesh cannot be used.
    """
    start = time.monotonic()
    options = {
        "mesh": str(mesh) if mesh else f"procedural object {_TRAIN_SEED}",
        "eval_meshes": str(eval_meshes) if eval_meshes else "procedural objects 100-105",
        "resolution": resolution,
        "backbone": backbone,
        "weights": weights,
        "head": head,
        "lr": lr,
        "renderer": renderer,
        "seed": seed,
    }
    wanted = parse_steps(steps)
    train_files = find_meshes([mesh]) if mesh else []
    if len(train_files) > 1:
        raise RecipeError(
            f"--mesh {mesh} holds {len(train_files)} meshes, the demo trains on one: name it; "
            "`equifeat fit` trains on many"
        )
    eval_files = find_meshes([eval_meshes]) if eval_meshes else []
    _claim(out, options)
    train, held_out, renderer_used = _render(train_files, eval_files, out, resolution, renderer)
    _train(out, Path(train.where), wanted, options)
    models = _models(out, wanted)
    result = evaluate_equivariance(
        models,
        held_out,
        points=300,
        target_stride=2,
        max_angle_deg=120.0,
        seed=seed,
        progress=progress,
    )
    result.save(out / "equivariance.json")
    trained = models[_after(wanted[-1])].extractor
    save_model(trained, out / "model", {**options, "steps": wanted[-1]}, result.card())
    details = {**options, "steps": steps, "renderer": renderer_used}
    seconds = time.monotonic() - start
    demo_report(out, result, models, wanted, losses(out / "run"), train, held_out, details, seconds)
    return (
        f"{result.table()}\n{result.caption()}\n{' '.join(summary(result, wanted))}\n"
        f"report: {out / 'report.html'}\nmodel folder: {out / 'model'}"
    )


def _claim(out: Path, options: Mapping[str, Any]) -> None:
    """Say which demo this folder holds; a folder of another demo is refused."""
    record = out / "demo.json"
    if record.is_file():
        found = json.loads(record.read_text())
        for key, value in options.items():
            if found.get(key) != value:
                raise RecipeError(
                    f"{out} holds a demo with {key}={found.get(key)!r}, not {value!r}: "
                    "choose another --out or delete that folder"
                )
    elif out.exists() and any(out.iterdir()):
        raise RecipeError(f"{out} is not empty and holds no demo: choose another --out")
    with atomic_file(record) as path:
        path.write_text(json.dumps(options, indent=2) + "\n")


def _render(
    train_files: list[Path], eval_files: list[Path], out: Path, resolution: int, renderer: Any
) -> tuple[ObjectViews, list[ObjectViews], str]:
    """Render the training object and the held-out ones; finished objects are kept."""
    train_files = train_files or _procedural(out / "meshes", [_TRAIN_SEED])
    eval_files = eval_files or _procedural(out / "meshes", _EVAL_SEEDS)
    folders, used = [], ""
    for name, files, views in (
        ("train", train_files, ViewpointOptions(count=_TRAIN_VIEWS)),
        ("held_out", eval_files, ViewpointOptions(count=_EVAL_VIEWS, elevation=_EVAL_ELEVATION)),
    ):
        folder = out / "views" / name
        summary = render_many(
            files, folder, RenderOptions(size=resolution, viewpoints=views), renderer, _say
        )
        if summary.failures:
            raise MeshError("; ".join(error for _, error in summary.failures))
        folders.append(folder)
        used = f"{summary.renderer} ({summary.reason})"
    return open_views(folders[0])[0], open_views(folders[1]), used


def _procedural(folder: Path, seeds: Iterable[int]) -> list[Path]:
    """Make the objects that an earlier start has not made."""
    files = [folder / f"{object_name(seed)}.glb" for seed in seeds]
    missing = [seed for seed, file in zip(seeds, files, strict=True) if not file.is_file()]
    write_procedural(folder, missing)
    return files


def _say(report: ObjectReport) -> None:
    sys.stderr.write(f"views of {report.source}: {report.status}\n")


def _train(out: Path, views: Path, wanted: Sequence[int], options: Mapping[str, Any]) -> None:
    """Train, exporting step 0 and every wanted step; an interrupted run goes on."""
    run = out / "run"
    with quiet(), signals_restored(), run_lock(run):
        missing = [step for step in (0, *wanted) if not (run / f"step_{step:06d}").is_dir()]
        if missing:
            _fit(run, views, wanted, min(missing), options)


def _fit(
    run: Path, views: Path, wanted: Sequence[int], first_missing: int, options: Mapping[str, Any]
) -> None:
    """Train up to the last wanted step."""
    last = latest_checkpoint(run / "checkpoints")
    reached = int(last[1]["global_step"]) if last else 0
    if first_missing < reached:  # a step that the run has passed without exporting it
        for path in (run / "checkpoints", run / "logs"):
            shutil.rmtree(path, ignore_errors=True)
        last, reached = None, 0
    pl.seed_everything(options["seed"], verbose=False)
    module = EquivariantFinetune(
        options["backbone"],
        weights=options["weights"],
        head=options["head"],
        lr=options["lr"],
        resolution=None,
        trunk_cache_mb=1024,
        seed=options["seed"],
    )
    data = PairDataModule(views, seed=options["seed"], num_keypoints=_KEYPOINTS, augment=False)
    trainer = pl.Trainer(
        max_steps=max(wanted),
        accelerator="auto",
        devices=1,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        default_root_dir=run,
        logger=run_loggers(run, start=reached),
        callbacks=run_callbacks(run, save_every=25, steps=(0, *wanted)),
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
    )
    resume = str(last[0]) if last else None
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)


def _models(out: Path, wanted: Sequence[int]) -> dict[str, SharedTrunk]:
    """Open raw, untrained and trained models on one backbone."""
    first = load_model(out / "run" / "step_000000", _device())
    models = {RAW: first.raw(), UNTRAINED: first}
    for step in wanted:
        folder = out / "run" / f"step_{step:06d}"
        models[_after(step)] = load_model(folder, _device(), backbone=first.backbone)
    shared = SharedTokens()
    return {name: SharedTrunk(model.eval(), shared, first) for name, model in models.items()}


def _after(step: int) -> str:
    return f"after {step} step" + ("s" if step > 1 else "")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
