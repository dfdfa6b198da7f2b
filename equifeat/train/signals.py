"""SIGTERM and SIGUSR1: save at the next step, stop, and in SLURM ask for another turn."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

from equifeat.train.run_checkpoint import RunCheckpoint

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def signals_restored() -> Iterator[None]:
    """Give the stopping signals their earlier meaning back at the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopOnSignal(pl.Callback):
    """Stop at a step boundary with a checkpoint; the exit status is 128 + the signal's number.

    The handler only takes a note. Lightning's own handler saves inside the handler, which may be
    in the middle of a step (its issue 21406), so it is replaced.

    Args:
        checkpoint: Saves on demand.
        requeue: Whether SIGUSR1 in a SLURM batch job asks SLURM to queue the job again.
    """

    def __init__(self, checkpoint: RunCheckpoint, requeue: bool = True) -> None:
        self.checkpoint = checkpoint
        self.requeue = requeue
        self._received = 0
        self._agreed = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen; Lightning leaves SIGUSR1 to a handler that is there before its own.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: Lightning's stage.
        """
        if stage == "fit":
            self._listen()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen instead of Lightning, which has registered its handlers since setup."""
        self._listen()
        trainer._signal_connector.received_sigterm = False

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Agree among all ranks whether to stop, and ask for a checkpoint."""
        number = self._received
        if trainer.world_size > 1:
            note = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(note, reduce_op="max"))
        if number:
            self._agreed = self._agreed or number
            self.checkpoint.wanted = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop once the checkpoint of the step before is there.

        Raises:
            SystemExit: A signal asked for it.
        """
        step = trainer.global_step
        if not self._agreed or self.checkpoint.saved != step:
            return
        self.checkpoint.publish(trainer)
        if trainer.is_global_zero:
            name = signal.Signals(self._agreed).name
            after = "the same command goes on from there"
            if self._agreed == signal.SIGUSR1 and self.requeue and SLURMEnvironment.detect():
                after = requeue_slurm_job()
            sys.stderr.write(f"stopped by {name} after step {step}, which is saved: {after}\n")
            sys.stderr.flush()
        # the first rank to end may take the others with it: not before the job is queued again
        trainer.strategy.barrier("stopped")
        raise SystemExit(128 + self._agreed)

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._received = self._received or number


def requeue_slurm_job() -> str:
    """Ask SLURM to queue this job again.

    Returns:
        What came of it, for the log.
    """
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = shutil.which("scontrol")
    if command is None:
        return f"scontrol is not on PATH, so submit job {job} again"
    done = subprocess.run([command, "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        why = " ".join(done.stderr.split())
        return f"scontrol requeue {job} failed ({why}), so submit it again"
    return f"job {job} is queued again"
