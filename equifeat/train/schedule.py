"""Learning-rate schedules as factors of the peak rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from equifeat.errors import RecipeError


def lr_factor(
    schedule: Literal["constant", "cosine"], warmup_steps: int, total_steps: float
) -> Callable[[int], float]:
    """Return the factor of the learning rate at each optimiser step.

    Args:
        schedule: "constant", or "cosine" down to zero at the last step.
        warmup_steps: Steps of linear warm-up from 1/warmup_steps to 1.
        total_steps: Steps of the whole run; may be infinite for "constant".

    Returns:
        A function of the step, from 0.

    Raises:
        RecipeError: The numbers make no schedule.
    """
    if warmup_steps < 0:
        raise RecipeError(f"warmup_steps is {warmup_steps}: use 0 or more")
    if schedule == "cosine" and not warmup_steps < total_steps < math.inf:
        raise RecipeError(
            f"schedule=cosine needs trainer.max_steps above warmup_steps={warmup_steps}, "
            f"not {total_steps}"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return 0.5 * (1.0 + math.cos(math.pi * done))

    return factor
