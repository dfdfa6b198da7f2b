"""LightningCLI: recipe to data, module, trainer, loggers, resume."""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger

from equifeat.data.datamodule import PairDataModule
from equifeat.errors import RecipeError
from equifeat.options import OneSentence
from equifeat.recipe_files import with_packaged_recipes
from equifeat.train.checkpoints import latest_checkpoint, read_checkpoint
from equifeat.train.dry_run import Stopwatch, dry_run_config, report
from equifeat.train.loggers import run_loggers
from equifeat.train.module import EquivariantFinetune
from equifeat.train.precision import tf32
from equifeat.train.run_folder import (
    Start,
    check_recipe,
    clear_later,
    find_start,
    run_callbacks,
    run_lock,
)
from equifeat.train.sharded import check_strategy
from equifeat.train.signals import signals_restored
from equifeat.train.watch_options import add_watch_arguments, watch_options

_TALKATIVE = ("", ".utilities.rank_zero")


class RecipeParser(OneSentence, LightningArgumentParser):
    """The parser of fit and validate: a wrong key of a recipe is one sentence."""


class RecipeCLI(LightningCLI):
    """Adds the run's folder, its checkpoints and its loggers to Lightning's own options.

    Args:
        stack: Holds the lock of the run's folder until the command ends.
        args: Arguments behind ``equifeat``; a recipe of the package may be given by name.
        **kwargs: Lightning's arguments.
    """

    def __init__(self, stack: ExitStack, args: Sequence[str], **kwargs: Any) -> None:
        self.stack = stack
        self.start = Start()
        self.stopwatch = Stopwatch()
        self.planned: Any = None  # the recipe, when it is a dry run
        super().__init__(args=with_packaged_recipes(args), **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add run.*: what belongs to a run and to neither model, data nor trainer.

        Args:
            parser: Parser of one sub-command.
        """
        add = parser.add_argument
        add("--run.dir", type=str, default="runs/default", help="folder of the run")
        add("--run.save_every", type=int, default=50, help="steps between two checkpoints")
        add("--run.export_steps", type=list[int], default=[], help="steps to export as step_%%06d")
        add("--run.wandb_project", type=str | None, default=None, help="also log to this project")
        add("--run.max_skipped", type=int, default=10, help="most steps that may be NaN")
        add("--run.tf32", type=bool, default=False, help="TF32 in float32 products on a GPU")
        add("--run.requeue", type=bool, default=True, help="SIGUSR1 queues a SLURM job again")
        add("--run.allow_changes", type=list[str], default=[], help="keys a resume may change")
        add_watch_arguments(parser)
        add("--dry_run", "--dry-run", action="store_true", help="fit: measure, write nothing")
        parser.link_arguments("run.dir", "trainer.default_root_dir")

    def _parse_ckpt_path(self) -> None:
        """Take the model's options for validate from a checkpoint; fit compares them instead."""
        if self.config.get("subcommand") != "validate":
            return
        path = self.config["validate"].get("ckpt_path")
        if path and Path(path).is_file():
            read_checkpoint(path)
        super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        """Lock the run's folder and find out where the run goes on.

        Raises:
            RecipeError: The run cannot go on with this recipe, or has no checkpoint to validate.
        """
        config = self.config[self.subcommand]
        if config["dry_run"]:
            if self.subcommand != "fit":
                raise RecipeError("--dry-run is for fit: validate writes no run anyway")
            self.planned = copy.deepcopy(config)
            dry_run_config(config)
        self.stack.enter_context(tf32(config["run"]["tf32"]))
        for section in ("model", "data"):
            if config[section]["seed"] is None:
                config[section]["seed"] = config["seed_everything"] or 0
        run = Path(config["run"]["dir"])
        if self.subcommand == "validate":
            if config["ckpt_path"] == "last":
                found = latest_checkpoint(run / "checkpoints")
                if found is None:
                    raise RecipeError(
                        f"{run / 'checkpoints'} holds no checkpoint: fit first, or --ckpt_path "
                        "null validates the untrained model"
                    )
                config["ckpt_path"] = str(found[0])
        elif not config["trainer"]["fast_dev_run"]:
            self.stack.enter_context(run_lock(run))
            self.start = find_start(run, config["ckpt_path"])
            parser = self._parser(self.subcommand)
            defaults = _plain(parser, parser.get_defaults())
            check_recipe(
                self.start.recipe, self._recipe(), defaults, config["run"]["allow_changes"]
            )
            clear_later(run, self.start)
            config["ckpt_path"] = self.start.checkpoint and str(self.start.checkpoint)

    def _recipe(self) -> dict[str, Any]:
        """Every key of the run with its value."""
        return _plain(self._parser(self.subcommand), self.config[self.subcommand])

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with the run's loggers and callbacks.

        Args:
            **kwargs: Lightning's overrides.

        Returns:
            The trainer.
        """
        run = self._get(self.config, "run")
        trainer_config = self._get(self.config, "trainer")
        check_strategy(trainer_config.get("strategy"))
        fits = self.subcommand == "fit" and not trainer_config.get("fast_dev_run")
        if trainer_config.get("logger") in (None, True):
            # The log of the run is the fit's own.
            kwargs["logger"] = (
                run_loggers(run["dir"], run["wandb_project"], self.start.step)
                if fits
                else CSVLogger(run["dir"], name="validate")
            )
        if not sys.stderr.isatty():
            kwargs["enable_progress_bar"] = False
        if fits:
            own = run_callbacks(
                run["dir"],
                run["save_every"],
                tuple(run["export_steps"]),
                logged=kwargs.get("logger", trainer_config.get("logger")) is not False,
                recipe=self._recipe(),
                requeue=run["requeue"],
                watch=watch_options(run.as_dict()),
                max_skipped=run["max_skipped"],
            )
            kwargs["callbacks"] = [*(self._get(self.config_init, "trainer.callbacks") or []), *own]
        if self.planned:
            kwargs["callbacks"] = [*(trainer_config.get("callbacks") or []), self.stopwatch]
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        return trainer

    def after_fit(self) -> None:
        """Print what a dry run found."""
        if self.planned and self.trainer.is_global_zero:
            sys.stdout.write(report(self.trainer, self.stopwatch, self.planned) + "\n")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's fit and validate only.

        Returns:
            Sub-commands and the arguments they skip.
        """
        kept = LightningCLI.subcommands()
        return {name: kept[name] for name in ("fit", "validate")}


def _plain(parser: LightningArgumentParser, config: Any) -> dict[str, Any]:
    """Turn a configuration into dictionaries, lists and plain values."""
    text = parser.dump(config, format="json", skip_none=False, skip_validation=True)
    plain: dict[str, Any] = json.loads(text)
    return plain


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning warns of and a user of this project cannot or need not change."""
    with warnings.catch_warnings():
        # On a login node of SLURM, fit is started without srun on purpose.
        warnings.filterwarnings("ignore", message=".*srun. command is available.*")
        # Few workers are right for small view sets, and short runs log less often than 50 steps.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*number of training batches.*")
        # The frozen ViT stays in eval mode on purpose.
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        # validate needs the weights of a checkpoint, not the callbacks that wrote it.
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")
        # The summary counts parameters right in any precision; its guess of megabytes is not used.
        warnings.filterwarnings("ignore", message=".*not supported by the model summary.*")
        # A run folder is used again on purpose: that is how a run resumes.
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*there is no last checkpoint available.*")
        # The arguments do come from the command line, less the program's name.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
        # The GradScaler of 16-mixed may skip the first step while it looks for its scale.
        warnings.filterwarnings("ignore", message=".*`lr_scheduler.step\\(\\)` before `optimizer.*")
        # torch.compile says so of recomputed blocks, whose inputs it looks at.
        warnings.filterwarnings(
            "ignore", message="The .grad attribute of a Tensor that is not a leaf"
        )
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
    text = record.getMessage()
    return "Tip:" not in text and "fast_dev_run" not in text  # of which a dry run is made


def main(argv: Sequence[str]) -> None:
    """Run ``equifeat fit`` or ``equifeat validate``.

    Args:
        argv: Arguments, the sub-command first.

    Raises:
        RecipeError: The recipe has an unknown key or a wrong value.
        SystemExit: A signal stopped the run (docs/resume.md).
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    with quiet(), signals_restored(), ExitStack() as stack:
        try:
            RecipeCLI(
                stack,
                model_class=EquivariantFinetune,
                datamodule_class=PairDataModule,
                args=list(argv),
                seed_everything_default=0,
                save_config_callback=SaveConfigCallback,
                save_config_kwargs={"overwrite": True},
                parser_class=RecipeParser,
                trainer_defaults={"gradient_clip_val": 1.0, "log_every_n_steps": 1},
            )
        except FileNotFoundError as error:
            raise RecipeError(f"{error.filename or error}: no such file") from error
