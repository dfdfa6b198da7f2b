"""The folder of a run: one run at a time in it, made by one recipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.utilities import rank_zero_only

from equifeat.data.augment import Augment
from equifeat.errors import RecipeError
from equifeat.files import InUseError, lock
from equifeat.train.callbacks import ExportModel, PlainProgress
from equifeat.train.checkpoints import (
    checkpoints,
    latest_checkpoint,
    read_checkpoint,
    set_aside,
)
from equifeat.train.guard import NonFiniteGuard
from equifeat.train.monitor import Monitor
from equifeat.train.random_state import RandomState
from equifeat.train.run_checkpoint import RunCheckpoint
from equifeat.train.signals import StopOnSignal
from equifeat.train.watch import Watch
from equifeat.train.watch_options import WatchOptions

# What a resumed run may do otherwise: the mathematics stays the same, if not always to the bit.
MAY_CHANGE = frozenset(
    [
        "config",
        "ckpt_path",
        "weights_only",
        "run",
        "data.num_workers",
        "data.pin_memory",
        "data.val_views",
        "data.val_draws",
        "dry_run",
        "model.compile",
        "model.gradient_checkpointing",
        "model.trunk_cache_mb",
        "trainer.accelerator",
        "trainer.barebones",
        "trainer.benchmark",
        "trainer.callbacks",
        "trainer.check_val_every_n_epoch",
        "trainer.default_root_dir",
        "trainer.detect_anomaly",
        "trainer.deterministic",
        "trainer.devices",
        "trainer.enable_autolog_hparams",
        "trainer.enable_checkpointing",
        "trainer.enable_model_summary",
        "trainer.enable_progress_bar",
        "trainer.limit_val_batches",
        "trainer.log_every_n_steps",
        "trainer.logger",
        "trainer.max_epochs",
        "trainer.max_steps",
        "trainer.max_time",
        "trainer.min_epochs",
        "trainer.min_steps",
        "trainer.model_registry",
        "trainer.num_nodes",
        "trainer.num_sanity_val_steps",
        "trainer.plugins",
        "trainer.profiler",
        "trainer.strategy",
        "trainer.sync_batchnorm",
        "trainer.use_distributed_sampler",
        "trainer.val_check_interval",
    ]
)


@dataclass
class Start:
    """Where a run starts or goes on.

    Attributes:
        checkpoint: The checkpoint, or None for a new run.
        step: Its optimiser steps.
        recipe: The recipe in it; empty when it has none.
    """

    checkpoint: Path | None = None
    step: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)


def find_start(run: Path, ckpt_path: str | Path | None) -> Start:
    """Find the checkpoint that a run goes on from.

    Args:
        run: Folder of the run.
        ckpt_path: "last" for the newest readable one of this run, a file, or None for a new run.

    Returns:
        The start.

    Raises:
        RecipeError: A new run in the folder of another one.
        CheckpointError: The file, or every checkpoint of the run, is unreadable.
    """
    folder = run / "checkpoints"
    if ckpt_path == "last":
        found = latest_checkpoint(folder)
        if found is None:
            return Start()
        path, content = found
    else:
        path = Path(ckpt_path) if ckpt_path else folder
        if path.resolve().parent != folder.resolve() and checkpoints(folder):
            raise RecipeError(
                f"{run} holds a run of {checkpoints(folder)[-1].stem.partition('=')[2]} steps: "
                "--ckpt_path last goes on with it, another --run.dir starts anew"
            )
        if not ckpt_path:
            return Start()
        content = read_checkpoint(path)
    return Start(path, int(content["global_step"]), dict(content.get("recipe") or {}))


def clear_later(run: Path, start: Start) -> None:
    """Rename the checkpoints of this run that are newer than its start.

    Args:
        run: Folder of the run.
        start: Where it goes on.
    """
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        set_aside(run / "checkpoints", start.step)


# What runs did before they had a key whose default is to do otherwise.
_BEFORE = {"model.both_directions": False}


def check_recipe(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    defaults: Mapping[str, Any],
    allowed: Sequence[str] = (),
) -> None:
    """Refuse to go on with a recipe that would compute something else.

    Args:
        then: The recipe that made the checkpoint; empty when it is not known.
        now: The recipe of this start.
        defaults: Values of keys that the older recipe does not have yet.
        allowed: Keys that may change all the same.

    Raises:
        RecipeError: Keys that change the mathematics differ.
    """
    if not then:
        return
    before, after = {**_flat(defaults), **_BEFORE, **_flat(then)}, _flat(now)
    if isinstance(ranges := before.get("data.augment"), Mapping):
        # a run may be older than some of them; their defaults do nothing new
        before["data.augment"] = {**asdict(Augment()), **ranges}
    may_change = MAY_CHANGE | set(allowed)
    if after.get("model.schedule") == "cosine":
        may_change -= {"trainer.max_steps"} - set(allowed)  # the schedule ends there
    changed = [
        key
        for key in sorted(after)
        if before.get(key) != after[key] and not _within(key, may_change)
    ]
    if changed:
        values = ", ".join(f"{k} was {before.get(k)!r} and is {after[k]!r}" for k in changed)
        keys = ",".join(changed)
        raise RecipeError(
            f"the run was started with another recipe: {values}; give the first value, or another "
            f"--run.dir for a new run, or --run.allow_changes [{keys}]"
        )


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Values by key, as in model.lr; a value may be a mapping itself."""
    flat: dict[str, Any] = {}
    for section, values in recipe.items():
        if isinstance(values, Mapping):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return flat


def _within(key: str, keys: frozenset[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:n]) in keys for n in range(1, len(parts) + 1))


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Keep other processes from fitting into the same folder.

    Only rank 0 takes the lock.

    Args:
        run: Folder of the run; it is made.

    Raises:
        RecipeError: Another process holds it.
    """
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    try:
        with lock(run / ".lock") as missing:
            if missing:
                sys.stderr.write(f"{run}: this file system has no locks ({missing})\n")
            yield
    except InUseError as error:
        raise RecipeError(
            f"{run} is in use by another fit ({error.holder}): wait for it, stop it, or choose "
            "another --run.dir"
        ) from error


def run_callbacks(
    run_dir: str | Path,
    save_every: int,
    steps: tuple[int, ...] = (),
    logged: bool = True,
    recipe: Mapping[str, Any] | None = None,
    requeue: bool = True,
    watch: WatchOptions | None = None,
    max_skipped: int = 10,
) -> list[Any]:
    """Return the callbacks of every run.

    Args:
        run_dir: Folder of the run.
        save_every: Optimiser steps between two checkpoints.
        steps: Optimiser steps after which the model folder is written as ``step_%06d``.
        logged: Whether the run has a logger.
        recipe: What made the run, for its checkpoints.
        requeue: Whether SIGUSR1 in a SLURM batch job queues it again.
        watch: What is measured on held-out views while the run goes on.
        max_skipped: Most steps that may be skipped because they are not finite.

    Returns:
        Lightning callbacks, one line each.
    """
    run = Path(run_dir)
    # Absolute, as a run may outlive a change of folder.
    checkpoint = RunCheckpoint((run / "checkpoints").absolute(), save_every, recipe=recipe)
    callbacks: list[Any] = [
        # First: when it stops a run, no other callback has begun the next step.
        StopOnSignal(checkpoint, requeue),
        ExportModel(str(run / "model"), steps),
        RandomState(),
        NonFiniteGuard(max_skipped),
    ]
    if logged:
        callbacks += [LearningRateMonitor("step"), Monitor()]
    if watch is not None:
        callbacks.append(Watch(run, watch))
    if not sys.stderr.isatty():
        callbacks.append(PlainProgress())
    # Lightning moves checkpoint callbacks behind all others.
    return [*callbacks, checkpoint]
