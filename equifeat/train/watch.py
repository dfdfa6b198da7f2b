"""Held-out equivariance while a run goes on: curves, pictures, the best model, early stopping."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from equifeat.checkpoint import save_model
from equifeat.data.views import ObjectViews, open_views
from equifeat.errors import RecipeError
from equifeat.eval.equivariance import evaluate_equivariance
from equifeat.eval.equivariance_result import EquivarianceResult
from equifeat.eval.shared_trunk import SharedTokens, SharedTrunk
from equifeat.model.extractor import FeatureExtractor
from equifeat.train.callbacks import recipe_of
from equifeat.train.module import EquivariantFinetune
from equifeat.train.monitor import Monitor
from equifeat.train.sharded import ShardedFrozenStrategy
from equifeat.train.watch_options import WatchOptions
from equifeat.train.watch_picture import telling_pair, watch_picture
from equifeat.viz import save_png

METRIC = "PCDP@.10"
RAW, UNTRAINED, NOW = "raw", "untrained", "now"
_STRIDE = 2  # of the target pixels; also in docs/watching.md
_SEED = 0


class Watch(pl.Callback):
    """Measure the model on held-out views every few steps.

    Rank 0 measures and the others wait; where the backbone is sharded over the ranks, all measure.
    Neither the weights nor the draws of the run depend on it.

    Args:
        run: Folder of the run. Pictures and numbers go to ``watch``, the best model to ``best``.
        options: What is watched.
    """

    def __init__(self, run: Path, options: WatchOptions) -> None:
        self.options = options
        self.folder = run.absolute() / "watch"
        self.best_folder = run.absolute() / "best"
        # Of the run so far; the same on all ranks and in its checkpoints.
        self.best: float | None = None
        self.best_step = -1
        self.stale = 0
        self._objects: list[ObjectViews] = []
        self._watched: dict[str, Any] = {}
        self._untrained: tuple[nn.Module | None, nn.Module] | None = None
        self._controls: EquivarianceResult | None = None
        self._tokens = SharedTokens(options.cache_mb * 2**20)
        self._seen = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the views; remember the untrained weights before a checkpoint replaces them.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: Lightning's stage.

        Raises:
            ViewsError: The folder cannot be read.
        """
        if stage != "fit":
            return
        extractor = _extractor(pl_module)
        captures = getattr(getattr(trainer, "datamodule", None), "captures", None)
        every = open_views(self.options.views, "auto", captures)
        count = min(self.options.objects, len(every))
        self._objects = [every[k * len(every) // count] for k in range(count)]
        # As JSON gives it back.
        self._watched = json.loads(
            json.dumps(
                {
                    "views": str(self.options.views),
                    "objects": [obj.name for obj in self._objects],
                    "pairs": self.options.pairs,
                    "points": self.options.points,
                    "model": dict(pl_module.hparams),
                },
                default=str,
            )
        )
        self._untrained = copy.deepcopy((extractor.adapter, extractor.head))

    def state_dict(self) -> dict[str, Any]:
        """Return the best round and how many have passed since.

        Returns:
            Plain values.
        """
        return {
            "best": self.best,
            "best_step": self.best_step,
            "stale": self.stale,
            "watched": self._digest(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting, unless something else was watched before.

        Args:
            state_dict: What `state_dict` gave.
        """
        if state_dict["watched"] == self._digest():
            self.best, self.best_step = state_dict["best"], state_dict["best_step"]
            self.stale = state_dict["stale"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the raw ViT and the untrained model, once a run."""
        started = time.monotonic()
        self._seen = step = trainer.global_step
        if self._measures(trainer):
            with self._apart(pl_module):
                self._controls = self._cached_controls(trainer) or self._new_controls(pl_module)
            if step == 0:
                self._log(trainer, self._values(), 0)
        self._untrained = None
        self._stop_if_exhausted(trainer, step)
        _exclude(trainer, time.monotonic() - started)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure the model when a round is due; never between accumulated batches."""
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        if step % self.options.every:
            return
        started = time.monotonic()
        result, value = None, 0.0
        if self._measures(trainer):
            with self._apart(pl_module):
                result = self._measure(trainer, pl_module, step)
            value = _means(result, NOW)[METRIC]
        value = float(trainer.strategy.broadcast(value))
        if self.best is None or value > self.best:
            self.best, self.best_step, self.stale = value, step, 0
            if result is not None and trainer.is_global_zero:
                self._save_best(pl_module, result, step)
        else:
            self.stale += 1
        self._stop_if_exhausted(trainer, step)
        _exclude(trainer, time.monotonic() - started)

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self._watched, sort_keys=True).encode()).hexdigest()

    def _measures(self, trainer: pl.Trainer) -> bool:
        """Blocks that are sharded over the ranks run on all of them or on none."""
        return trainer.is_global_zero or _shards(trainer)

    @contextmanager
    def _apart(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Take the averaged weights; leave all of the training as it is."""
        modes = [(part, part.training) for part in pl_module.modules()]
        cuda = pl_module.device.type == "cuda"
        with isolate_rng(include_cuda=cuda), torch.no_grad(), _module(pl_module).averaged():
            pl_module.eval()
            yield
        for part, training in modes:
            part.training = training

    def _cached_controls(self, trainer: pl.Trainer) -> EquivarianceResult | None:
        path = self.folder / "controls.json"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        # One rank may see what another does not.
        text = trainer.strategy.broadcast(text) if _shards(trainer) else text
        if not text:
            return None
        try:
            found = EquivarianceResult.from_json(text)
        except RecipeError:
            return None
        return found if found.config.get("watched") == self._watched else None

    def _new_controls(self, pl_module: pl.LightningModule) -> EquivarianceResult:
        extractor = _extractor(pl_module)
        assert self._untrained is not None
        adapter, head = (copy.deepcopy(part) for part in self._untrained)
        untrained = FeatureExtractor(extractor.backbone, adapter, head)  # type: ignore[arg-type]
        untrained = untrained.to(pl_module.device).eval()
        result = self._evaluate({RAW: extractor.raw(), UNTRAINED: untrained}, extractor)
        if pl_module.trainer.is_global_zero:
            result.save(self.folder / "controls.json")
        return result

    def _evaluate(
        self, models: Mapping[str, FeatureExtractor], first: FeatureExtractor
    ) -> EquivarianceResult:
        result = evaluate_equivariance(
            {name: SharedTrunk(model, self._tokens, first) for name, model in models.items()},
            self._objects,
            pairs=self.options.pairs,
            points=self.options.points,
            target_stride=_STRIDE,
            resolution=self._watched["model"]["resolution"],
            seed=_SEED,
        )
        return replace(result, config={**result.config, "watched": self._watched})

    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int
    ) -> EquivarianceResult:
        extractor = _extractor(pl_module)
        result = self._evaluate({NOW: extractor}, extractor)
        name, *pair = telling_pair(result)
        models = {RAW: extractor.raw(), NOW: extractor}
        score = _means(result, NOW)[METRIC]
        picture = watch_picture(
            {key: SharedTrunk(model, self._tokens, extractor) for key, model in models.items()},
            next(obj for obj in self._objects if obj.name == name),
            (pair[0], pair[1]),
            title=f"After {step} steps: {METRIC} {score:.1f} %",
            device=str(pl_module.device),
            resolution=self._watched["model"]["resolution"],
        )
        if trainer.is_global_zero:
            result.save(self.folder / f"step_{step:06d}.json")
            save_png(picture, self.folder / f"step_{step:06d}.png")
            values = _named(result, NOW, "watch")
            # For progress lines and other callbacks.
            trainer.callback_metrics.update({key: torch.tensor(v) for key, v in values.items()})
            self._log(trainer, {**self._values(), **values}, step - 1)
            _log_picture(trainer, picture, step - 1)
        return result

    def _values(self) -> dict[str, float]:
        """The controls, as they are logged."""
        assert self._controls is not None
        raw = _named(self._controls, RAW, "watch/raw")
        return {**raw, **_named(self._controls, UNTRAINED, "watch/untrained")}

    def _log(self, trainer: pl.Trainer, values: Mapping[str, float], row: int) -> None:
        if not trainer.is_global_zero:
            return
        # Not by the module: Lightning would repeat a value until there is a newer one.
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=row)

    def _save_best(
        self, pl_module: pl.LightningModule, result: EquivarianceResult, step: int
    ) -> None:
        assert self._controls is not None
        facts, controls = result.card(), self._controls.card()
        facts["results"] = controls["results"] + facts["results"]
        facts["summary"] = (
            f"The best model of a run by held-out {METRIC}, after {step} optimiser steps."
        )
        held_out = {model: _means(self._controls, model) for model in (RAW, UNTRAINED)}
        recipe = {
            **recipe_of(pl_module, step),
            "held_out": {
                **{key: self._watched[key] for key in ("views", "objects", "pairs", "points")},
                **held_out,
                "this model": _means(result, NOW),
            },
        }
        with _module(pl_module).averaged():
            save_model(_extractor(pl_module), self.best_folder, recipe, facts)

    def _stop_if_exhausted(self, trainer: pl.Trainer, step: int) -> None:
        if not 0 < self.options.patience <= self.stale:
            return
        trainer.should_stop = True
        if trainer.is_global_zero:
            sys.stderr.write(
                f"stopped after step {step}: {self.stale} held-out rounds without a gain in "
                f"{METRIC}; the best, {self.best:.2f} % at step {self.best_step}, is in "
                f"{self.best_folder}; a higher run.patience goes on\n"
            )


def _module(module: pl.LightningModule) -> EquivariantFinetune:
    if not isinstance(module, EquivariantFinetune):
        raise TypeError(f"Watch watches EquivariantFinetune, not {type(module).__name__}")
    return module


def _extractor(module: pl.LightningModule) -> FeatureExtractor:
    return _module(module).extractor


def _shards(trainer: pl.Trainer) -> bool:
    return isinstance(trainer.strategy, ShardedFrozenStrategy)


def _exclude(trainer: pl.Trainer, seconds: float) -> None:
    """Tell the monitor of time that is no training."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Monitor):
            callback.exclude(seconds)


def _means(result: EquivarianceResult, model: str) -> dict[str, float]:
    """Means over objects in percent, as in the result's summary, without its bootstrap."""
    values = result.object_values(model).mean(0).tolist()
    return dict(zip(result.metrics, values, strict=True))


def _named(result: EquivarianceResult, model: str, prefix: str) -> dict[str, float]:
    return {f"{prefix}/{key.lower()}": value for key, value in _means(result, model).items()}


def _log_picture(trainer: pl.Trainer, picture: Image.Image, row: int) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            pixels = np.asarray(picture)
            logger.experiment.add_image("watch/picture", pixels, row, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image("watch/picture", [picture], step=row)
