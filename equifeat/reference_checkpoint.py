"""Checkpoints of the reference implementation (3DCorrEnhance), rebuilt as models of this one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from equifeat.errors import CheckpointError, ModelNameError, RecipeError, suggest
from equifeat.model.backbone import Backbone, load_backbone, resolve_name
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.weights import PACKAGED_BACKBONE, describe_mismatch
from equifeat.reference_file import ReferenceTensors, read_reference

# Short names of the backbones that the reference finetunes: timm's name and the width of a token.
ALIASES: dict[str, tuple[str, int]] = {
    "dinov2-small": ("vit_small_patch14_dinov2.lvd142m", 384),
    "dinov2-base": ("vit_base_patch14_dinov2.lvd142m", 768),
    "dinov2-large": ("vit_large_patch14_dinov2.lvd142m", 1024),
    "dinov2-giant": ("vit_giant_patch14_dinov2.lvd142m", 1536),
    "dinov2-reg-small": ("vit_small_patch14_reg4_dinov2.lvd142m", 384),
    "dinov2-reg-base": ("vit_base_patch14_reg4_dinov2.lvd142m", 768),
    "dinov2-reg-large": ("vit_large_patch14_reg4_dinov2.lvd142m", 1024),
    "dinov2-reg-giant": ("vit_giant_patch14_reg4_dinov2.lvd142m", 1536),
    "mae-base": ("vit_base_patch16_224.mae", 768),
    "clip-base": ("vit_base_patch16_clip_384.laion2b_ft_in12k_in1k", 768),
    "deit3-base": ("deit3_base_patch16_224.fb_in1k", 768),
}
TARGET_SIDE = 640
"""Pixels of the longer side in the reference's code; it divides them by 8 to count patches."""
RESOLUTION = TARGET_SIDE // 8


def backbone_name(name: str) -> str:
    """Return timm's name of a backbone.

    Args:
        name: A key of ALIASES or timm's name of a plain ViT.

    Returns:
        timm's name with its tag.

    Raises:
        ModelNameError: It is neither.
    """
    if name in ALIASES:
        return ALIASES[name][0]
    near = suggest(name, ALIASES)
    if near and "_" not in name:
        raise ModelNameError(f"there is no backbone {name!r}.{near}")
    return resolve_name(name)


def reference_position(name: str) -> str:
    """Return how the reference resamples the position embedding of a backbone.

    DINOv2's own code does it by the factor (h + 0.1) / 37, without antialias; for its models with
    registers to a size with antialias, which is also what timm does for all its models.

    Args:
        name: timm's name.

    Returns:
        "reference" or "timm", see `equifeat.model.backbone.Backbone`.
    """
    return "reference" if "patch14_dinov2" in name else "timm"


def import_reference(
    path: str | Path,
    backbone: str | Backbone = PACKAGED_BACKBONE,
    weights: str = "packaged",
    *,
    sampling: str = "exact",
) -> FeatureExtractor:
    """Read a checkpoint of the reference implementation.

    Its features equal the reference's with `resolution = its target side / 8`, so 80.

    Args:
        path: The .ckpt file; read without running code from it.
        backbone: The backbone it was trained on: timm's name, a key of ALIASES, or one in memory.
        weights: Where the backbone's weights come from.
        sampling: "reference" repeats the reference's faulty sampling of patches that are not 14
            pixels wide, and its rounding of the grid; see docs/convert.md.

    Returns:
        The extractor.

    Raises:
        CheckpointError: The file is missing or damaged, or a name or shape does not fit.
        ModelNameError: There is no such backbone.
        WeightsError: The backbone's weights cannot be had.
    """
    path = Path(path)
    if sampling not in ("exact", "reference"):
        raise RecipeError(f"sampling must be 'exact' or 'reference', not {sampling!r}")
    tensors = read_reference(path)
    if isinstance(backbone, str):
        asked, backbone = backbone, backbone_name(backbone)
        for name, dim in ALIASES.values():
            # known without the weights, which may be a long download
            if name == backbone and dim != tensors.dim:
                raise CheckpointError(_wrong_width(path, tensors.dim, asked, dim))
        position = reference_position(backbone)
        backbone = load_backbone(backbone, weights, position=position)
    position = reference_position(backbone.name)
    if backbone.position != position:
        raise CheckpointError(
            f"a shared {backbone.name!r} for a checkpoint of the reference needs "
            f"position={position!r}, not {backbone.position!r}"
        )
    if backbone.dim != tensors.dim:
        raise CheckpointError(_wrong_width(path, tensors.dim, backbone.name, backbone.dim))
    blocks = len(tensors.down) // 2
    if blocks > backbone.depth:
        raise CheckpointError(
            f"{path} adapts {blocks} blocks, but {backbone.name!r} has {backbone.depth} blocks"
        )
    extractor = build_extractor(backbone, head="conv", lora_rank=tensors.rank, lora_blocks=blocks)
    _fill(extractor, tensors, path)
    # With patches of 14 pixels and the reference's own grid there is nothing to repeat.
    if sampling == "reference" and (backbone.patch_size != 14 or position != "reference"):
        extractor.sampling = "reference"
    return extractor.eval()


def _wrong_width(path: Path, dim: int, name: str, wrong: int) -> str:
    """Say which backbones would fit."""
    fits = [alias for alias, (_, width) in ALIASES.items() if width == dim]
    remedy = f"it fits {', '.join(fits)}" if fits else "give the timm name of one that wide"
    return f"{path} is of a backbone of width {dim}, but {name} has width {wrong}: {remedy}"


def _fill(extractor: FeatureExtractor, tensors: ReferenceTensors, path: Path) -> None:
    """Put the tensors where they belong, strictly."""
    adapter = extractor.adapter
    assert adapter is not None
    expected: dict[str, Tensor] = {}
    updates = [low_rank for key in adapter.blocks for low_rank in adapter.pair(int(key))]
    for index, update in enumerate(updates):
        expected[f"w_a_{index:03d}"], expected[f"w_b_{index:03d}"] = update.a, update.b
    for key, value in extractor.head.state_dict().items():
        expected[key.replace("conv.", "refine_conv.")] = value
    found = tensors.named()
    problem = describe_mismatch(expected, found)
    if problem:
        raise CheckpointError(f"{path} does not fit {extractor.backbone.name!r}: {problem}")
    with torch.no_grad():
        for key, value in expected.items():
            value.copy_(found[key])
