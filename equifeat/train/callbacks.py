"""Callbacks of a run: export of the model, plain progress lines."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, TextIO

import pytorch_lightning as pl
import torch

from equifeat.checkpoint import save_model
from equifeat.data.datamodule import PairDataModule
from equifeat.train.module import EquivariantFinetune


def recipe_of(module: pl.LightningModule, step: int) -> dict[str, Any]:
    """Say how a model was trained, for its config.json.

    Args:
        module: The module, in a fit.
        step: Optimiser steps done.

    Returns:
        The module's options, "steps", and "data": what the pairs were drawn from.
    """
    data = getattr(module.trainer, "datamodule", None)
    record = {"data": data.record()} if isinstance(data, PairDataModule) else {}
    return {**dict(module.hparams), "steps": step, **record}


class ExportModel(pl.Callback):
    """Write the model folder when a fit reaches its end.

    Args:
        folder: Where to write; ``model`` in the run's folder when None.
        steps: Optimiser steps after which to write ``step_%06d`` beside it.
    """

    def __init__(self, folder: str | None = None, steps: tuple[int, ...] = ()) -> None:
        self.folder = folder
        self.steps = frozenset(steps)

    def _target(self, trainer: pl.Trainer) -> Path:
        return Path(self.folder or Path(trainer.default_root_dir) / "model")

    def _save(self, module: pl.LightningModule, folder: Path, step: int) -> None:
        if not isinstance(module, EquivariantFinetune):
            raise TypeError(f"ExportModel exports EquivariantFinetune, not {type(module).__name__}")
        with module.averaged():
            save_model(module.extractor, folder, recipe=recipe_of(module, step))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the untrained model when step 0 was asked for."""
        if 0 in self.steps and trainer.is_global_zero and trainer.global_step == 0:
            self._save(pl_module, self._target(trainer).parent / "step_000000", 0)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write the model at the steps that were asked for."""
        step = trainer.global_step
        if step in self.steps and trainer.is_global_zero:
            folder = self._target(trainer).parent / f"step_{step:06d}"
            if not folder.exists():
                self._save(pl_module, folder, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the final model."""
        if trainer.is_global_zero:
            self._save(pl_module, self._target(trainer), trainer.global_step)


class PlainProgress(pl.Callback):
    """One line every few seconds, for logs and pipes where a progress bar would be noise.

    Args:
        seconds: Least time between two lines.
        stream: Where to write; standard error when None.
    """

    def __init__(self, seconds: float = 10.0, stream: TextIO | None = None) -> None:
        self.seconds = seconds
        self.stream = stream
        self._last = 0.0
        self._started = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write a line when the last one is old enough or the run ends."""
        now, step = time.monotonic(), trainer.global_step
        quiet = now - self._last < self.seconds and step != trainer.max_steps
        if quiet or not trainer.is_global_zero:
            return
        self._last = now
        rate = (step - self._first_step) / max(now - self._started, 1e-9)
        values = " ".join(
            f"{name}={float(value):.4g}"
            for name, value in trainer.callback_metrics.items()
            if isinstance(value, torch.Tensor) and value.numel() == 1
        )
        end = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        stream = self.stream or sys.stderr
        stream.write(f"step {step}{end} {rate:.2f} steps/s {values}\n")
        stream.flush()
