"""A model under a protocol's feature options: images in, feature maps out."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.eval.protocol import FeatureSpec
from equifeat.model.feature_map import FeatureMap


@runtime_checkable
class Dense(Protocol):
    """Whatever turns images into a feature map."""

    def dense(self, images: Tensor, resolution: int | None = None) -> FeatureMap:
        """Return the map of (B, 3, H, W) images in [0, 1]."""
        ...


class FeatureSource:
    """A model as tasks see it.

    Args:
        model: Anything with ``dense(images, resolution)``; a FeatureExtractor also takes overlap,
            layers and norm.
        spec: The protocol's feature options.
        name: Name of the model, for messages.
        device: Where images go; the model's own device when None.
    """

    def __init__(
        self,
        model: Dense,
        spec: FeatureSpec,
        name: str = "model",
        device: torch.device | str | None = None,
    ) -> None:
        self.model = model
        self.spec = spec
        self.name = name
        self.device = torch.device(device) if device is not None else device_of(model)
        self._options: dict[str, Any] = {}
        plain = FeatureSpec()
        for option in ("overlap", "layers", "norm"):
            if getattr(spec, option) != getattr(plain, option):
                self._options[option] = getattr(spec, option)

    @torch.no_grad()
    def __call__(self, images: Tensor, resolution: int | None = None) -> FeatureMap:
        """Return the feature map of images.

        Args:
            images: (B, 3, H, W) or (3, H, W) RGB in [0, 1].
            resolution: Patches on the longer side where the protocol derives it from the image;
                the spec's own when None.

        Returns:
            The map; points are in pixels of the given images.

        Raises:
            RecipeError: The model cannot give what the protocol asks for.
        """
        images = images if images.ndim == 4 else images[None]
        patches = resolution if resolution is not None else self.spec.resolution
        if self.spec.scale != 1.0:
            if patches is None:
                raise RecipeError(
                    f"scale={self.spec.scale:g} needs resolution, the patches on the longer side: "
                    "set it too."
                )
            patches = max(1, round(patches * self.spec.scale))
        try:
            return self.model.dense(images.to(self.device), patches, **self._options)
        except TypeError as error:
            if not self._options or "unexpected keyword" not in str(error):
                raise
            asked = ", ".join(f"{k}={v}" for k, v in self._options.items())
            raise RecipeError(
                f"{self.name} gives only its plain final features, but {asked} was asked for."
            ) from error


def device_of(model: object) -> torch.device:
    """Return where a model's weights are.

    Args:
        model: Any model.

    Returns:
        Its device; the CPU for what has no weights.
    """
    if isinstance(model, torch.nn.Module):
        for tensor in model.parameters():
            return tensor.device
    return torch.device("cpu")
