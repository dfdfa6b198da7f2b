"""Skip steps whose loss or gradient is not finite, say which draws did it, and stop at too many."""

from __future__ import annotations

import sys
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch import distributed as dist

from equifeat.data.batch import PairBatch
from equifeat.errors import TrainingError
from equifeat.train.distributed import all_sum, world_size

_SHOWN = 8


class NonFiniteGuard(pl.Callback):
    """Leaves weights and optimiser as they are when a step's loss or gradient is NaN or infinite.

    All ranks and all accumulated batches of a step are skipped together. A skipped step counts as
    a step: draws, schedule and the number of steps go on. Under 16-mixed, gradients that overflow
    at a loss scale of 1 or more are left to the GradScaler, which skips them and lowers its scale.

    Args:
        max_skipped: Most steps that a run may skip, over all its starts.
    """

    def __init__(self, max_skipped: int = 10) -> None:
        self.max_skipped = max_skipped
        self.skipped = 0
        self._batch: PairBatch | None = None
        self._losses: list[Tensor] = []
        self._draws: list[list[str]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the count, for the checkpoint.

        Returns:
            Plain numbers.
        """
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting.

        Args:
            state_dict: What `state_dict` gave.
        """
        self.skipped = int(state_dict["skipped"])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember whose loss comes next."""
        self._batch = batch

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Remember the loss; looking at it now would wait for the GPU."""
        assert self._batch is not None
        named = zip(self._batch.draws, self._batch.object_names, strict=True)
        self._losses.append(loss.detach())
        self._draws.append([f"{draw} ({name})" for draw, name in named])

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the gradients away if they, or a loss of any rank, are not finite.

        Raises:
            TrainingError: More steps were skipped than may be.
        """
        losses, draws = torch.stack(self._losses), self._draws
        self._losses, self._draws = [], []
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters if p.grad is not None]
        bad_losses = ~losses.isfinite()
        bad_grad = ~torch.nn.utils.get_total_norm(grads).isfinite()
        # One transfer a step, the same decision on every rank.
        bad = torch.stack([bad_losses.any(), bad_grad]).float()
        of_loss, of_grad = (count > 0 for count in all_sum(bad).tolist())
        if (of_loss or of_grad) and not (not of_loss and _is_scalers_matter(trainer)):
            for parameter in parameters:
                parameter.grad = None  # which every optimiser takes as: leave this one alone
            self.skipped += 1
            # A rank whose losses are finite has no part in it, unless only the gradient is bad.
            blamed = [d for d, is_bad in zip(draws, bad_losses.tolist(), strict=True) if is_bad]
            self._report(trainer, "loss" if of_loss else "gradient", blamed if of_loss else draws)
        if self.skipped:
            pl_module.log("train/skipped", float(self.skipped), batch_size=1)

    def _report(self, trainer: pl.Trainer, what: str, batches: list[list[str]]) -> None:
        """Say what was skipped, or stop."""
        names = _over_ranks([name for batch in batches for name in batch])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        which = f"{'draws' if len(names) > 1 else 'draw'} {', '.join(names[:_SHOWN])}{more}"
        step = trainer.global_step
        if self.skipped > self.max_skipped:
            raise TrainingError(
                f"the {what} of step {step} is not finite ({which}), after {self.max_skipped} "
                "skipped steps, which is all that run.max_skipped allows: lower model.lr, use "
                "trainer.precision=32-true, check the views of these draws, or raise "
                "run.max_skipped; the last checkpoint is kept"
            )
        if trainer.is_global_zero:
            sys.stderr.write(
                f"step {step} skipped: its {what} is not finite, {which}; "
                f"{self.skipped} of at most {self.max_skipped}\n"
            )
            sys.stderr.flush()


def _is_scalers_matter(trainer: pl.Trainer) -> bool:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() >= 1.0


def _over_ranks(names: list[str]) -> list[str]:
    """Return the names of all ranks, in the order of ranks."""
    if world_size() == 1:
        return names
    gathered: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(gathered, names)
    return [name for part in gathered for name in part]
