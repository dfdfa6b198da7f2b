"""One process or several: who predicts which items."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from equifeat.errors import RecipeError


class Ranks(NamedTuple):
    """The processes that share the work.

    Attributes:
        rank: Number of this one.
        world: How many there are.
        device: Where this one computes.
        fabric: Lightning's Fabric; None for a single process.
    """

    rank: int
    world: int
    device: str
    fabric: Any = None

    def mine(self, indices: Sequence[int]) -> list[int]:
        """Return this process's share: neighbours stay together, as they share an object.

        Args:
            indices: All that is left to do, the same list in every process.

        Returns:
            A part of it.
        """
        part: list[int] = np.array_split(np.asarray(indices, dtype=np.int64), self.world)[
            self.rank
        ].tolist()
        return part

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.fabric is not None:
            self.fabric.barrier()


def start_ranks(device: str = "auto", devices: int = 1) -> Ranks:
    """Start the processes, or join those that torchrun started.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", …
        devices: How many processes of this machine; each has a GPU of its own, or none.

    Returns:
        The place of this process.

    Raises:
        RecipeError: There are not so many GPUs.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if devices < 1:
        raise RecipeError(f"--devices {devices} must be at least 1.")
    if kind == "cuda" and devices > torch.cuda.device_count():
        raise RecipeError(f"--devices {devices}: there are {torch.cuda.device_count()} GPUs here.")
    joined = "TORCHELASTIC_RUN_ID" in os.environ
    if devices == 1 and not joined:
        return Ranks(0, 1, device)
    if ":" in device:
        raise RecipeError(f"--device {device} is one GPU: give --device cuda with --devices.")
    if joined:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // local
    else:
        local, nodes = devices, 1
    from lightning_fabric import Fabric  # seconds of import that one process does without

    fabric = Fabric(accelerator=kind, devices=local, num_nodes=nodes, strategy="ddp")
    fabric.launch()
    return Ranks(fabric.global_rank, fabric.world_size, str(fabric.device), fabric)
