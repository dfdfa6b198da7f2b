"""An exponential moving average of the weights that train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from equifeat.errors import CheckpointError, RecipeError
from equifeat.model.weights import describe_mismatch


class AveragedWeights:
    """Follows the trained weights, and lends its own for validation and export.

    Lightning's WeightAveraging would copy the whole module, the frozen ViT included, and put the
    copy into every checkpoint; this one holds what trains.

    Args:
        decay: What stays of the average at a step, in the long run. In the first steps it is
            (1 + t) / (10 + t) where that is less, so that the start is forgotten; 0 averages
            nothing.

    Raises:
        RecipeError: The decay is negative, or 1 or more.
    """

    def __init__(self, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise RecipeError(f"ema_decay is {decay}: use 0 (off) to below 1, for example 0.99")
        self.decay = decay
        self.steps = 0
        self._weights: dict[str, Tensor] = {}

    def update(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take in the weights of one more optimiser step.

        Args:
            parameters: All that trains, the same names every time.
        """
        if not self.decay:
            return
        now = {name: value.detach() for name, value in parameters.items()}
        if not self.steps:
            self._weights = {name: value.clone() for name, value in now.items()}
        else:
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            average(list(self._on_device(now).values()), list(now.values()), self.steps)
        self.steps += 1

    @contextmanager
    def lent_to(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Put the average in place of the weights inside the block; before the first step nothing.

        Args:
            parameters: What `update` was given.
        """
        if not self.steps:
            yield
            return
        trained = {name: value.detach().clone() for name, value in parameters.items()}
        _copy(self._on_device(trained), parameters)
        try:
            yield
        finally:
            _copy(trained, parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return the average for a checkpoint.

        Returns:
            "steps" averaged so far, and "weights": tensors on the CPU by name.
        """
        weights = {name: value.cpu().clone() for name, value in self._weights.items()}
        return {"steps": self.steps, "weights": weights}

    def load_state_dict(
        self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Go on with the average of a checkpoint.

        Args:
            state: What `state_dict` gave.
            parameters: The weights it belongs to.

        Raises:
            CheckpointError: A name or shape differs.
        """
        if state["steps"]:
            problem = describe_mismatch(parameters, state["weights"])
            if problem:
                raise CheckpointError(f"the averaged weights are of another model: {problem}")
        self.steps, self._weights = int(state["steps"]), dict(state["weights"])

    def _on_device(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # A checkpoint is read before Lightning moves the model to its device.
        self._weights = {name: self._weights[name].to(value) for name, value in like.items()}
        return self._weights


def _copy(source: Mapping[str, Tensor], target: Mapping[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(source[name])
