"""LightningCLI: recipe to data, module, trainer, loggers, resume."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger

from equifeat.data.datamodule import PairDataModule
from equifeat.errors import MissingExtraError, RecipeError
from equifeat.options import RecipeParser
from equifeat.train.callbacks import ExportModel, PlainProgress
from equifeat.train.module import EquivariantFinetune

_TALKATIVE = ("", ".utilities.rank_zero")


def run_callbacks(
    run_dir: str | Path, save_every: int, steps: tuple[int, ...] = (), logged: bool = True
) -> list[Any]:
    """Return the callbacks of every run: checkpoints, export, learning rate, progress.

    Args:
        run_dir: Folder of the run.
        save_every: Optimiser steps between two checkpoints.
        steps: Optimiser steps after which the model folder is written as ``step_%06d``.
        logged: Whether the run has a logger.

    Returns:
        Lightning callbacks.
    """
    callbacks: list[Any] = [
        # The newest checkpoint only: `ckpt_path: last` resumes from it.
        ModelCheckpoint(
            dirpath=Path(run_dir) / "checkpoints",
            filename="{step}",
            every_n_train_steps=save_every,
            save_top_k=1,
            save_last=True,
        ),
        ExportModel(str(Path(run_dir) / "model"), steps),
    ]
    if logged:
        callbacks.append(LearningRateMonitor("step"))
    if not sys.stderr.isatty():
        callbacks.append(PlainProgress())
    return callbacks


def run_loggers(run_dir: str | Path, wandb_project: str | None = None) -> list[Logger]:
    """Return the CSV and TensorBoard loggers, and wandb's when a project is named.

    Every start of a run gets its own numbered folder, so a resumed run overwrites nothing.

    Args:
        run_dir: Folder of the run.
        wandb_project: Project of Weights & Biases; set WANDB_MODE=offline to work without network.

    Returns:
        Lightning loggers.

    Raises:
        MissingExtraError: wandb is not installed.
    """
    # Flushed at every step, so that a killed run keeps its curve.
    csv = CSVLogger(run_dir, name="logs", flush_logs_every_n_steps=1)
    # Both write into the same numbered folder.
    loggers: list[Logger] = [csv, TensorBoardLogger(run_dir, name="logs", version=csv.version)]
    if wandb_project:
        try:
            from pytorch_lightning.loggers import WandbLogger

            loggers.append(WandbLogger(project=wandb_project, save_dir=run_dir))
        except ModuleNotFoundError as error:
            raise MissingExtraError("wandb", "wandb", "logging to Weights & Biases") from error
    return loggers


class RecipeCLI(LightningCLI):
    """Adds the run's folder, its checkpoints and its loggers to Lightning's own options."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add run.*: the folder, how often to save, the wandb project, steps to export.

        Args:
            parser: Parser of one sub-command.
        """
        parser.add_argument("--run.dir", type=str, default="runs/default", help="folder of the run")
        parser.add_argument(
            "--run.save_every", type=int, default=50, help="steps between two checkpoints"
        )
        parser.add_argument(
            "--run.export_steps", type=list[int], default=[], help="steps to export as step_%%06d"
        )
        parser.add_argument(
            "--run.wandb_project", type=str | None, default=None, help="also log to this project"
        )
        parser.link_arguments("run.dir", "trainer.default_root_dir")

    def before_instantiate_classes(self) -> None:
        """Find the run's last checkpoint for validate, where Lightning would know of none.

        Raises:
            RecipeError: The run has no checkpoint yet.
        """
        if self.subcommand == "validate":
            config = self.config[self.subcommand]
            if config["ckpt_path"] == "last":
                last = Path(config["run"]["dir"]) / "checkpoints" / "last.ckpt"
                if not last.is_file():
                    raise RecipeError(
                        f"{last} does not exist: fit first, or --ckpt_path null validates the "
                        "untrained model"
                    )
                config["ckpt_path"] = str(last)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with the run's loggers and callbacks.

        Args:
            **kwargs: Lightning's overrides.

        Returns:
            The trainer.
        """
        run = self._get(self.config, "run")
        Path(run["dir"]).mkdir(parents=True, exist_ok=True)
        trainer_config = self._get(self.config, "trainer")
        if trainer_config.get("logger") in (None, True):
            kwargs["logger"] = run_loggers(run["dir"], run["wandb_project"])
        if not sys.stderr.isatty():
            kwargs["enable_progress_bar"] = False
        if self.subcommand == "fit" and not trainer_config.get("fast_dev_run"):
            logged = kwargs.get("logger", trainer_config.get("logger")) is not False
            own = run_callbacks(run["dir"], run["save_every"], tuple(run["export_steps"]), logged)
            kwargs["callbacks"] = [*(self._get(self.config_init, "trainer.callbacks") or []), *own]
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        return trainer

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's fit and validate only.

        Returns:
            Sub-commands and the arguments they skip.
        """
        kept = LightningCLI.subcommands()
        return {name: kept[name] for name in ("fit", "validate")}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning warns of and a user of this project cannot or need not change."""
    with warnings.catch_warnings():
        # Few workers are right for small view sets, and short runs log less often than 50 steps.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*number of training batches.*")
        # The frozen ViT stays in eval mode on purpose.
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        # validate needs the weights of a checkpoint, not the callbacks that wrote it.
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")
        # A run folder is used again on purpose: that is how a run resumes.
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*there is no last checkpoint available.*")
        # The arguments do come from the command line, less the program's name.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
        # Lightning 2.6 calls what newer jsonargparse and torch have renamed.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        loggers = [logging.getLogger(f"pytorch_lightning{name}") for name in _TALKATIVE]
        for logger in loggers:
            logger.addFilter(_is_no_advertisement)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def main(argv: Sequence[str]) -> None:
    """Run ``equifeat fit`` or ``equifeat validate``.

    Args:
        argv: Arguments, the sub-command first.

    Raises:
        RecipeError: The recipe has an unknown key or a wrong value.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    with quiet():
        try:
            RecipeCLI(
                EquivariantFinetune,
                PairDataModule,
                args=list(argv),
                seed_everything_default=0,
                save_config_callback=SaveConfigCallback,
                save_config_kwargs={"overwrite": True},
                parser_class=RecipeParser,
                trainer_defaults={"gradient_clip_val": 1.0, "log_every_n_steps": 1},
            )
        except FileNotFoundError as error:
            raise RecipeError(f"{error.filename or error}: no such file") from error
