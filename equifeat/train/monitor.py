"""What a run logs of itself: gradient norm, speed, wait for data, memory."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

_STATM = Path("/proc/self/statm")


class Monitor(pl.Callback):
    """Log how a run is doing, at the steps that are logged.

    ``train/grad_norm`` is a result, equal in a resumed run; all that depends on the machine and the
    moment is under ``time/``. Validation and held-out watching count for no step.
    """

    def __init__(self) -> None:
        self._step = -1
        self._pairs = 0
        self._paused = 0.0
        self._pause_began = 0.0
        self._mark: tuple[float, float, int] = (0.0, 0.0, 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._step = trainer.global_step
        self._restart(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log the norm of all gradients before they are clipped."""
        groups = optimizer.param_groups
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        pl_module.log("train/grad_norm", torch.nn.utils.get_total_norm(grads))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log means over the steps since the last logged one."""
        self._pairs += len(batch) * trainer.world_size
        step = trainer.global_step
        if step == self._step:  # between accumulated batches
            return
        self._step = step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or step % every:
            return
        now, waited = time.monotonic(), _waited(trainer)
        began, waited_then, first = self._mark
        seconds = max(now - began - self._paused, 1e-9)
        values = {
            "time/step_s": seconds / (step - first),
            "time/pairs_per_s": self._pairs / seconds,
            "time/memory_gib": memory_gib(pl_module.device),
        }
        if waited is not None:
            values["time/data_wait"] = min((waited - waited_then) / seconds, 1.0)
        # Not by the module: Lightning would repeat a value until there is a newer one.
        trainer.callback_metrics.update({name: torch.tensor(v) for name, v in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step - 1)
        self._restart(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._pause_began = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the clock go on."""
        self.exclude(time.monotonic() - self._pause_began)

    def exclude(self, seconds: float) -> None:
        """Leave out time that was spent on something else than training.

        Args:
            seconds: How long.
        """
        self._paused += seconds

    def _restart(self, trainer: pl.Trainer) -> None:
        self._mark = (time.monotonic(), _waited(trainer) or 0.0, trainer.global_step)
        self._pairs = 0
        self._paused = 0.0


def _waited(trainer: pl.Trainer) -> float | None:
    """Seconds that the training loader has kept this process waiting."""
    return getattr(trainer.train_dataloader, "seconds_waited", None)


def memory_gib(device: torch.device) -> float:
    """Return the memory that a run needs.

    Args:
        device: Where the model is.

    Returns:
        GiB: on a GPU the most that PyTorch has allocated there since the start; elsewhere what the
        process holds in RAM now, without its loader processes (its highest where the system
        does not tell).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if _STATM.is_file():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
