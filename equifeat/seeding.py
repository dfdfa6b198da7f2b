"""(seed, draw, ...) to generators: the same numbers wherever and whenever a draw is made."""

from __future__ import annotations

import numpy as np
import torch


def numpy_generator(seed: int, *path: int) -> np.random.Generator:
    """Return a NumPy generator that depends on the seed and the path only.

    Args:
        seed: Seed of the run, ≥ 0.
        *path: Further non-negative integers, for example the draw and a stream number.

    Returns:
        A fresh generator; streams of different paths are independent (NumPy SeedSequence).
    """
    return np.random.default_rng(np.random.SeedSequence([seed, *path]))


def torch_generator(seed: int, *path: int) -> torch.Generator:
    """Return a CPU torch generator that depends on the seed and the path only.

    Args:
        seed: Seed of the run, ≥ 0.
        *path: Further non-negative integers.

    Returns:
        A fresh generator.
    """
    state = np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))
