"""Tiny ViTs of every kind, with random weights that do not depend on the order of tests."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor

from equifeat.model.adapter import LoraAdapter
from equifeat.model.backbone import Backbone
from equifeat.model.weights import WeightsSource

_SMALL = {"depth": 3, "embed_dim": 64, "num_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("test_vit", {}),
    "register_no_class": ("test_vit3", {}),
    "rmsnorm": ("test_vit4", {}),
    "dinov2": ("vit_small_patch14_dinov2", {**_SMALL, "img_size": 70}),
    "dinov2_reg4": ("vit_small_patch14_reg4_dinov2", {**_SMALL, "img_size": 70}),
    "deit3": ("deit3_small_patch16_224", {**_SMALL, "img_size": 64}),
    "eva_bias_beside_weight": ("eva02_tiny_patch14_224", {**_SMALL, "img_size": 56}),
    "eva_split": ("eva02_tiny_patch14_224", {**_SMALL, "img_size": 56, "qkv_fused": False}),
    "dinov3": ("vit_small_patch16_dinov3", {**_SMALL, "img_size": 64}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {**_SMALL, "img_size": 64}),
}


def timm_model(kind: str, seed: int = 0) -> Any:
    """Return a tiny timm model; random weights are made large enough to matter."""
    name, options = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gamma" in name:  # layer scales start near zero and would hide the blocks
                    parameter.fill_(0.5)
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def backbone(kind: str, seed: int = 0, position: str = "timm") -> Backbone:
    """Return a tiny backbone."""
    return Backbone(timm_model(kind, seed), KINDS[kind][0], WeightsSource("given"), position)


def randomize(adapter: LoraAdapter, seed: int = 1) -> None:
    """Give B random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key in adapter.blocks:
            for update in adapter.pair(int(key)):
                update.b.copy_(0.2 * torch.randn(update.b.shape, generator=generator))


def images(batch: int = 2, h: int = 64, w: int = 48, seed: int = 0) -> Tensor:
    """Return random images."""
    return torch.rand(batch, 3, h, w, generator=torch.Generator().manual_seed(seed))
