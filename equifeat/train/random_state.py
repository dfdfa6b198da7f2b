"""The global random numbers of a run, kept through a resume."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch


class RandomState(pl.Callback):
    """Keep the global random numbers of PyTorch, NumPy and Python through a resume.

    Draws and new weights have their own seeds; this is for whatever else a step may use. Validation
    leaves them as it found them, so that it changes no training.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._before: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return all states as tensors and plain numbers.

        Returns:
            State by library.
        """
        state: Any = np.random.get_state(legacy=True)  # noqa: NPY002 (others' use of it)
        name, keys, *rest = state
        version, internal, normal = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": (name, keys.tolist(), *rest),
            "python": (version, list(internal), normal),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the states of a checkpoint until training starts.

        Args:
            state_dict: What `state_dict` gave.
        """
        self._loaded = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore: what Lightning did on its way here counts for nothing."""
        if self._loaded is not None:
            _restore(self._loaded)
            self._loaded = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the states of training."""
        self._before = self.state_dict()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go back to the states of training."""
        if self._before is not None:
            _restore(self._before)


def _restore(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, internal, normal = state["python"]
    random.setstate((version, tuple(internal), normal))
