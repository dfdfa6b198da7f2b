"""Entry points of torch.hub: models of equifeat without installing it.

    import torch

    repo = "PATH_OF_THE_CHECKOUT"
    model = torch.hub.load(repo, "load_model", source="local", folder="runs/one_object/model")
    features = model.dense(images).features

There are no trained weights to download: `load_model` opens a model folder that `equifeat fit`
wrote, `build` makes an untrained model of any ViT that timm knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from equifeat.model.extractor import FeatureExtractor as _FeatureExtractor
    from equifeat.model.head import HeadKind as _HeadKind

# What torch.hub asks for before it imports anything: all that a model needs to run.
dependencies = ["torch", "timm", "jaxtyping", "safetensors", "numpy", "PIL", "yaml"]


def load_model(folder: str, device: str = "cpu", weights: str | None = None) -> _FeatureExtractor:
    """Open a model folder.

    Args:
        folder: What `equifeat fit` or `equifeat.save_model` wrote.
        device: Where to put the model.
        weights: Another place to take the backbone's weights from: "hub", "packaged" or a file.

    Returns:
        The model in eval mode: `model.dense(images)`, `model.at(images, keypoints)`.
    """
    from equifeat.checkpoint import load_model as load

    return load(folder, device, weights=weights)


def build(
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    weights: str = "hub",
    head: _HeadKind = "none",
    lora_rank: int = 4,
    lora_blocks: int = 0,
    seed: int = 0,
) -> _FeatureExtractor:
    """Build an untrained model; as it is, one that gives the raw ViT's features.

    Args:
        backbone: timm's name of a ViT.
        weights: "hub", "packaged", "random" or the path of a file.
        head: "none", "conv" or "residual".
        lora_rank: Rank of the updates of q and v.
        lora_blocks: How many of the last blocks are adapted; 0 for no LoRA.
        seed: Seed of everything random at the start.

    Returns:
        The model in eval mode.
    """
    from equifeat.model.extractor import build_extractor

    return build_extractor(
        backbone, weights, head, lora_rank, lora_blocks=lora_blocks, seed=seed
    ).eval()
