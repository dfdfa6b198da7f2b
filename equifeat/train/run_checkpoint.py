"""The callback that saves a run: behind its log, and only between optimiser steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from equifeat.train.checkpoints import AtomicCheckpointIO, checkpoints, sync_folder
from equifeat.train.loggers import RunCsv, RunWandb


class RunCheckpoint(Checkpoint):
    """Save every few steps, at the last step and when asked; keep the newest.

    Lightning logs a step after it has saved it. So a checkpoint is written under a hidden name, and
    gets its own name when the next step begins: by then the loggers have all values of its step,
    those of a validation included. A run killed in between resumes from the checkpoint before.

    Args:
        folder: Where to.
        every: Optimiser steps between two checkpoints.
        keep: How many stay.
        recipe: What made the run, for the checkpoint.
    """

    def __init__(
        self, folder: Path, every: int, keep: int = 2, recipe: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.every = every
        self.keep = keep
        self.recipe = recipe
        self.wanted = False
        self.saved = -1
        self._seen = -1
        self._pending: Path | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make all checkpoints of this trainer atomic; remove what a killed run left half-written.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: Lightning's stage.
        """
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == "fit" and trainer.is_global_zero and self.folder.is_dir():
            for pattern in (".tmp_*.ckpt", ".tmp_*.part", ".step=*.part"):
                for path in self.folder.glob(pattern):
                    path.unlink()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the recipe into the checkpoint: a resumed run must have the same one."""
        if self.recipe is not None:
            checkpoint["recipe"] = dict(self.recipe)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where the run goes on."""
        self._seen = trainer.global_step
        if trainer.fit_loop.restarted_mid_epoch:
            # Lightning 2.6 forgets to begin the next epoch when a checkpoint lies on the end of
            # one, and miscounts at the next resume. In the middle of an epoch this changes nothing.
            epochs: Any = trainer.fit_loop.epoch_progress
            for count in (epochs.total, epochs.current):
                count.ready = count.started = count.processed + 1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Publish the checkpoint of the step before."""
        self.publish(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write a checkpoint when one is due; never between accumulated batches."""
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        last_batch = batch_idx + 1 >= trainer.num_training_batches
        last = step == trainer.max_steps or trainer.should_stop
        if last_batch and trainer.max_epochs not in (None, -1):
            last = last or trainer.current_epoch + 1 >= trainer.max_epochs
        if last or self.wanted or step % self.every == 0:
            self._pending = self.folder / f".step={step}.ckpt.part"
            trainer.save_checkpoint(self._pending, weights_only=False)
            self.saved = step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the checkpoint of the last step."""
        self.publish(trainer)

    def publish(self, trainer: pl.Trainer) -> None:
        """Give the written checkpoint its name, and remove the oldest.

        Args:
            trainer: The trainer.
        """
        part, self._pending = self._pending, None
        if part is None or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, RunCsv | RunWandb):
                logger.commit(self.saved)
        part.replace(self.folder / f"step={self.saved}.ckpt")
        sync_folder(self.folder)
        for old in checkpoints(self.folder)[: -self.keep]:
            old.unlink()
